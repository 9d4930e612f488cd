"""Cost against hand-made numbers: published hours, FLOPs by brute force, the commands; checkpoints described."""

import json
import re

import pytest
import torch

from abyssal.model import ModelConfig, Transformer, save_pretrained
from abyssal.model.lineage import LineageConfig, LineageTransformer
from abyssal.model.lineage.accounting import account
from abyssal.train.cli import main
from abyssal.train.measure import cost, roofline


@pytest.mark.parametrize(("name", "cache"), [("v3", 70_272), ("v3.2", 48_068)])
def test_lineage_counts_are_the_models(name, cache):
    config = LineageConfig.load(name)
    with torch.device("meta"):
        model = LineageTransformer(config)
    found = account(config, 1_000_000)
    assert found.total == sum(t.numel() for t in model.state_dict().values())
    assert found.trainable == sum(p.numel() for p in model.parameters())
    assert found.cache.per_token == cache, "the published figure"
    held = LineageTransformer(LineageConfig.from_dict(SMALL[name])).new_cache(1, 10)
    assert held.nbytes() == account(LineageConfig.from_dict(SMALL[name]), 10).plain_cache.total
    if name == "v3.2":  # spec D.2: 999.4 + 2 x 34.8 GFLOP beside the parameters
        assert round(found.flops.index / 1e9, 1) == 999.4 and round(found.flops.core / 1e9, 1) == 34.8


SIZES = {
    **{"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "n_routed_experts": 4},
    **{"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "q_lora_rank": 8},
    **{"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "num_experts_per_tok": 2},
    **{"torch_dtype": "float32"},
}
SIZES |= {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
SMALL = {
    "v3": {"model_type": "deepseek_v3", **SIZES},
    "v3.2": {"model_type": "deepseek_v32", **SIZES, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 5},
}


def test_the_mfu_is_set_by_one_training_and_tried_on_others():
    """By hand from the reports' numbers: 37 B parameters a token, 61 layers of 128 heads with 192 + 128 channels."""
    mfu, found = cost.validation()
    hour = 989e12 * 3600 * 1000  # of a thousand GPUs

    def flops(activated, layers, heads, channels, length):
        return 6 * activated + 6 * layers * heads * channels * (length + 1) / 2

    v3 = (36.63e9, 61, 128, 320)
    assert mfu == pytest.approx(14.8e12 * flops(*v3, 4096) / hour / 2664, rel=1e-3)
    extension = 62.9e9 * flops(*v3, 32768) + 62.9e9 * flops(*v3, 131072)
    hand = {
        "V3's context extension": (extension, 119),
        "DeepSeek 67B, 1e12 tokens": (1e12 * flops(67e9, 95, 64, 256, 4096), 300.6),
        "DeepSeek-V2, 1e12 tokens": (1e12 * flops(21e9, 60, 128, 320, 4096), 172.8),
    }
    assert found.keys() == hand.keys(), "what the MFU is set by is no prediction"
    for name, (work, published) in hand.items():
        assert found[name] == (pytest.approx(work / hour / mfu, rel=1e-3), published)
    off = {name: hours / published - 1 for name, (hours, published) in found.items()}
    assert abs(off["DeepSeek 67B, 1e12 tokens"]) < 0.02 and max(map(abs, off.values())) < 0.4


def test_attention_flops_are_the_mean_over_positions():
    v4 = ModelConfig.load("v4-flash")
    per_position = [cost.accounts(v4, n).flops for n in range(1, 257)]
    assert cost.attention_flops(v4, 256) == sum(f.index + f.core for f in per_position) / 256
    v3 = LineageConfig.load("v3")
    pairs = (1 + 4096) / 2  # a causal sequence of 4,096, on average
    want = 61 * 2 * 128 * (128 + 64 + 128) * pairs
    assert cost.attention_flops(v3, 4096, expanded=True) == pytest.approx(want, rel=1e-3)


def test_decoding_reads_what_it_sees():
    context = 100_000
    flash = 128 * 584 * 43 + 21 * (512 * 584 + 25_000 * 68) + 20 * (context // 128) * 584
    assert cost.bytes_read(ModelConfig.load("v4-flash"), context) == flash
    assert cost.bytes_read(LineageConfig.load("v3"), context) == context * 70_272
    assert cost.bytes_read(LineageConfig.load("v3.2"), context) == 61 * (2048 * 656 + context * 132)


def test_dollars_by_hand():
    gpu = cost.Gpu("h100", 0.5, 3.6)
    config = ModelConfig.load("v4-flash")
    assert cost.training_hours(config, 1e12, 4096, gpu) == pytest.approx(
        1e12 * cost.training_flops(config, 4096) / (989e12 * 0.5) / 3600
    )
    compute, memory = cost.decode_seconds(config, 4096, gpu)
    assert compute == cost.accounts(config, 4096).flops.total / 494.5e12
    assert memory == cost.bytes_read(config, 4096) / 3350e9
    assert cost.per_million(0.001, gpu) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("4096", 4096), ("128K", 131072), ("1M", 1048576), ("2k", 2048)]
)
def test_numbers_of_tokens(text, number):
    assert cost.count(text) == number


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--context", "1G"], "'1G' is no number of tokens"),
        (["--context", "-1"], "no number of tokens"),
        (["--gpu", "tpu"], "gpu 'tpu': allowed are a10, a100, "),
        (["--gpu", "rtx409"], "gpu 'rtx409': did you mean 'rtx4090'"),
        (["--gpu", "h100", "--mfu", "1.5"], "mfu=1.5"),
        (["--gpu", "h100", "--price", "-1"], "price=-1"),
        (["--gpu", "h100", "--price", "nan"], "price=nan"),
        (["--gpu", "h100", "--price", "inf"], "price=inf"),
        (["--gpu", "h100", "--tokens", "-1"], "tokens=-1"),
        (["--gpu", "h100", "--tokens", "nan"], "tokens=nan"),
    ],
)
def test_errors(arguments, says, capsys):
    assert main(["info", "v4-flash", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_info_shows_the_relatives_and_the_estimate(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "cost.png"
    options = ["--context", "1M", "--gpu", "h100", "--price", "2.35", "--mfu", "0.4", "--plot", str(picture)]
    assert main(["info", "v4-pro", *options]) == 0
    text = capsys.readouterr().out
    for title in ("V3", "V3.2", "V4-Flash", "48.85", "26.5%", "training", "prefill", "decode", "$"):
        assert title in text
    assert picture.stat().st_size > 10_000
    assert main(["info", "v3", "--gpu", "h800"]) == 0
    told = capsys.readouterr().out
    assert "calibrated on   V3's pre-training: 2,664 published, so the MFU is 39.1% of dense BF16\npredicts " in told
    assert re.search(r"V3's context extension +75 +119 +-37%\n", told) and "within 37% here" in told


def test_the_tables_numbers_are_the_datasheets():
    for name, (half, single, bandwidth, memory, names) in roofline.GPUS.items():
        assert cost.Gpu(name, 1.0, 0).flops == roofline.datasheet(names[-1], "float16").flops == 1e12 * half
        assert roofline.datasheet(names[0], "float32").flops == 1e12 * single
        assert cost.Gpu(name, 0.4, 2).bandwidth == 1e9 * bandwidth and half > single and memory >= 24
    names = [name for chip in roofline.GPUS.values() for name in chip.names]
    assert len({*names}) == len(names)


def test_a_recipe_trains_on_its_own_tokens_and_others_on_the_published_number(tmp_path):
    assert cost.training("toy") == (1000 * 8 * 256, 256)
    stages = "".join(f"[[stages]]\nsteps = {n}\nsequence_length = {t}\n" for n, t in ((30, 64), (10, 256)))
    (tmp_path / "staged.toml").write_text(f'base = "toy"\ntrain.steps = 40\ndata.batch_size = 2\n{stages}', "utf-8")
    tokens, length = cost.training(str(tmp_path / "staged.toml"))
    assert tokens == 2 * (30 * 64 + 10 * 256) and length == round((30 * 64 * 64 + 10 * 256 * 256) * 2 / tokens)
    assert cost.training("v4-pro") == cost.training("v3.2") == (15e12, 4096)
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig.load("v4-flash").to_dict()), "utf-8")
    assert cost.training(str(tmp_path)) == (15e12, 4096)
    (tmp_path / "mine.toml").write_text('base = "toy"\ndata.batch_size = 1\nmodel.engram = "none"\n', "utf-8")
    assert cost.training(str(tmp_path / "mine.toml")) == (1000 * 256, 256)
    assert "GPU-second" in cost.estimate(str(tmp_path / "mine.toml"), 1, cost.Gpu("rtx4090", 0.4, 2.0))
    with pytest.raises(ValueError, match="tokens is missing: the model itself writes what reason-grpo"):
        cost.training("reason-grpo")


@pytest.mark.parametrize(
    ("name", "tokens", "says"),
    [
        ("toy", None, (" k + 52.94 k) = 1.6 MFLOP a token", "0.0491 GPU-seconds, 0.0027 cents", " MB, 0.7% of")),
        ("small", 1e9, ("55.9 GPU-minutes, $1.86",)),
        ("small", 1e11, ("93 GPU-hours (3.9 days), $186.42",)),
        ("v4-pro", None, ("2 x 48.85 G + 6.41 G) = 312.4 GFLOP", "19.719 M hours, $39.44 M", "at least 1,066 GPUs")),
    ],
)
def test_units_fit_the_size(name, tokens, says):
    text = cost.estimate(name, 1, cost.Gpu("rtx4090", 0.4, 2.0), tokens)
    assert all(words in text for words in says), text


def test_info_and_convert_of_a_folder(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"head_dim": 80, "index_head_dim": 32, "hidden_size": 64, "moe_intermediate_size": 32}
    config = ModelConfig.from_dict({**ModelConfig.load("nano").to_dict(), "engram": None, **sizes})
    save_pretrained(Transformer(config), tmp_path / "x")
    assert main(["info", str(tmp_path / "x")]) == 0
    text = capsys.readouterr().out
    values = sum(t.numel() for t in Transformer(config).state_dict().values())
    assert "huggingface" in text and f"values of the model   {values:,}" in text and "fits" in text
    target = tmp_path / "y"
    assert main(["convert", str(tmp_path / "x"), str(target), "--layout", "official", "--weights", "fp4"]) == 0
    assert "official, quantised" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "x"), str(target), "--dtype", "int8"]) == 2
    assert "dtype='int8'" in capsys.readouterr().err
    LineageTransformer(LineageConfig.from_dict(SMALL["v3.2"]))
    save_pretrained(LineageTransformer(LineageConfig.from_dict(SMALL["v3.2"])), tmp_path / "z")
    assert main(["info", str(tmp_path / "z"), "--context", "100"]) == 0
    assert "deepseek_v32" in capsys.readouterr().out

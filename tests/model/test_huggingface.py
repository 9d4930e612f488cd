"""Checkpoint interchange: names, shapes and keys against transformers itself, round trips, and every refusal."""

import json
import re
from dataclasses import replace

import pytest
import torch
from model_tensors import model_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from abyssal.model import huggingface
from abyssal.model.config import HEAVY, SLIDING, SPARSE, EngramConfig, ModelConfig, RopeScaling
from abyssal.model.huggingface import config_from_huggingface, config_to_huggingface, sources

LAYOUTS = ("official", "huggingface")


def tiny(**changes) -> ModelConfig:
    values = {
        **{"vocab_size": 53, "hidden_size": 24, "num_hidden_layers": 4, "sliding_window": 8, "num_hash_layers": 1},
        **{"compress_ratios": [0, 4, 8, 4], "layer_types": [SLIDING, SPARSE, HEAVY, SPARSE], "index_topk": 3},
        **{"num_attention_heads": 4, "head_dim": 12, "qk_rope_head_dim": 4, "q_lora_rank": 10, "o_groups": 2},
        **{"o_lora_rank": 6, "index_n_heads": 3, "index_head_dim": 8, "n_routed_experts": 5, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 7, "routed_scaling_factor": 1.5, "torch_dtype": "float32"},
    }
    return ModelConfig.from_dict({**values, **changes})


def made_up(config: ModelConfig, rows: dict[int, int] | None = None) -> dict[str, torch.Tensor]:
    """A model's state without the model: every tensor filled with numbers of its own."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in model_tensors(config, rows).items():
        if name.endswith(("tid2eid", "canonical")):
            state[name] = torch.randint(0, 5, shape, generator=generator)
        else:
            state[name] = torch.randn(shape, generator=generator)
    return state


def write(folder, config, layout, state=None, limit=10**9):
    huggingface._write(made_up(config) if state is None else state, config, folder, layout, limit)
    return folder


def read(folder, config, dtype=None):
    shapes = {name: tensor.shape for name, tensor in made_up(config).items()}
    return huggingface._read(huggingface._headers(folder), shapes, config, torch.device("cpu"), dtype)


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("limit", [10**9, 4096])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_reads_back_bit_for_bit(tmp_path, layout, limit):
    config = tiny()
    folder = write(tmp_path / "new", config, layout, limit=limit)
    assert (folder / "model.safetensors.index.json").exists() == (limit == 4096)
    assert_equal(read(folder, config), made_up(config))
    assert ModelConfig.load(folder / "config.json") == config


@pytest.mark.parametrize("changes", [{"n_shared_experts": 2}, {"hc_mult": 1}, {"num_nextn_predict_layers": 0}], ids=str)
def test_official_layout_holds_any_configuration(tmp_path, changes):
    config = tiny(**changes)
    assert_equal(read(write(tmp_path / "x", config, "official"), config), made_up(config))


def test_official_layout_holds_engram(tmp_path):
    config = replace(tiny(), engram=EngramConfig(layers=(1,), head_dim=4, vocab_size=11, heads=2))
    state = made_up(config, {1: 50})
    folder = write(tmp_path / "x", config, "official", state)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    got = huggingface._read(huggingface._headers(folder), shapes, config, torch.device("cpu"), None)
    assert_equal(got, state)
    with pytest.raises(ValueError, match="no Engram: save with layout='official'"):
        write(tmp_path / "y", config, "huggingface", state)
    assert not (tmp_path / "y").exists()


def test_official_names():
    config = tiny(num_hidden_layers=1, compress_ratios=[4], layer_types=[SPARSE], num_hash_layers=0, n_routed_experts=2)
    names = {source for name in model_tensors(config) for source in sources(name, config, "official")}
    weights = """attn_norm ffn_norm attn.wq_a attn.q_norm attn.wq_b attn.wkv attn.kv_norm attn.wo_a attn.wo_b ffn.gate
        ffn.experts.0.w1 ffn.experts.0.w2 ffn.experts.0.w3 ffn.experts.1.w1 ffn.experts.1.w2 ffn.experts.1.w3
        ffn.shared_experts.w1 ffn.shared_experts.w2 ffn.shared_experts.w3"""
    sparse = """attn.compressor.wkv attn.compressor.wgate attn.compressor.norm attn.indexer.wq_b
        attn.indexer.weights_proj attn.indexer.compressor.wkv attn.indexer.compressor.wgate
        attn.indexer.compressor.norm"""
    hyper = {f"hc_{site}_{part}" for site in ("attn", "ffn") for part in ("fn", "base", "scale")}
    block = {*named(weights), "attn.attn_sink", "ffn.gate.bias", *hyper}
    layer = {*block, *named(sparse), "attn.compressor.ape", "attn.indexer.compressor.ape"}
    head = {f"hc_head_{part}" for part in ("fn", "base", "scale")}
    mtp = {*block, *named("enorm hnorm norm e_proj h_proj"), *head}
    ends = {*named("embed head norm"), *head}
    assert names == ends | {f"layers.0.{name}" for name in layer} | {f"mtp.0.{name}" for name in mtp}


def named(words):
    return {f"{word}.weight" for word in words.split()}


def test_stacked_matrices_go_where_they_belong():
    config = tiny()
    width = config.moe_intermediate_size
    experts = sources("layers.1.ffn.experts.w13", config, "official")
    assert experts["layers.1.ffn.experts.4.w1.weight"] == (4, slice(0, width))
    assert experts["layers.1.ffn.experts.4.w3.weight"] == (4, slice(width, 2 * width))
    assert sources("layers.1.ffn.experts.w13", config, "huggingface") == {"model.layers.1.mlp.experts.gate_up_proj": ()}
    shared = sources("layers.0.ffn.shared_experts.w13.weight", replace(config, n_shared_experts=2), "official")
    assert shared["layers.0.ffn.shared_experts.w3.weight"] == (slice(2 * width, 4 * width),)


def test_every_element_has_exactly_one_source():
    config = tiny()
    for layout in ("official", "hybrid", "huggingface"):
        seen = set()
        for name, shape in model_tensors(config).items():
            count = torch.zeros(shape)
            for source, index in sources(name, config, layout).items():
                assert source not in seen, source
                seen.add(source)
                count[index] += 1
            assert bool((count == 1).all()), name


def test_dtype_spares_what_is_float32_by_convention(tmp_path):
    config = tiny()
    folder = write(tmp_path / "x", config, "official")
    spared = r"norm\.weight$|\.fn$|\.base$|\.scale$|attn_sink$|ape$|gate\.bias$"
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        for name, tensor in read(folder, config, dtype).items():
            want = torch.int64 if name.endswith("tid2eid") else kept if re.search(spared, name) else dtype
            assert tensor.dtype == want, name
    assert {t.dtype for t in read(folder, config).values()} == {torch.float32, torch.int64}


def edit(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    return folder


def test_tables_of_ids_may_be_int32_and_shared_copies_are_skipped(tmp_path):
    config = tiny()

    def change(tensors):
        tensors["layers.0.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"].int()
        tensors["mtp.0.head.weight"] = tensors["head.weight"].clone()
        tensors["mtp.0.emb.tok_emb.weight"] = tensors["embed.weight"].clone()

    assert_equal(read(edit(write(tmp_path / "x", config, "official"), change), config), made_up(config))


def test_missing_and_unexpected_tensors_are_listed_together(tmp_path):
    def change(tensors):
        del tensors["layers.1.attn.wq_a.weight"], tensors["layers.3.ffn.experts.4.w3.weight"]
        tensors["layers.1.attn.wq_x.weight"] = torch.zeros(1)

    folder = edit(write(tmp_path / "x", tiny(), "official"), change)
    words = (
        r"2 missing: layers.1.attn.wq_a.weight, layers.3.ffn.experts.4.w3.weight; "
        r"1 unexpected: layers.1.attn.wq_x.weight"
    )
    with pytest.raises(ValueError, match=words):
        read(folder, tiny())
    with pytest.raises(ValueError, match=r"17 missing: (\S+, ){9}\S+ and 7 more"):
        read(edit(folder, lambda t: [t.pop(k) for k in list(t) if ".experts.0." in k]), tiny())


@pytest.mark.parametrize(
    "layout, name, want",
    [
        ("official", "layers.2.ffn.experts.3.w2.weight", "(24, 7)"),
        ("official", "layers.2.attn.compressor.ape", "(8, 12)"),
        ("huggingface", "model.layers.2.mlp.experts.down_proj", "(5, 24, 7)"),
        ("huggingface", "mtp.0.e_proj.weight", "(24, 24)"),
    ],
)
def test_a_wrong_shape_is_named_with_both_shapes(tmp_path, layout, name, want):
    folder = edit(write(tmp_path / "x", tiny(), layout), lambda t: t.update({name: torch.zeros(3, 4)}))
    with pytest.raises(ValueError, match=re.escape(f"{name} has shape (3, 4): the configuration needs {want}")):
        read(folder, tiny())


def test_quantised_tensors_are_refused(tmp_path):
    def change(tensors):
        tensors["layers.0.attn.wq_a.weight"] = tensors["layers.0.attn.wq_a.weight"].to(torch.float8_e4m3fn)
        tensors["layers.0.attn.wq_a.scale"] = torch.ones(1, 1)

    sizes = {"head_dim": 68, "index_head_dim": 32, "hidden_size": 32, "moe_intermediate_size": 32}
    config = tiny(**sizes, quantization_config={"quant_method": "fp8"}, expert_dtype="fp4")
    folder = edit(write(tmp_path / "x", config, "official"), change)
    words = r"quantised \(fp8, experts fp4\): layers.0.attn.wq_a.weight are F8_E4M3.*not read yet"
    with pytest.raises(ValueError, match=words):
        read(folder, config)


def test_folders_without_what_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        huggingface._headers(tmp_path)
    folder = write(tmp_path / "x", tiny(), "official", limit=4096)
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(lost.name)):
        huggingface._headers(folder)
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        huggingface.load_pretrained(tmp_path)
    save_file({"wte.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"none of lm_head.weight, .*embed.weight: it has wte.weight"):
        read(tmp_path, tiny())


def test_saving_again_replaces_weights_and_keeps_other_files(tmp_path):
    config, folder = tiny(), tmp_path / "x"
    write(folder, config, "official", limit=4096)
    (folder / "tokenizer.json").write_text("{}")
    other = {name: tensor + 1 for name, tensor in made_up(config).items()}
    write(folder, config, "huggingface", other)
    assert {f.name for f in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert_equal(read(folder, config), other)
    write(folder, config, "official", limit=4096)
    assert not (folder / "model.safetensors").exists()
    assert_equal(read(folder, config), made_up(config))
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_a_failed_save_leaves_nothing_and_harms_nothing(tmp_path, monkeypatch):
    config = tiny()
    folder = write(tmp_path / "x", config, "official")
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("disk full")
        return save_file(*args, **kwargs)

    monkeypatch.setattr(huggingface, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write(folder, config, "huggingface", limit=4096)
    assert [f.name for f in tmp_path.iterdir()] == ["x"]
    assert_equal(read(folder, config), made_up(config))


def test_shards_respect_their_limit(tmp_path):
    folder = write(tmp_path / "x", tiny(), "official", limit=20_000)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(weight_map.values()):
        with safe_open(folder / file, "pt") as tensors:
            names = list(tensors.keys())
            size = sum(tensors.get_tensor(name).nbytes for name in names)
        assert size <= 20_000 or len(names) == 1, file
        assert {weight_map[name] for name in names} == {file}


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layout='gguf': allowed are 'huggingface', 'official'"):
        write(tmp_path / "x", tiny(), "gguf")


CONFIGS = {
    "tiny": tiny(),
    "yarn": tiny(rope_scaling={"factor": 16, "original_max_position_embeddings": 64, "beta_fast": 30, "beta_slow": 2}),
    "no mtp": tiny(num_nextn_predict_layers=0),
    "sliding": tiny(compress_ratios=[0] * 4, layer_types=[SLIDING] * 4),
    "null ids": tiny(bos_token_id=None, pad_token_id=3),
    "truncated product": tiny(head_dim=46, qk_rope_head_dim=26, index_head_dim=32),
    "bases": tiny(rope_theta=500.0, compress_rope_theta=777.0),
    "toy": replace(ModelConfig.load("toy"), engram=None),
    "long": ModelConfig.load("long"),
    "flash": replace(ModelConfig.load("v4-flash"), quantization_config=None, expert_dtype=None),
    "pro": replace(ModelConfig.load("v4-pro"), quantization_config=None, expert_dtype=None),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_configurations_pass_through_transformers(config):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DeepseekV4Config(**config_to_huggingface(config))
    assert theirs.qk_rope_head_dim == config.qk_rope_head_dim
    for written in (theirs.to_diff_dict(), theirs.to_dict()):
        assert ModelConfig.from_dict(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro"])
def test_transformers_version_of_a_released_configuration(name):
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.load(name)
    theirs = ModelConfig.from_dict(transformers.DeepseekV4Config(**config.to_dict()).to_diff_dict())
    assert replace(theirs, quantization_config=config.quantization_config) == config


def test_yarn_reaches_its_place():
    config = tiny(rope_scaling={"factor": 16, "original_max_position_embeddings": 64})
    written = config_to_huggingface(config)["rope_parameters"]
    assert written["main"]["rope_type"] == "default" and written["main"]["rope_theta"] == 10_000
    assert written["compress"]["rope_type"] == "yarn" and written["compress"]["attention_factor"] == 1.0
    assert config_from_huggingface(config_to_huggingface(config))["rope_scaling"]["factor"] == 16
    assert config.rope_scaling == RopeScaling(factor=16, original_max_position_embeddings=64)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mlp_layer_types": ["moe", "hash_moe", "moe", "moe"]}, r"mlp_layer_types=.*hash_moe layers first"),
        ({"mlp_layer_types": ["dense"] * 4}, r"mlp_layer_types=.*hash_moe layers first"),
        ({"mlp_bias": True}, r"mlp_bias=True: allowed is False"),
        ({"router_jitter_noise": 0.1}, r"router_jitter_noise=0.1: allowed is 0.0"),
        ({"compress_rates": {SPARSE: 4}}, rf"layer_types has '{HEAVY}': compress_rates has {SPARSE}"),
        ({"layer_types": None}, r"missing keys: layer_types"),
        (
            {"rope_parameters": {"compress": {"rope_type": "yarn", "attention_factor": 1.2}}},
            r"attention_factor.*only 1.0",
        ),
        ({"rope_parameters": {"main": {"rope_type": "yarn"}}}, r"rope_parameters.main.rope_type='yarn'"),
        ({"rope_parameters": {"compress": {"rope_type": "llama3"}}}, r"rope_type='llama3'"),
        ({"rope_parameters": {"compress": {"rope_type": "yarn", "factor": 2}}}, r"original_max_position_embeddings"),
        ({"scoring_func": "softmax"}, r"scoring_func='softmax'"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\]: allowed is int"),
    ],
)
def test_configurations_that_are_not_v4_are_refused(changes, words):
    with pytest.raises((ValueError, TypeError), match=words):
        ModelConfig.from_dict({**config_to_huggingface(tiny()), **changes})


@pytest.mark.parametrize(
    "config, words",
    [
        (tiny(n_shared_experts=2), r"n_shared_experts=2: the huggingface layout has exactly one"),
        (tiny(compress_ratios=[0, 4, 8, 8]), rf"{SPARSE} layers have the ratios \[4, 8\]"),
    ],
)
def test_configurations_that_transformers_cannot_hold_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        config_to_huggingface(config)


@pytest.fixture(scope="module")
def peer():
    """A transformers model of the tiny configuration."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**config_to_huggingface(tiny())))


@pytest.mark.parametrize("original, layout", [(True, "hybrid"), (False, "huggingface")])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_reads_what_transformers_writes(tmp_path, peer, original, layout, shard):
    peer.save_pretrained(tmp_path, save_original_format=original, max_shard_size=shard)
    stored = huggingface._headers(tmp_path)
    assert huggingface._layout_of(stored) == layout
    config = ModelConfig.load(tmp_path / "config.json")
    assert config == tiny()
    config = replace(config, num_nextn_predict_layers=0)
    state = read(tmp_path, config)
    theirs = peer.state_dict()
    for name, tensor in state.items():
        for source, index in sources(name, config, "huggingface").items():
            assert torch.equal(tensor[index], theirs[source]), source


def test_transformers_reads_what_is_written_here(tmp_path):
    transformers = pytest.importorskip("transformers")
    config, state = tiny(), made_up(tiny())
    folder = write(tmp_path / "x", config, "huggingface", state, limit=20_000)
    theirs, info = transformers.DeepseekV4ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    loaded = theirs.state_dict()
    for name, tensor in state.items():
        for source, index in sources(name, config, "huggingface").items():
            if not name.startswith("mtp."):
                assert torch.equal(loaded[source], tensor[index]), source


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_survives_saving_and_loading(tmp_path, layout):
    from abyssal.model.transformer import Transformer

    torch.manual_seed(0)
    model = Transformer(replace(tiny(), torch_dtype="bfloat16"))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == model_tensors(tiny())
    huggingface.save_pretrained(model, tmp_path / "x", layout=layout)
    loaded = huggingface.load_pretrained(tmp_path / "x")
    assert loaded.config == tiny()  # torch_dtype says what was written
    assert_equal(loaded.state_dict(), model.state_dict())
    assert all(p.requires_grad for p in loaded.parameters()) and not any(p.is_meta for p in loaded.parameters())
    half = huggingface.load_pretrained(tmp_path / "x", dtype=torch.bfloat16)
    huggingface.save_pretrained(loaded.double(), tmp_path / "double", layout=layout)
    assert ModelConfig.load(tmp_path / "double" / "config.json").torch_dtype == "float64"
    kinds = {name: p.dtype for name, p in half.named_parameters()}
    assert kinds["embed.weight"] == torch.bfloat16 and kinds["layers.0.hc_attn.fn"] == torch.float32


def test_a_checkpoint_without_mtp_loads_as_a_model_without_it(tmp_path, peer):
    peer.save_pretrained(tmp_path)
    model = huggingface.load_pretrained(tmp_path)
    assert model.config == replace(tiny(), num_nextn_predict_layers=0) and len(model.mtp) == 0

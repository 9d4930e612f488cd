"""The configuration: what ships, what loads, what is refused and with which words."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path

import pytest
from hostile import answers, configurations

from abyssal.model.config import EngramConfig, ModelConfig, QuantizationAware, RopeScaling, read_recipe
from abyssal.model.kinds import HEAVY, SLIDING, SPARSE
from abyssal.model.lineage import LineageConfig

NAMES = ("nano", "toy", "small", "long", "v4-flash", "v4-pro")


def nano(**changes):
    return {**ModelConfig.load("nano").to_dict(), **changes}


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configurations_survive_a_round_trip(name):
    config = ModelConfig.load(name)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(ModelConfig.load(name))


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro"])
def test_released_json_is_reproduced_key_by_key(name):
    text = (resources.files("abyssal.configs") / f"{name}.json").read_text("utf-8")
    assert ModelConfig.load(name).to_dict() == json.loads(text)


def test_released_layer_plans():
    flash, pro = ModelConfig.load("v4-flash"), ModelConfig.load("v4-pro")
    assert flash.layer_types == (SLIDING,) * 2 + (SPARSE, HEAVY) * 20 + (SPARSE, SLIDING)
    assert pro.layer_types == (HEAVY,) * 2 + (SPARSE, HEAVY) * 29 + (SPARSE, SLIDING)
    assert [flash.layer_kind(i) for i in (0, 2, 3, 42, 43)] == [SLIDING, SPARSE, HEAVY, SPARSE, SLIDING]
    assert [flash.compress_ratio(i) for i in (0, 2, 3, 42, 43)] == [0, 4, 128, 4, 0]
    assert [flash.is_hash(i) for i in (0, 2, 3, 43)] == [True, True, False, False]


def test_released_sizes():
    flash, pro = ModelConfig.load("v4-flash"), ModelConfig.load("v4-pro")
    differ = {
        "hidden_size": (4096, 7168),
        "num_hidden_layers": (43, 61),
        "num_attention_heads": (64, 128),
        "q_lora_rank": (1024, 1536),
        "o_groups": (8, 16),
        "index_topk": (512, 1024),
        "n_routed_experts": (256, 384),
        "moe_intermediate_size": (2048, 3072),
        "routed_scaling_factor": (1.5, 2.5),
    }
    for key, values in differ.items():
        assert (getattr(flash, key), getattr(pro, key)) == values, key
    for config in (flash, pro):
        assert (config.rope_theta, config.compress_rope_theta, config.max_position_embeddings) == (1e4, 1.6e5, 2**20)
        assert config.rope_scaling == RopeScaling(factor=16, original_max_position_embeddings=65536)
        assert (config.hc_mult, config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps) == (4, 20, 1e-6, 1e-6)
        assert (config.num_hash_layers, config.num_experts_per_tok, config.swiglu_limit) == (3, 6, 10)


def test_the_small_recipes_have_every_mechanism():
    config = ModelConfig.load("nano")
    assert {SLIDING, SPARSE, HEAVY} <= set(config.layer_types[:-1]) and config.num_nextn_predict_layers == 1
    assert 0 < config.num_hash_layers < config.num_hidden_layers and config.engram and config.rope_scaling
    long, flash = ModelConfig.load("long"), ModelConfig.load("v4-flash")
    assert {SPARSE, HEAVY} <= set(long.layer_types) and set(long.compress_ratios) == {0, 4, 128}
    for key in ("sliding_window", "index_topk", "rope_scaling", "rope_theta", "compress_rope_theta"):
        assert getattr(long, key) == getattr(flash, key), key


def test_load_reads_paths_and_folders(tmp_path):
    config = ModelConfig.load("nano")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()), "utf-8")
    assert ModelConfig.load(tmp_path) == ModelConfig.load(tmp_path / "config.json") == config
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f"[model]\n{_toml(config.to_dict())}", "utf-8")
    assert ModelConfig.load(str(recipe)) == config
    assert set(read_recipe(recipe)) == {"model"}


def _toml(values):
    plain = [f"{k} = {json.dumps(v)}" for k, v in values.items() if v is not None and not isinstance(v, dict)]
    tables = [f"[model.{k}]\n{_toml(v)}" for k, v in values.items() if isinstance(v, dict)]
    return "\n".join(plain + tables)


def test_load_names_what_ships(tmp_path):
    with pytest.raises(ValueError, match=r"'tooy'.*indexer, .*nano, .*small, .*toy, v4-flash, v4-pro"):
        ModelConfig.load("tooy")
    with pytest.raises(ValueError, match="otherwise give"):
        ModelConfig.load(tmp_path)
    (tmp_path / "r.toml").write_text("[optim]\nlr = 1", "utf-8")
    with pytest.raises(ValueError, match=r"needs a table \[model\]; it has optim"):
        ModelConfig.load(tmp_path / "r.toml")


def test_layer_types_may_be_explicit():
    base = nano(num_hidden_layers=4, compress_ratios=[0, 8, 8, 4])
    assert ModelConfig.from_dict(base).layer_types == (SLIDING, HEAVY, HEAVY, SPARSE, SLIDING)
    config = ModelConfig.from_dict({**base, "layer_types": [SLIDING, SPARSE, HEAVY, HEAVY]})
    assert config.layer_types == (SLIDING, SPARSE, HEAVY, HEAVY, SLIDING)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_the_mtp_tail_is_optional():
    short, long = nano(compress_ratios=[0, 4, 16, 4, 16]), nano(compress_ratios=[0, 4, 16, 4, 16, 0])
    assert ModelConfig.from_dict(short) == ModelConfig.from_dict(long)
    without = replace(ModelConfig.from_dict(long), num_nextn_predict_layers=0)
    assert without.compress_ratios == (0, 4, 16, 4, 16) and len(without.layer_types) == 5
    assert ModelConfig.from_dict(without.to_dict()) == without


def test_null_is_kept_where_the_default_is_a_number():
    config = ModelConfig.from_dict(nano(bos_token_id=None, eos_token_id=None, pad_token_id=None))
    assert config.bos_token_id is None and ModelConfig.from_dict(config.to_dict()) == config


REFUSED = {
    "unknown": ({"hiden_size": 64}, r"unknown key 'hiden_size'.*'hidden_size'"),
    "unknown nested": ({"rope_scaling": {"facto": 2}}, r"'rope_scaling.facto'.*'rope_scaling.factor'"),
    "activation": ({"hidden_act": "gelu"}, r"hidden_act='gelu': allowed is 'silu'"),
    "tied": ({"tie_word_embeddings": True}, r"tie_word_embeddings=True: allowed is False"),
    "kv heads": ({"num_key_value_heads": 2}, r"num_key_value_heads=2: allowed is 1"),
    "bias": ({"attention_bias": True}, r"attention_bias=True: allowed is False"),
    "dropout": ({"attention_dropout": 0.1}, r"attention_dropout=0.1: allowed is 0.0"),
    "scores": ({"scoring_func": "sigmoid"}, r"scoring_func='sigmoid': allowed is 'sqrtsoftplus'"),
    "selection": ({"topk_method": "greedy"}, r"topk_method='greedy': allowed is 'noaux_tc'"),
    "unnormalised": ({"norm_topk_prob": False}, r"norm_topk_prob=False: allowed is True"),
    "groups": ({"o_groups": 3}, r"num_attention_heads=4: allowed is a multiple of o_groups=3"),
    "odd rope": ({"qk_rope_head_dim": 15}, r"qk_rope_head_dim=15: allowed is an even number"),
    "wide rope": ({"qk_rope_head_dim": 34}, r"qk_rope_head_dim=34: .*head_dim=32"),
    "wide index rope": ({"index_head_dim": 8}, r"qk_rope_head_dim=16: .*index_head_dim=8"),
    "experts": ({"num_experts_per_tok": 9}, r"num_experts_per_tok=9: allowed is up to n_routed_experts=8"),
    "counted picks": ({"balance_picks": "best"}, r"balance_picks='best': allowed is 'biased' or 'unbiased'"),
    "bias rule": ({"router_bias_rule": "sgn"}, r"router_bias_rule='sgn': allowed is 'sign' or 'quantile'"),
    "bias share": (
        {"router_bias_rule": "quantile", "router_bias_update_speed": 2},
        r"router_bias_update_speed=2.0: allowed is a share of the way, up to 1",
    ),
    "top-k": ({"index_topk": 0}, r"index_topk=0: allowed is positive"),
    "streams": ({"hc_mult": 9}, r"hc_mult=9: allowed is 1 to 8"),
    "no streams": ({"hc_mult": 0}, r"hc_mult=0: allowed is 1 to 8"),
    "mtp depth": ({"num_nextn_predict_layers": 2}, r"num_nextn_predict_layers=2: allowed is 0 or 1"),
    "negative ratio": ({"compress_ratios": [0, -4, 16, 4, 16]}, r"compress_ratios\[1\]=-4"),
    "few ratios": ({"compress_ratios": [0, 4]}, r"compress_ratios has 2 values: allowed are num_hidden_layers=5"),
    "mtp ratio": ({"compress_ratios": [0, 4, 16, 4, 16, 4]}, r"compress_ratios\[5\]=4: allowed is 0, the MTP"),
    "text for a table": ({"rope_parameters": "x"}, r"rope_parameters='x': allowed is a table of rope_theta, rope_type"),
    "no type": (
        {"rope_scaling": {"factor": 2, "original_max_position_embeddings": 9}},
        r"rope_scaling.type=None: allowed is 'yarn'",
    ),
    "width": (
        {"partial_rotary_factor": 0.25},
        r"partial_rotary_factor=0.25: allowed is qk_rope_head_dim=16 of head_dim",
    ),
    "temperature": (
        {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 9, "attention_factor": 1.5}},
        r"rope_scaling.attention_factor=1.5: allowed is only 1.0",
    ),
    "base": ({"compress_rope_theta": 1}, r"compress_rope_theta=1.0: allowed is positive numbers above 1"),
    "int8": (
        {"quantization_config": {"quant_method": "int8"}},
        r"quantization_config.quant_method='int8': allowed is 'fp8'",
    ),
    "blocks": (
        {"quantization_config": {"weight_block_size": [1, 128]}},
        r"weight_block_size=\[1, 128\]: allowed is \[128",
    ),
    "two ends": ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\]: allowed is int, .* give to `generate` as `stop`"),
    "huge": ({"n_routed_experts": 10**30}, r"n_routed_experts=1000.*: allowed is an integer of 64 bits"),
    "layer name": ({"layer_types": ["full_attention"] * 5}, r"layer_types\[0\]='full_attention'.*sliding_attention"),
    "layer clash": (
        {"layer_types": [SPARSE] * 5},
        r"compress_ratios\[0\]=0: allowed is positive, because layer_types",
    ),
    "hash layers": ({"num_hash_layers": 6}, r"num_hash_layers=6: allowed is up to num_hidden_layers=5"),
    "bos": ({"bos_token_id": 260}, r"bos_token_id=260: allowed is 0 to vocab_size - 1 = 259"),
    "eos": ({"eos_token_id": -1}, r"eos_token_id=-1"),
    "yarn": (
        {"rope_scaling": {"type": "linear", "factor": 2, "original_max_position_embeddings": 9}},
        r"type='linear'.*yarn",
    ),
    "yarn keys": ({"rope_scaling": {"factor": 2}}, r"missing keys: rope_scaling.original_max_position_embeddings"),
    "yarn betas": (
        {"rope_scaling": {"factor": 2, "original_max_position_embeddings": 9, "beta_fast": 1}},
        r"rope_scaling.beta_fast=1.0: allowed is more than beta_slow=1.0",
    ),
    "engram layer": (
        {"engram": {"layers": [5], "head_dim": 8, "vocab_size": 99}},
        r"engram.layers=\[5\]: allowed is 0 to",
    ),
    "engram twice": (
        {"engram": {"layers": [1, 1], "head_dim": 8, "vocab_size": 99}},
        r"engram.layers=\(1, 1\).*distinct",
    ),
    "engram order": (
        {"engram": {"layers": [1], "head_dim": 8, "vocab_size": 99, "max_ngram": 1}},
        r"engram.max_ngram=1: allowed is integers >= 2",
    ),
    "engram classes": (
        {"engram": {"layers": [1], "head_dim": 8, "vocab_size": 99, "canonical_vocab_size": 261}},
        r"engram.canonical_vocab_size=261: allowed is 1 to vocab_size=260",
    ),
    "weight": ({"mtp_loss_weight": -0.1}, r"mtp_loss_weight=-0.1: allowed is numbers >= 0"),
    "infinite": ({"rope_theta": float("inf")}, r"rope_theta=inf: allowed are finite"),
    "dtype": ({"torch_dtype": "float8"}, r"torch_dtype='float8': allowed is float64, float32"),
    "fp8 head": ({"quantization_config": {}}, r"head_dim=32: allowed is qk_rope_head_dim=16 plus a multiple of 64"),
    "hadamard": (
        {"quantization_config": {}, "head_dim": 80, "index_head_dim": 96},
        r"index_head_dim=96: allowed is a power of two and a multiple of 32",
    ),
    "fp4 groups": (
        {"quantization_config": {}, "head_dim": 80, "expert_dtype": "fp4", "moe_intermediate_size": 48},
        r"moe_intermediate_size=48: allowed is a multiple of 32",
    ),
}


@pytest.mark.parametrize("changes, words", REFUSED.values(), ids=REFUSED.keys())
def test_refusals_name_key_value_and_what_is_allowed(changes, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_dict(nano(**changes))


@pytest.mark.parametrize("key", ["hidden_size", "head_dim", "sliding_window", "vocab_size", "swiglu_limit", "hc_eps"])
def test_sizes_are_positive(key):
    with pytest.raises(ValueError, match=f"{key}=0.*allowed is positive"):
        ModelConfig.from_dict(nano(**{key: 0}))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"vocab_size": "260"}, "vocab_size='260': allowed is int, not str"),
        ({"hidden_size": 64.0}, "hidden_size=64.0: allowed is int, not float"),
        ({"hc_mult": True}, "hc_mult=True: allowed is int, not bool"),
        ({"compress_ratios": 4}, "compress_ratios=4: allowed is a list of int"),
        ({"compress_ratios": [0, 4, 16, 4, "16"]}, r"compress_ratios\[4\]='16': allowed is int"),
    ],
)
def test_types_are_checked(changes, words):
    with pytest.raises(TypeError, match=words):
        ModelConfig.from_dict(nano(**changes))


def test_a_key_is_suggested_only_where_it_is_near():
    with pytest.raises(ValueError, match=r"'n_layer': none is near; abyssal recipe NAME --all lists them$"):
        ModelConfig.from_dict(nano(n_layer=5))
    with pytest.raises(ValueError, match=r"nearest known key is 'num_hash_layers' or 'num_hidden_layers'$"):
        ModelConfig.from_dict(nano(num_layers=5))
    with pytest.raises(ValueError, match=r"'engram.rows': known are layers, head_dim, vocab_size"):
        ModelConfig.from_dict(nano(engram={"rows": 5}))


@pytest.mark.parametrize("kind", [ModelConfig, EngramConfig, RopeScaling, QuantizationAware])
def test_every_key_has_a_meaning(kind):
    assert all(len(f.metadata["meaning"]) > 5 for f in fields(kind))


@pytest.mark.parametrize("key", ["engram", "rope_scaling", "pad_token_id", "mlp_layer_types"])
def test_none_is_no_value_where_there_may_be_none(key):
    assert getattr(ModelConfig.from_dict(nano(**{key: "none"})), key) is None
    with pytest.raises(TypeError, match="hidden_size"):
        ModelConfig.from_dict(nano(hidden_size="none"))
    engram = {**nano()["engram"], "canonical_vocab_size": "none"}
    assert ModelConfig.from_dict(nano(engram=engram)) == ModelConfig.load("nano")


def test_a_recipe_lies_over_its_base(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.toml").write_text(
        'base = "nano"\n[model]\nhc_mult = 2\ncompress_ratios = [0, 16, 16, 16, 16]'
    )
    (tmp_path / "b.toml").write_text('base = "sub/a.toml"\n[model]\nengram = "none"\n[optim]\nlr = 1.0')
    (tmp_path / "c.toml").write_text('base = "b.toml"\n[model.rope_scaling]\nfactor = 2')
    nano, found = read_recipe("nano"), read_recipe(tmp_path / "c.toml")
    assert found["optim"] == {**nano["optim"], "lr": 1.0} and found["data"] == nano["data"]
    assert found["model"]["compress_ratios"] == [0, 16, 16, 16, 16]
    assert found["model"]["rope_scaling"] == {**nano["model"]["rope_scaling"], "factor": 2}
    config = ModelConfig.load(tmp_path / "c.toml")
    assert config.engram is None and config.hc_mult == 2 and config.head_dim == 32


def test_recipes_that_are_each_others_base_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, base in (("a", "b.toml"), ("b", "./a.toml"), ("c", "tooy"), ("d", "c.toml")):
        Path(f"{name}.toml").write_text(f'base = "{base}"')
    with pytest.raises(ValueError, match=r"where it began: a\.toml -> b\.toml -> a\.toml$"):
        read_recipe("a.toml")
    with pytest.raises(ValueError, match=r"c\.toml: 'tooy' is no configuration: did you mean 'toy'\?"):
        read_recipe("d.toml")
    Path("c.toml").write_text("base = 3")
    with pytest.raises(ValueError, match=r"c\.toml: base=3: allowed is the name or the path of a recipe"):
        read_recipe("c.toml")


def test_missing_keys_are_listed():
    values = nano()
    del values["head_dim"], values["routed_scaling_factor"]
    with pytest.raises(ValueError, match="missing keys: head_dim, routed_scaling_factor"):
        ModelConfig.from_dict(values)


def test_sizes_have_no_silent_default():
    """A key in which the released models differ is never filled in."""
    flash, pro = ModelConfig.load("v4-flash").to_dict(), ModelConfig.load("v4-pro").to_dict()
    for key in (key for key in flash if flash[key] != pro[key]):
        with pytest.raises(ValueError, match=f"missing keys: {key}"):
            ModelConfig.from_dict({k: v for k, v in flash.items() if k != key})


def test_engram_defaults_and_round_trip():
    engram = EngramConfig(layers=(1, 3), head_dim=8, vocab_size=500, canonical_vocab_size=200)
    assert (engram.max_ngram, engram.heads, engram.kernel_size, engram.seed) == (3, 8, 4, 0)
    config = replace(ModelConfig.load("nano"), engram=engram)
    assert ModelConfig.from_dict(config.to_dict()).engram == engram
    assert "engram" not in ModelConfig.load("long").to_dict()


TEXTS = {
    "a list": (b"[]", r"\[\] is no JSON object"),
    "text": (b'"x"', "'x' is no JSON object"),
    "nothing": (b"", "Expecting value"),
    "cut": (b'{"hidden_size": 6', "delimiter"),
    "UTF-16": ('{"hidden_size": 6}'.encode("utf-16"), "utf-8"),
    "a mark": (b"\xef\xbb\xbf{}", "BOM"),
    "twice": (b'{"hidden_size": 6, "hidden_size": 7}', "'hidden_size' is there twice"),
    "twice inside": (b'{"rope_scaling": {"factor": 6, "factor": 7}}', "'factor' is there twice"),
    "deep": (b'{"hidden_size": ' + b"[" * 100_000, "nested too deeply"),
    "digits": (b'{"hidden_size": ' + b"9" * 5000 + b"}", "digits"),
}


@pytest.mark.parametrize("kind", [ModelConfig, LineageConfig])
@pytest.mark.parametrize("text, words", TEXTS.values(), ids=TEXTS.keys())
def test_a_file_that_is_no_configuration_is_named(kind, text, words, tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=words) as caught:
        kind.load(path)
    assert "some.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_that_is_no_toml_is_named(tmp_path):
    (tmp_path / "some.toml").write_text("[model]\nvocab_size = 1\nvocab_size = 2", "utf-8")
    with pytest.raises(ValueError, match=r"some\.toml: Cannot overwrite"):
        ModelConfig.load(tmp_path / "some.toml")


def test_an_error_of_a_file_names_it_and_the_key(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(nano(hidden_size="64")), "utf-8")
    with pytest.raises(TypeError, match=r"config\.json: hidden_size='64': allowed is int, not str"):
        ModelConfig.load(tmp_path / "config.json")


@pytest.mark.parametrize("name, kind, data", list(configurations()), ids=[name for name, *_ in configurations()])
def test_hostile_values_are_taken_or_refused_by_key(name, kind, data):
    found = list(answers(kind, data))
    assert not [(path, value, wrong) for path, value, wrong, _ in found if wrong]
    assert 50 < sum(taken for *_, taken in found) < len(found) / 5


def test_order_of_routers():
    kinds = ["moe", "hash_moe", "moe", "hash_moe", "moe"]
    config = ModelConfig.from_dict(nano(mlp_layer_types=kinds))
    assert [config.is_hash(layer) for layer in range(6)] == [False, True, False, True, False, False]
    assert config.num_hash_layers == 2 and ModelConfig.from_dict(config.to_dict()) == config
    first = ModelConfig.from_dict(nano(mlp_layer_types=["hash_moe", "moe", "moe", "moe", "moe"]))
    assert first == ModelConfig.from_dict(nano(num_hash_layers=1)) and first.mlp_layer_types is None
    with pytest.raises(ValueError, match=r"num_hash_layers=1: allowed is 2, as in mlp_layer_types"):
        replace(config, num_hash_layers=1)
    with pytest.raises(ValueError, match=r"len\(mlp_layer_types\)=2: allowed is num_hidden_layers=5"):
        ModelConfig.from_dict(nano(mlp_layer_types=["moe"] * 2))


def test_no_torch_is_needed_for_a_configuration_or_its_accounting():
    """`model/__init__.py` may bring torch in; the two files themselves must not."""
    code = """
import sys, types
import abyssal
package = types.ModuleType("abyssal.model")
package.__path__ = [f"{path}/model" for path in abyssal.__path__]
sys.modules["abyssal.model"] = package
from abyssal.model import accounting, config
accounting.account(config.ModelConfig.load("v4-flash"), 4096).table()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)

"""Every key of transformers' configurations, changed: transformers' logits, or an error that names the key.

One key of a config.json is changed: another value, gone, or added. transformers makes its model of that, whose weights
are stored beside it. Read here, the folder gives the same logits or is refused. The keys are those of the classes
themselves: one that a later transformers adds is walked too, and fails where no other value of it is known.
"""

import copy
import dataclasses
import functools
import json
from typing import get_type_hints
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from abyssal.model import ModelConfig, load_pretrained
from abyssal.model.kinds import HEAVY, SLIDING, SPARSE
from abyssal.model.lineage import LineageConfig

transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 16}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
V3 = {
    **{"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "moe_intermediate_size": 24},
    **{"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4},
    **{"q_lora_rank": 32, "kv_lora_rank": 40, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "rope_parameters": YARN},
}
V4 = {
    **{"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 32, "partial_rotary_factor": 0.5},
    **{"q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 16, "index_head_dim": 32},
    **{"index_topk": 5, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    **{"num_hidden_layers": 3, "mlp_layer_types": ["hash_moe", "moe", "moe"], "sliding_window": 8, "hc_mult": 2},
    **{"layer_types": [SLIDING, SPARSE, HEAVY], "compress_rates": {SPARSE: 4, HEAVY: 8}},
    "rope_parameters": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16},
}
SIZES = {"DeepseekV3": V3, "DeepseekV32": {**V3, "index_n_heads": 64, "index_head_dim": 16, "index_topk": 9}}
SIZES["DeepseekV4"] = V4
GONE = "(gone)"
IDS = torch.randint(0, 48, (1, 40), generator=torch.Generator().manual_seed(0))

# What a key may say besides numbers, which are doubled and halved, and flags, which are turned.
OTHERS = {
    "hidden_act": ["gelu", "relu"],
    "scoring_func": ["softmax", "sigmoid"],
    "topk_method": ["greedy", "group_limited_greedy"],
    "rope_type": ["default", "yarn", "linear", "dynamic", "longrope", "llama3", "proportional"],
    "type": ["default", "yarn", "linear", "dynamic"],
    "dtype": ["bfloat16", "float64", "int8"],
    "torch_dtype": ["bfloat16", "float64", "int8"],
    "model_type": ["deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "llama"],
    "architectures": [["DeepseekV3ForCausalLM"], ["DeepseekV4Model"], []],
    "transformers_version": ["4.0.0"],
    "problem_type": ["regression"],
    "id2label": [{"0": "a"}],
    "label2id": [{"a": 0}],
    "pad_token_id": [0, 96, 97],
    "eos_token_id": [2, [2], [1, 2], None],
    "bos_token_id": [2, None],
    "mlp_layer_types": [
        *(["dense", "sparse"], ["sparse", "dense"], ["dense"] * 2, ["sparse"] * 2, ["sparse"] * 3),
        *(["moe", "hash_moe", "moe"], ["moe", "moe", "hash_moe"], ["moe"] * 3, ["hash_moe"] * 3, ["moe"] * 2, []),
    ],
    "layer_types": [
        *([SPARSE, SLIDING, HEAVY], [HEAVY] * 3, [SLIDING] * 3, [SPARSE] * 2, ["full_attention"] * 3),
        *(["indexed_attention"] * 2, ["full_attention"] * 2, [SLIDING, "full_attention"]),
    ],
    "compress_ratios": [[0, 4, 4, 0], [4, 128, 0], [0, 4], [0, 4, 128, 4]],
    "quantization_config": [{"quant_method": "int8"}, {"quant_method": "fp8", "weight_block_size": [64, 64]}],
    "rope_parameters": [
        *(None, {}, {"rope_type": "default"}, {"rope_type": "default", "factor": 4.0}, YARN, {**YARN, "mscale": 0.707}),
        *({"rope_type": "linear", "factor": 2.0}, {**YARN, "type": "linear"}, {**YARN, "rope_theta": 500.0}),
        {"main": {"rope_type": "default", "rope_theta": 500.0}},
        {"compress": {"rope_type": "default", "rope_theta": 500.0}, "rope_type": "default"},
    ],
    "rope_scaling": [None, {}, {"type": "default"}, {"type": "linear", "factor": 2.0}, {"factor": 4.0}, YARN],
    "per_layer_config": [{}, {"1": {"sliding_window": 4}}, {"1": {"rms_norm_eps": 0.1}}],
    "mscale": [0.707, 0.0, None, 2],
    "mscale_all_dim": [0.707, 0.0, None, 2],
    "attention_factor": [1.5, 1.0, None],
    "truncate": [False, True],
    "partial_rotary_factor": [0.25, 0.5, 1.0, None],
    "short_factor": [[1.0] * 4],
    "long_factor": [[1.0] * 4],
    "mrope_section": [[1, 2, 1]],
    "low_freq_factor": [1.0],
    "high_freq_factor": [4.0],
    "compress_rates": [None, {SPARSE: 4}, {SPARSE: 8, HEAVY: 8}, {SPARSE: 4, HEAVY: 16, SLIDING: 2}],
    "num_mtp_layers": [0, 2],
    "output_attentions": [True],
    "num_labels": [3],
    "tie_last_hidden_states": [True],
}
# Keys that the classes read without declaring them.
UNDECLARED = (
    "per_layer_config",
    "num_labels",
    "compress_ratios",
    "compress_rate_csa",
    "compress_rate_hca",
    "num_experts",
)
UNDECLARED += ("num_hash_layers", "qk_rope_head_dim", "rope_scaling", "torch_dtype", "head_dim", "qk_head_dim")
UNDECLARED += ("layer_types", "mlp_layer_types", "topk_method", "scoring_func", "quantization_config", "model_type")
UNDECLARED += ("original_max_position_embeddings", "rope_theta", "partial_rotary_factor", "output_attentions")
ADDED = {"compress_rate_csa": 8, "compress_rate_hca": 16, "num_experts": 4, "num_hash_layers": 2, "rope_theta": 500.0}
ADDED |= {"num_local_experts": 4, "intermediate_size": 16, "beta_fast": 16.0, "beta_slow": 2.0, "factor": 4.0}
ADDED |= {"qk_rope_head_dim": 8, "head_dim": 16, "qk_head_dim": 12, "original_max_position_embeddings": 32}


def own(kind):
    return getattr(transformers, f"{kind}Config")


@functools.cache
def written(kind, form):
    """A config.json as transformers writes it, or in the keys of the release."""
    made = json.loads(own(kind)(**SIZES[kind], max_position_embeddings=4096).to_json_string())
    if form == "made":
        return made
    if kind != "DeepseekV4":
        return {**LineageConfig.from_dict(made).to_dict(), "quantization_config": None}
    rates = {"compress_rates": {SPARSE: 4, HEAVY: 128}}
    return ModelConfig.from_dict({**made, **rates}).to_dict()


def paths(kind, form):
    """Of every key that is there, that the class declares, and that its rotary tables may have."""
    data, declared = written(kind, form), own(kind)
    names = {f.name for f in dataclasses.fields(declared)} | set(declared.attribute_map) | set(UNDECLARED)
    found = {(key,) for key in names | set(data)}
    for key in ("rope_parameters", "rope_scaling"):
        table = data.get(key) or {}
        branches = [(key, branch) for branch in ("main", "compress") if branch in table] or [(key,)] * bool(table)
        inner = set(get_type_hints(rope_utils.RopeParameters)) | {"type"}
        found |= {(*branch, name) for branch in branches for name in inner} | {
            (*branch, "rope_theta") for branch in branches
        }
    found |= {("compress_rates", kind) for kind in data.get("compress_rates") or ()}
    if form == "release":
        made = paths(kind, "made")
        found = {path for path in found if path not in made or path[-1].startswith(("rope", "compress", "partial"))}
    return sorted(found)


def values_of(path, value):
    key = path[-1]
    if key in OTHERS:
        return OTHERS[key]
    if value is None and key in ADDED:
        return [ADDED[key]]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value, value // 2] if value > 1 else [value + 1]
    if isinstance(value, float):
        return [value / 2 or 0.5]
    if isinstance(value, dict):
        return [{}, None]
    return pytest.fail(f"{path}: no other value is known than {value!r}")


def changed(data, path, value):
    data = copy.deepcopy(data)
    table = data
    for key in path[:-1]:
        table = table[key]
    if value == GONE:
        table.pop(path[-1], None)
    else:
        table[path[-1]] = value
    return data


def at(data, path):
    return functools.reduce(lambda table, key: table.get(key) if table else None, path, data)


def ours(kind, data):
    return (ModelConfig if kind == "DeepseekV4" else LineageConfig).from_dict(data)


def theirs(kind, data, folder):
    """transformers' model of a config.json, its weights stored beside that, its logits; the config.json it makes."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data), "utf-8")
    made = own(kind).from_pretrained(folder)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(made).float().eval()
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "tid2eid" in key:
            tensor.random_(made.n_routed_experts)
        elif "inv_freq" not in key:
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            torch.nn.init.normal_(tensor, mean=centre, std=0.15 if tensor.ndim > 1 else 0.1)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    return model(IDS, return_dict=True).logits, json.loads(made.to_json_string())


def apart(folder, want):
    """How far the logits are of what is read here, as a share of theirs; what is read needs no first values."""
    with mock.patch.object(torch.nn.init, "normal_"):
        model = load_pretrained(folder)
    return float((model(IDS).logits - want).abs().max() / want.std())


@torch.no_grad()
def judge(kind, data, path, folder):
    """ "refused", "alone" (transformers has no such model) or "same"; anything else is an error."""
    try:
        config = ours(kind, data)
    except (TypeError, ValueError) as error:
        value = at(data, path)
        named = [path[-1], *(value if isinstance(value, dict) else ())]
        assert any(key in str(error) for key in named) and "\n" not in str(error), error
        return "refused"
    try:
        want, made = theirs(kind, data, folder)
    except Exception:
        return "alone"
    assert apart(folder, want) < 1e-4, f"{path}: other logits"
    if ours(kind, made) != config:
        (folder / "config.json").write_text(json.dumps(made), "utf-8")
        assert apart(folder, want) < 1e-4, f"{path}: other logits as transformers writes it"
    return "same"


@pytest.mark.parametrize("form", ["made", "release"])
@pytest.mark.parametrize("kind", SIZES)
def test_nothing_changed(kind, form, tmp_path):
    assert judge(kind, written(kind, form), ("",), tmp_path) == "same"


KEYS = [(kind, form, path) for kind in SIZES for form in ("made", "release") for path in paths(kind, form)]


@pytest.mark.parametrize(("kind", "form", "path"), KEYS, ids=lambda x: ".".join(x) if isinstance(x, tuple) else x)
def test_a_key_that_is_changed(kind, form, path, tmp_path):
    data = written(kind, form)
    value = at(data, path)
    if value is None and path[0] in {f.name for f in dataclasses.fields(own(kind))} and len(path) == 1:
        value = getattr(own(kind)(**SIZES[kind]), path[0])
    others = [*values_of(path, value), *[GONE] * (at(data, path[:-1]) is not None and path[-1] in at(data, path[:-1]))]
    for other in others:
        judge(kind, changed(data, path, other), path, tmp_path)

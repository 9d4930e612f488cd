"""Checkpoint interchange: config.json and safetensors shards, in the layouts that transformers and DeepSeek write.

    layout         tensor names                                          written by
    official       layers.0.attn.wq_a.weight, mtp.0.*                    DeepSeek, and here
    huggingface    model.layers.0.self_attn.q_a_proj.weight              transformers with its own names, and here
    hybrid         model.layers.0.attn.wq_a.weight                       transformers by default

Which one a folder holds is found out from the names. This project's model stacks an expert layer's matrices (w13: W1
above W3, for all experts), the release stores them one by one; everything else differs in name only. One function,
`sources`, says under which names a layout stores a tensor and which part of it each holds; both directions follow it.
transformers has no place for the MTP block and ignores `mtp.*`: it is written with its official names, and a checkpoint
without it loads as a model without it.

L layers · E experts · n expert width
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import HEAVY, SLIDING, SPARSE, ModelConfig

if TYPE_CHECKING:
    from .transformer import Transformer

Index = tuple[int | slice, ...]

_MARKS = {"lm_head.weight": "huggingface", "model.embed_tokens.weight": "hybrid", "embed.weight": "official"}
_SAVED = ("huggingface", "official")
_WEIGHTS, _SHARDS = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32"}
_FLOAT32 = re.compile(r"(norm(\.weight)?|\.(fn|base|scale|attn_sink|ape)|gate\.bias)$")
_SHARED_COPIES = re.compile(r"mtp\.\d+\.(emb\b.*|embed\b.*|head\.weight)$")

_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.experts.w13": "mlp.experts.gate_up_proj",
    "ffn.experts.w2": "mlp.experts.down_proj",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    **{f"hc_{site}.{part}": f"{site}_hc.{part}" for site in ("attn", "ffn") for part in ("fn", "base", "scale")},
}
_ENDS = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    **{f"hc_head.{part}": f"model.hc_head.hc_{part}" for part in ("fn", "base", "scale")},
}


def load_pretrained(
    folder: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> "Transformer":
    """The model in a folder with config.json and safetensors shards, in any of the three layouts.

    Tensors go shard by shard straight to `device` (default: the CPU). `dtype` None keeps the file's types; otherwise
    floating tensors are cast, but norms, mHC, sinks, slot biases and gate biases to float32 at least.

    Raises:
        FileNotFoundError: the folder has no config.json or no safetensors weights, or a shard is missing.
        ValueError: names of no known layout, missing or unexpected tensors (up to ten of each are named), a tensor of
            another shape, quantised tensors, or a configuration that is refused.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json")
    from .transformer import Transformer  # here, so that reading a configuration does not import the model

    config = ModelConfig.load(folder / "config.json")
    stored = _headers(folder)
    if not any(name.startswith("mtp.") for name in stored):
        config = replace(config, num_nextn_predict_layers=0)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = _read(stored, shapes, config, torch.device(device or "cpu"), dtype)
    model.load_state_dict(state, assign=True)
    return model


def save_pretrained(
    model: "Transformer", folder: str | Path, layout: str = "huggingface", max_shard_size: int = 5 * 10**9
) -> None:
    """Writes config.json and safetensors shards of at most `max_shard_size` bytes (one tensor at least).

    "huggingface" can be read by transformers' `DeepseekV4ForCausalLM.from_pretrained`, "official" has DeepSeek's names.
    Everything is written beside the folder first and then moved into it; other files in the folder stay.

    Raises:
        ValueError: an unknown layout, or a model that the layout cannot hold.
    """
    config = replace(model.config, quantization_config=None, expert_dtype=None)
    config = replace(config, torch_dtype=str(model.embed.weight.dtype).removeprefix("torch."))
    _write(model.state_dict(), config, Path(folder).resolve(), layout, max_shard_size)


def sources(name: str, config: ModelConfig, layout: str) -> dict[str, Index]:
    """The names under which a layout stores one of our tensors, each with the part of it that it holds.

    Raises:
        ValueError: the layout has no name for it.
    """
    if name.startswith("mtp."):
        layout = "official"
    parts = _parts(name, config, fused=layout == "huggingface")
    return {_RENAME[layout](part): index for part, index in parts.items()}


def config_from_huggingface(data: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that transformers writes for `deepseek_v4`, in our keys.

    There each kind of layer has one ratio (`compress_rates`), routers are listed by layer (`mlp_layer_types`) and the
    two rotary bases lie in `rope_parameters`.

    Raises:
        ValueError: a key is missing, or a value that V4 does not have; the message names it.
    """
    values = {key: value for key, value in data.items() if key not in _HF_IGNORED}
    missing = [key for key in ("layer_types", "compress_rates", "mlp_layer_types") if values.get(key) is None]
    if missing:
        raise ValueError(f"missing keys: {', '.join(missing)}")
    for key, allowed in (("mlp_bias", False), ("router_jitter_noise", 0.0)):
        if values.pop(key, allowed) != allowed:
            raise ValueError(f"{key}={data[key]!r}: allowed is {allowed!r}")
    kinds, rates = values["layer_types"], values.pop("compress_rates")
    unknown = [kind for kind in kinds if kind != SLIDING and kind not in rates]
    if unknown:
        raise ValueError(f"layer_types has {unknown[0]!r}: compress_rates has {', '.join(rates)}")
    values["compress_ratios"] = [0 if kind == SLIDING else rates[kind] for kind in kinds]
    values["num_hash_layers"] = _hash_layers(values.pop("mlp_layer_types"))
    values.update(_rotary(values.pop("rope_parameters", None) or {}))
    partial = values.pop("partial_rotary_factor", None)
    if partial is not None:
        values.setdefault("qk_rope_head_dim", round(partial * values["head_dim"]))
    if "dtype" in values:
        values["torch_dtype"] = str(values.pop("dtype")).removeprefix("torch.")
    if isinstance(values.get("eos_token_id"), list) and len(values["eos_token_id"]) == 1:
        values["eos_token_id"] = values["eos_token_id"][0]
    return values


def config_to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """The configuration in the keys of transformers' `DeepseekV4Config`; `config_from_huggingface` inverts it.

    Raises:
        ValueError: what transformers cannot hold: Engram, two ratios for one kind of layer, several shared experts.
    """
    layers, heads = config.num_hidden_layers, config.head_dim
    if config.engram is not None:
        raise ValueError("the huggingface layout has no Engram: save with layout='official'")
    if config.n_shared_experts != 1:
        raise ValueError(f"n_shared_experts={config.n_shared_experts}: the huggingface layout has exactly one")
    values = {key: value for key, value in config.to_dict().items() if key not in _NOT_HF}
    values |= {"dtype": config.torch_dtype, "layer_types": list(config.layer_types[:layers])}
    values["compress_rates"] = {SPARSE: _one_ratio(config, SPARSE, 4), HEAVY: _one_ratio(config, HEAVY, 128)}
    values["mlp_layer_types"] = ["hash_moe" if config.is_hash(i) else "moe" for i in range(layers)]
    partial = config.qk_rope_head_dim / heads
    while int(partial * heads) < config.qk_rope_head_dim:  # transformers truncates the product
        partial = math.nextafter(partial, 1.0)
    values["partial_rotary_factor"] = partial
    yarn: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling:
        scaling = config.to_dict()["rope_scaling"]
        yarn = {"rope_type": scaling.pop("type"), **scaling, "attention_factor": 1.0}
    values["rope_parameters"] = {
        "main": {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": partial},
        "compress": {**yarn, "rope_theta": config.compress_rope_theta, "partial_rotary_factor": partial},
    }
    return dict(sorted(values.items()))


_NOT_HF = ("compress_ratios", "num_hash_layers", "rope_scaling", "torch_dtype")
_HF_IGNORED = (
    *("_name_or_path", "chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "output_attentions"),
    *("output_hidden_states", "output_router_logits", "problem_type", "return_dict", "router_aux_loss_coef"),
)


def _hash_layers(kinds: list[str]) -> int:
    count = sum(kind == "hash_moe" for kind in kinds)
    if list(kinds) != ["hash_moe"] * count + ["moe"] * (len(kinds) - count):
        raise ValueError(f"mlp_layer_types={list(kinds)}: allowed are hash_moe layers first, then moe layers")
    return count


def _rotary(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `compress_rope_theta` and `rope_scaling` out of transformers' nested `rope_parameters`."""
    values: dict[str, Any] = {}
    for branch, theta in (("main", "rope_theta"), ("compress", "compress_rope_theta")):
        table = dict(parameters.get(branch) or {})
        table.pop("partial_rotary_factor", None)
        kind, also = table.pop("rope_type", "default"), table.pop("type", None)
        if "rope_theta" in table:
            values[theta] = table.pop("rope_theta")
        if kind not in (("default",) if branch == "main" else ("default", "yarn")) or also not in (None, kind):
            raise ValueError(
                f"rope_parameters.{branch}.rope_type={kind!r}: allowed is 'default', or 'yarn' in compress"
            )
        if table.pop("attention_factor", 1.0) != 1.0:
            raise ValueError(f"rope_parameters.{branch}.attention_factor: V4 has no attention temperature, only 1.0")
        if kind == "yarn":
            values["rope_scaling"] = {"type": "yarn", **table}
    return values


def _one_ratio(config: ModelConfig, kind: str, default: int) -> int:
    ratios = {ratio for k, ratio in zip(config.layer_types, config.compress_ratios) if k == kind}
    if len(ratios) > 1:
        raise ValueError(f"{kind} layers have the ratios {sorted(ratios)}: the huggingface layout has one for all")
    return ratios.pop() if ratios else default


def _parts(name: str, config: ModelConfig, fused: bool) -> dict[str, Index]:
    """Our tensor, or the matrices that it stacks, under names that `_RENAME` takes further."""
    stem, _, leaf = name.rpartition(".ffn.")
    width = config.moe_intermediate_size
    first, second = slice(0, width), slice(width, 2 * width)
    if leaf == "shared_experts.w13.weight":
        width *= config.n_shared_experts
        halves = {"w1": slice(0, width), "w3": slice(width, 2 * width)}
        return {f"{stem}.ffn.shared_experts.{w}.weight": (half,) for w, half in halves.items()}
    experts = range(config.n_routed_experts)
    if leaf == "experts.w13" and not fused:
        halves = {"w1": first, "w3": second}
        return {f"{stem}.ffn.experts.{e}.{w}.weight": (e, half) for e in experts for w, half in halves.items()}
    if leaf == "experts.w2" and not fused:
        return {f"{stem}.ffn.experts.{e}.w2.weight": (e,) for e in experts}
    return {name: ()}


def _official(name: str) -> str:
    return re.sub(r"\bhc_(attn|ffn|head)\.(fn|base|scale)$", r"hc_\1_\2", name)


def _hybrid(name: str) -> str:
    if name in _ENDS:
        return name if name == "head.weight" else _ENDS[name]
    return "model." + _official(name).replace(".attn.kv_norm.", ".attn.norm.")


def _huggingface(name: str) -> str:
    if name in _ENDS:
        return _ENDS[name]
    layers, layer, leaf = name.split(".", 2)
    if layers != "layers" or leaf not in _BLOCK:
        raise ValueError(f"{name}: the huggingface layout has no name for this tensor; save with layout='official'")
    return f"model.layers.{layer}.{_BLOCK[leaf]}"


_RENAME = {"official": _official, "hybrid": _hybrid, "huggingface": _huggingface}


class _Header(NamedTuple):
    """What a file says about one of its tensors."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def _headers(folder: Path) -> dict[str, _Header]:
    """Every stored tensor by name, from the headers of the folder's files."""
    if (folder / _SHARDS).is_file():
        files = sorted(set(json.loads((folder / _SHARDS).read_text("utf-8"))["weight_map"].values()))
    else:
        files = [_WEIGHTS]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}")
    stored = {}
    for file in (folder / name for name in files):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (the handle is no mapping)
                view = tensors.get_slice(name)
                stored[name] = _Header(file, view.get_dtype(), tuple(view.get_shape()))
    return stored


def _layout_of(names: Mapping[str, _Header]) -> str:
    for mark, layout in _MARKS.items():
        if mark in names:
            return layout
    raise ValueError(f"the checkpoint has none of {', '.join(_MARKS)}: it has {_listed(names)}")


def _read(
    stored: dict[str, _Header],
    shapes: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Our tensors of the given shapes, put together from what is stored."""
    layout = _layout_of(stored)
    wanted = {source: (name, i) for name in shapes for source, i in sources(name, config, layout).items()}
    stored = {name: header for name, header in stored.items() if not _SHARED_COPIES.match(name)}
    _check(stored, wanted, shapes, config)
    state: dict[str, Tensor] = {}
    for file in sorted({header.file for header in stored.values()}):
        with safe_open(file, "pt", device=str(device)) as tensors:
            for source in (name for name, header in stored.items() if header.file == file):
                name, index = wanted[source]
                tensor = _cast(name, tensors.get_tensor(source), dtype)
                if not index:
                    state[name] = tensor
                    continue
                if name not in state:
                    state[name] = torch.empty(shapes[name], dtype=tensor.dtype, device=device)
                state[name][index] = tensor
    return state


def _check(
    stored: Mapping[str, _Header],
    wanted: Mapping[str, tuple[str, Index]],
    shapes: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
) -> None:
    """Every stored tensor is wanted, every wanted one is stored, unquantised and of the right shape."""
    quantised = [name for name, header in stored.items() if header.dtype not in _DTYPES]
    if quantised:
        kinds = ", ".join(sorted({stored[name].dtype for name in quantised}))
        method = (config.quantization_config or {}).get("quant_method", "no quant_method given")
        raise ValueError(
            f"the checkpoint is quantised ({method}, experts {config.expert_dtype or method}): {_listed(quantised)} are"
            f" {kinds}; float32, float16 and bfloat16 tensors can be read, the quantised layout is not read yet"
        )
    missing = [name for name in wanted if name not in stored]
    unexpected = [name for name in stored if name not in wanted]
    found = {"missing": missing, "unexpected": unexpected}
    if missing or unexpected:
        said = "; ".join(f"{len(names)} {what}: {_listed(names)}" for what, names in found.items() if names)
        raise ValueError(f"the checkpoint's tensors are not the configuration's: {said}")
    for source, (name, index) in wanted.items():
        want = tuple(torch.empty(shapes[name], device="meta")[index].shape)
        if stored[source].shape != want:
            raise ValueError(f"{source} has shape {stored[source].shape}: the configuration needs {want} ({name})")


def _listed(names: Any, most: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.long()
    if dtype is None:
        return tensor
    return tensor.to(torch.promote_types(dtype, torch.float32) if _FLOAT32.search(name) else dtype)


def _write(tensors: Mapping[str, Tensor], config: ModelConfig, folder: Path, layout: str, max_shard_size: int) -> None:
    if layout not in _SAVED:
        raise ValueError(f"layout={layout!r}: allowed are {', '.join(map(repr, _SAVED))}")
    written = config_to_huggingface(config) if layout == "huggingface" else config.to_dict()
    shards = _shards(tensors, config, layout, max_shard_size)
    beside = folder.parent / f".{folder.name}.{os.getpid()}.new"
    beside.mkdir(parents=True)
    try:
        (beside / "config.json").write_text(json.dumps(written, indent=2) + "\n", "utf-8")
        where: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file = _WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            held = {source: tensors[name][index].detach().cpu().contiguous() for source, (name, index) in shard.items()}
            save_file(held, beside / file, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            total = sum(t.numel() * t.element_size() for t in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (beside / _SHARDS).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        _move(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _shards(
    tensors: Mapping[str, Tensor], config: ModelConfig, layout: str, limit: int
) -> list[dict[str, tuple[str, Index]]]:
    """Stored name to our tensor and its part, in files of at most `limit` bytes."""
    shards: list[dict[str, tuple[str, Index]]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        for source, index in sources(name, config, layout).items():
            size = tensor[index].numel() * tensor.element_size()
            if shards[-1] and held + size > limit:
                shards.append({})
                held = 0
            shards[-1][source] = (name, index)
            held += size
    return shards


def _move(beside: Path, folder: Path) -> None:
    """Puts the new files in the folder's place, or into it: weights first, the index and the configuration last."""
    if not folder.exists():
        os.rename(beside, folder)
        return
    new = sorted(_weight_files(beside)) + [name for name in (_SHARDS, "config.json") if (beside / name).exists()]
    for name in new:
        os.replace(beside / name, folder / name)
    for name in {*_weight_files(folder), _SHARDS} - set(new):
        (folder / name).unlink(missing_ok=True)


def _weight_files(folder: Path) -> Iterator[str]:
    return (file.name for file in folder.iterdir() if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", file.name))

"""Every tensor of the released Flash and Pro checkpoints, name, shape and dtype, against the model on meta."""

import math

import pytest
import torch

from abyssal.model import ModelConfig, Transformer
from abyssal.model.interchange import plan, shape_of
from abyssal.model.interchange.names import sources
from abyssal.model.kept import kept

SIZES = {  # d, layers, heads, query rank, groups, experts, expert width, ratios of the layers
    "v4-flash": (4096, 43, 64, 1024, 8, 256, 2048, [0, 0] + [4, 128] * 20 + [4]),
    "v4-pro": (7168, 61, 128, 1536, 16, 384, 3072, [128, 128] + [4, 128] * 29 + [4]),
}
VOCABULARY, HEAD, INDEX = 129280, 512, (64, 128)


def released(name):
    """The checkpoint's tensors by the release's table: name to (dtype, shape)."""
    d, layers, h, ql, g, e, f, ratios = SIZES[name]
    found = {}

    def add(key, dtype, *shape):
        found[key] = (dtype, shape)

    def fp8(key, rows, columns):
        add(key + ".weight", "float8_e4m3fn", rows, columns)
        add(key + ".scale", "float8_e8m0fnu", math.ceil(rows / 128), math.ceil(columns / 128))

    def fp4(key, rows, columns):
        add(key + ".weight", "int8", rows, columns // 2)
        add(key + ".scale", "float8_e8m0fnu", rows, columns // 32)

    def compressor(key, width, m):
        both = 2 if m == 4 else 1
        for part in ("wkv", "wgate"):
            add(f"{key}.{part}.weight", "bfloat16", both * width, d)
        add(f"{key}.ape", "float32", m, both * width)
        add(f"{key}.norm.weight", "bfloat16", width)

    def block(key, m, hashed):
        for norm, width in (("attn_norm", d), ("ffn_norm", d), ("attn.q_norm", ql), ("attn.kv_norm", HEAD)):
            add(f"{key}.{norm}.weight", "bfloat16", width)
        for site in ("attn", "ffn"):
            for part, shape in (("fn", (24, 4 * d)), ("base", (24,)), ("scale", (3,))):
                add(f"{key}.hc_{site}_{part}", "float32", *shape)
        fp8(f"{key}.attn.wq_a", ql, d)
        fp8(f"{key}.attn.wq_b", h * HEAD, ql)
        fp8(f"{key}.attn.wkv", HEAD, d)
        fp8(f"{key}.attn.wo_a", g * 1024, h * HEAD // g)
        fp8(f"{key}.attn.wo_b", d, g * 1024)
        add(f"{key}.attn.attn_sink", "float32", h)
        if m:
            compressor(f"{key}.attn.compressor", HEAD, m)
        if m == 4:
            fp8(f"{key}.attn.indexer.wq_b", INDEX[0] * INDEX[1], ql)
            add(f"{key}.attn.indexer.weights_proj.weight", "bfloat16", INDEX[0], d)
            compressor(f"{key}.attn.indexer.compressor", INDEX[1], 4)
        add(f"{key}.ffn.gate.weight", "bfloat16", e, d)
        if hashed:
            add(f"{key}.ffn.gate.tid2eid", "int64", VOCABULARY, 6)
        else:
            add(f"{key}.ffn.gate.bias", "float32", e)
        for w, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d))):
            fp8(f"{key}.ffn.shared_experts.{w}", *shape)
            for expert in range(e):
                fp4(f"{key}.ffn.experts.{expert}.{w}", *shape)

    for key in ("embed.weight", "head.weight"):
        add(key, "bfloat16", VOCABULARY, d)
    add("norm.weight", "bfloat16", d)
    for prefix in ("", "mtp.0."):
        for part, shape in (("fn", (4, 4 * d)), ("base", (4,)), ("scale", (1,))):
            add(f"{prefix}hc_head_{part}", "float32", *shape)
    for layer in range(layers):
        block(f"layers.{layer}", ratios[layer], layer < 3)
    block("mtp.0", 0, False)
    for norm in ("enorm", "hnorm", "norm"):
        add(f"mtp.0.{norm}.weight", "bfloat16", d)
    fp8("mtp.0.e_proj", d, d)
    fp8("mtp.0.h_proj", d, d)
    return found


@pytest.mark.parametrize("name", SIZES)
def test_every_released_tensor_has_its_place(name):
    config = ModelConfig.load(name)
    with torch.device("meta"):
        model = Transformer(config)
    ours, kept_names = {}, kept(model)
    for key, tensor in model.state_dict().items():
        wide = key in kept_names and not key.endswith("norm.weight")  # norms' weights are stored in bfloat16
        dtype = torch.float32 if wide else torch.bfloat16
        for part, place in sources(key, config, "official").items():
            dtype = dtype if tensor.is_floating_point() else torch.int64
            ours |= plan(part, shape_of(tuple(tensor.shape), place), dtype, "fp4")
    want = released(name)
    assert ours.keys() == want.keys()
    for key, (dtype, shape) in want.items():
        assert ours[key] == (shape, getattr(torch, dtype)), key
    if name == "v4-pro":
        assert round(sum(math.prod(shape) for _, shape in want.values()) / 1e9, 1) == 861.6  # as published

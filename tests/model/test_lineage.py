"""V3 and V3.2 against transformers: logits, gradients, cached decode, checkpoints; packing, ragged rows, refusals."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from oracle import assert_same
from safetensors.torch import load_file, save_file

from abyssal.model import generate, load_pretrained, save_pretrained
from abyssal.model.lineage import LineageConfig, LineageTransformer
from abyssal.model.lineage.accounting import account
from abyssal.model.lineage.moe import GroupGate
from abyssal.model.lineage.names import sources

YARN = {"factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 64}
YARN |= {"beta_fast": 32, "beta_slow": 1}
SIZES = {
    **{"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "moe_intermediate_size": 24},
    **{"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4, "q_lora_rank": 32},
    **{"kv_lora_rank": 40, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 8},
    **{"num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    **{"max_position_embeddings": 4096},
}
INDEXER = {"index_n_heads": 32, "index_head_dim": 16, "index_topk": 9}  # with few heads scores tie at zero


def config(kind, **changes):
    own = INDEXER if kind == "deepseek_v32" else {}
    rotary = {"rope_theta": 10000.0, "rope_scaling": {"type": "yarn", **YARN}, "torch_dtype": "float32"}
    return LineageConfig.from_dict({"model_type": kind, **SIZES, **own, **rotary, **changes})


def peer(kind, **changes):
    """transformers' model of the same sizes, with weights that matter everywhere."""
    transformers = pytest.importorskip("transformers")
    name = {"deepseek_v3": "DeepseekV3", "deepseek_v32": "DeepseekV32"}[kind]
    sizes = {**SIZES, **(INDEXER if kind == "deepseek_v32" else {}), **changes}
    sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes.setdefault("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0, **YARN})
    their = getattr(transformers, name + "Config")(**sizes, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, name + "ForCausalLM")(their).float().eval()
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in key:
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            torch.nn.init.normal_(tensor, mean=centre, std=0.15 if tensor.ndim > 1 else 0.1)
    return model


@pytest.fixture(scope="module", params=["deepseek_v3", "deepseek_v32"])
def pair(request, tmp_path_factory):
    theirs = peer(request.param)
    folder = tmp_path_factory.mktemp("peer")
    theirs.save_pretrained(folder)
    return load_pretrained(folder), theirs


def draw(*shape, seed=0):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def far(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_logits(pair):
    ours, theirs = pair
    for t in (1, 2, 9, 10, 70):
        ids = draw(2, t, seed=t)
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 5e-5, t
    assert_same("kept", ours(ids, logits_to_keep=3).logits, ours(ids).logits[:, -3:], 1e-6)


def test_gradients(pair):
    ours, theirs = pair
    ids = draw(2, 50)
    logits = theirs(ids).logits
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    theirs.zero_grad(), ours.zero_grad()
    logits.backward(grad)
    ours(ids).logits.backward(grad)
    want = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        for source, place in sources(name, ours.config, "huggingface").items():
            if "indexer" in name:
                assert parameter.grad is None and want[source] is None
            else:
                assert far(parameter.grad[place], want[source]) < 1e-4, name


@torch.no_grad()
def test_a_cache_is_in_the_dtype_that_the_model_computes_in():
    model = LineageTransformer(config("deepseek_v32"))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            assert {part.dtype for layer in model.new_cache(1, 8).rows for part in layer} == {dtype}


@pytest.mark.parametrize("split", [[70], [1] * 12, [33, 1, 1, 35], [5, 60, 3]])
def test_cached(pair, split):
    ours, theirs = pair
    ids = draw(2, sum(split))
    want = theirs(ids).logits
    cache = ours.new_cache(2, 80)
    got = torch.cat([ours(part, cache=cache).logits for part in ids.split(split, 1)], 1)
    assert (got - want).abs().max() < 5e-5 and cache.lengths.tolist() == [sum(split)] * 2
    width = 40 + 8 + (16 if ours.config.sparse else 0)
    assert cache.nbytes() == 3 * 2 * 80 * width * 4


def test_transformers_decodes_the_same_tokens(pair):
    ours, theirs = pair
    ids = draw(1, 20)
    want = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 20:]
    cache, got, token = ours.new_cache(1, 40), [], ids
    for _ in range(12):
        token = ours(token, cache=cache, logits_to_keep=1).logits.argmax(-1)
        got.append(int(token))
    assert got == want.tolist()


@pytest.mark.parametrize("chunk", [None, 7])
def test_generates(pair, chunk):
    ours, _ = pair
    prompts = [draw(20).tolist(), draw(9, seed=1).tolist()]
    together = generate(ours, prompts, max_new_tokens=6, temperature=0, chunk=chunk)
    assert together == [generate(ours, p, max_new_tokens=6, temperature=0) for p in prompts]
    for prompt, written in zip(prompts, together):
        ids = torch.tensor([prompt + written])
        assert ours(ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == written
    with pytest.raises(ValueError, match="no MTP module"):
        generate(ours, prompts[0], max_new_tokens=1, speculative=True)
    with pytest.raises(ValueError, match="has 'exact' only"):
        generate(ours, prompts[0], max_new_tokens=1, storage="released")


@pytest.mark.parametrize("few", [0.0, 1e9], ids=["expanded", "absorbed"])
def test_both_forms_of_latent_attention(few, monkeypatch):
    torch.manual_seed(0)
    model = LineageTransformer(config("deepseek_v3")).double()
    ids, documents = draw(2, 30), torch.tensor([[-1] * 3 + [0] * 13 + [1] * 14, [2] * 29 + [-1]])
    for where in (None, documents):
        want = model(ids, documents=where).logits
        for block in model.layers:
            monkeypatch.setattr(block.attn, "few", few)
        real = slice(None) if where is None else where >= 0
        assert (model(ids, documents=where).logits - want)[real].abs().max() < 1e-5
        monkeypatch.undo()


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v32"])
def test_packed_documents_are_apart(kind):
    torch.manual_seed(0)
    model = LineageTransformer(config(kind, first_k_dense_replace=0))
    parts = [draw(n, seed=n) for n in (13, 1, 24)]
    documents = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)] + [torch.tensor([-1, -1])])
    ids = torch.cat([*parts, draw(2)])[None]
    packed = model(ids, targets=ids, documents=documents[None])
    alone = [model(part[None]).logits[0] for part in parts]
    assert (packed.logits[0, :38] - torch.cat(alone)).abs().max() < 1e-5
    losses = [model(p[None], targets=p[None]).losses["lm"] * len(p) for p in parts]
    torch.testing.assert_close(packed.losses["lm"], sum(losses) / 38)
    assert (packed.metrics["load"].shape == (3, 8) and "index" in packed.losses) or kind == "deepseek_v3"


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v32"])
def test_ragged_rows(kind):
    torch.manual_seed(0)
    model = LineageTransformer(config(kind))
    a, b = draw(25, seed=1), draw(25, seed=2)
    cache = model.new_cache(2, 25)
    model(torch.stack([a[:12], b[:12]]), cache=cache, lengths=[12, 5])
    out = model(torch.stack([a[12:20], b[5:13]]), cache=cache, lengths=torch.tensor([3, 8])).logits
    assert cache.lengths.tolist() == [15, 13]
    assert (out[0, :3] - model(a[None, :15]).logits[0, 12:]).abs().max() < 1e-5
    assert (out[1] - model(b[None, :13]).logits[0, 5:]).abs().max() < 1e-5
    cache.truncate([10, 13])
    cache.reorder([1, 0])
    out = model(torch.stack([b[13:20], a[10:17]]), cache=cache).logits
    assert (out[0] - model(b[None, :20]).logits[0, 13:]).abs().max() < 1e-5
    assert (out[1] - model(a[None, :17]).logits[0, 10:]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "few"), [("deepseek_v3", 0.0), ("deepseek_v3", 1e9), ("deepseek_v32", 0.0)], ids=["expanded", "", "sparse"]
)
def test_rows_of_any_length_and_padding_behind_the_end(kind, few, monkeypatch):
    """In blocks of 8 queries; rows that are full beside others that go on."""
    monkeypatch.setattr(importlib.import_module("abyssal.model.lineage.attention"), "BLOCK", 8)
    torch.manual_seed(0)
    model = LineageTransformer(config(kind, num_hidden_layers=2))
    for block in model.layers:
        block.attn.few = few
    ids, done = torch.stack([draw(24, seed=n) for n in range(3)]), [0, 0, 0]
    whole, cache = model(ids).logits, model.new_cache(3, 24)
    for columns, *new in ((19, 3, 19, 0), (9, 9, 4, 0), (2, 1, 1, 1), (5, 5, 0, 2), (26, 6, 0, 21), (1, 0, 0, 0)):
        part = torch.stack([torch.cat([row[n:], draw(30)])[:columns] for row, n in zip(ids, done)])
        out = model(part, cache=cache, lengths=new).logits
        for b, n in enumerate(new):
            assert torch.allclose(out[b, :n], whole[b, done[b] : done[b] + n], rtol=0, atol=1e-5)
        done = [a + b for a, b in zip(done, new)]
    assert done == [24] * 3


def test_the_cache_refuses_what_does_not_fit():
    model = LineageTransformer(config("deepseek_v3"))
    cache = model.new_cache(1, 8)
    model(draw(1, 5), cache=cache)
    before = [part.clone() for layer in cache.rows for part in layer]
    for arguments, says in (
        ({"ids": draw(1, 4)}, "max_length=8"),
        ({"ids": draw(2, 1)}, "the cache has 1"),
        ({"ids": draw(1, 2), "lengths": [3]}, "lengths=\\[3\\]"),
        ({"ids": draw(1, 2), "targets": draw(1, 2)}, "together with a cache"),
    ):
        with pytest.raises(ValueError, match=says):
            model(arguments.pop("ids"), cache=cache, **arguments)
    assert all(torch.equal(x, y) for x, y in zip(before, (part for layer in cache.rows for part in layer)))
    with pytest.raises(ValueError, match="up to \\[5\\]"):
        cache.truncate([6])
    with pytest.raises(IndexError, match="rows=\\[1\\]"):
        cache.reorder([1])
    with pytest.raises(ValueError, match="max_position_embeddings=4096"):
        model.new_cache(1, 5000)
    with pytest.raises(IndexError, match="token id 97"):
        model(torch.tensor([[97]]))


def test_index_loss_teaches_the_indexer_alone():
    torch.manual_seed(0)
    model = LineageTransformer(config("deepseek_v32"))
    ids = draw(2, 40)
    out = model(ids, targets=ids.roll(-1, 1))
    out.losses["index"].backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {name for name, _ in model.named_parameters() if ".indexer." in name}
    optimizer = torch.optim.AdamW((p for n, p in model.named_parameters() if ".indexer." in n), 1e-2)
    first = float(out.losses["index"].detach())
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(ids, targets=ids.roll(-1, 1)).losses["index"]
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.7 * first


def test_router_by_hand():
    c = config("deepseek_v3", n_routed_experts=6, n_group=3, topk_group=2, num_experts_per_tok=2, hidden_size=6)
    gate = GroupGate(c)
    gate.weight.data = torch.eye(6)
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.2, 0.6], [0.5] * 6])
    gate.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.7]))
    routing = gate(torch.logit(scores))
    # groups' sums 1.0, 1.1, 1.5: the first is out, although it holds the best expert; then 0.6 + 0.7 and 0.6
    assert routing.experts[0].tolist() == [5, 2] and routing.experts[1].tolist() == [5, 0]
    torch.testing.assert_close(routing.weights[0], torch.tensor([0.5, 0.5]) * 2.5)
    routing.weights.sum().backward()
    assert gate.weight.grad is not None
    gate.counts = torch.tensor([0.0, 2, 0, 0, 0, 4])
    gate.update_bias(0.5)
    assert gate.bias.tolist() == pytest.approx([0.5, -0.5, 0.5, 0.5, 0.5, 0.2])


TABLES = {
    "mscale": {"mscale": 0.707},
    "neither": {"mscale": 0.0, "mscale_all_dim": 0.0},
    "mscale alone": {"mscale_all_dim": 0.0},
    "mscale_all_dim alone": {"mscale": 0.0},
    "attention_factor": {"attention_factor": 1.5},
    "truncate": {"truncate": False},
    "ramp below the first pair": {"original_max_position_embeddings": 5},
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v32"])
@torch.no_grad()
def test_every_temperature_of_yarn(kind, table, tmp_path):
    """In a whole pass, a prefill and token by token, and after a round trip through a folder."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, **YARN, **table}
    theirs = peer(kind, rope_parameters=rope)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, ids = load_pretrained(tmp_path / "theirs"), draw(1, 40)
    want = theirs(ids).logits
    plain = peer(kind)(ids).logits
    assert far(want, plain) > 1e-3, "the table changes nothing at this size"
    assert far(ours(ids).logits, want) < 1e-5
    cache = ours.new_cache(1, 40)
    got = [ours(part, cache=cache).logits for part in ids.split([30, *[1] * 10], 1)]
    assert far(torch.cat(got, 1), want) < 1e-5
    for layout in ("official", "huggingface"):
        save_pretrained(ours, tmp_path / layout, layout)
        assert load_pretrained(tmp_path / layout).config == ours.config
        assert far(type(theirs).from_pretrained(tmp_path / layout)(ids).logits, want) < 1e-5


@pytest.mark.parametrize("changes", [{"norm_topk_prob": False}, {"rms_norm_eps": 0.1}], ids=lambda c: next(iter(c)))
@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v32"])
@torch.no_grad()
def test_keys_that_change_logits(kind, changes, tmp_path):
    theirs, ids = peer(kind, **changes), draw(1, 30)
    theirs.save_pretrained(tmp_path)
    assert far(load_pretrained(tmp_path)(ids).logits, theirs(ids).logits) < 1e-5
    assert far(peer(kind)(ids).logits, theirs(ids).logits) > 1e-3


@torch.no_grad()
def test_dense_layers_anywhere(tmp_path):
    theirs, ids = peer("deepseek_v32", mlp_layer_types=["sparse", "dense", "sparse"]), draw(1, 30)
    theirs.save_pretrained(tmp_path / "x")
    ours = load_pretrained(tmp_path / "x")
    assert far(ours(ids).logits, theirs(ids).logits) < 1e-5
    c = ours.config
    assert (c.dense_layers, c.first_k_dense_replace) == (1, 0) and LineageConfig.from_dict(c.to_dict()) == c
    assert account(c).total == sum(p.numel() for p in ours.state_dict().values())
    first = LineageConfig.from_dict({**c.to_dict(), "mlp_layer_types": ["dense", "dense", "sparse"]})
    assert first.mlp_layer_types is None and first.first_k_dense_replace == first.dense_layers == 2


# checkpoints and configurations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["official", "huggingface"])
@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v32"])
def test_transformers_reads_what_is_written_here(tmp_path, kind, layout):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = LineageTransformer(config(kind)).eval()
    for gate in (block.ffn.gate for block in model.layers[1:]):
        torch.nn.init.normal_(gate.bias, std=0.1)
    save_pretrained(model, tmp_path / "x", layout, max_shard_size=30_000)
    name = "DeepseekV3ForCausalLM" if kind == "deepseek_v3" else "DeepseekV32ForCausalLM"
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(info.values()), info
    ids = draw(2, 30)
    assert (theirs(ids).logits - model(ids).logits).abs().max() < 5e-5
    again = load_pretrained(tmp_path / "x")
    assert again.config == model.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_reads_the_released_fp8_and_leaves_mtp_out(tmp_path):
    torch.manual_seed(0)
    model = LineageTransformer(config("deepseek_v3", hidden_size=160))
    save_pretrained(model, tmp_path / "x", "official")
    file = tmp_path / "x/model.safetensors"
    tensors = load_file(file)
    for key in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.experts.2.up_proj"):
        scale = torch.rand(*(-(-size // 128) for size in tensors[key + ".weight"].shape)) + 0.5
        wide = scale.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)
        codes = tensors[key + ".weight"].mul(100).to(torch.float8_e4m3fn)
        tensors[key + ".weight"], tensors[key + ".weight_scale_inv"] = codes, scale
        rows, columns = codes.shape
        expected = codes.float() * wide[:rows, :columns]
        if "o_proj" in key:
            want = expected
    tensors["model.layers.3.embed_tokens.weight"] = torch.zeros(2)
    save_file(tensors, file)
    loaded = load_pretrained(tmp_path / "x", dtype=torch.float32)
    assert torch.equal(loaded.layers[0].attn.wo.weight, want)
    assert torch.equal(loaded.layers[1].ffn.experts.w13[2, 24:], expected)
    with pytest.raises(ValueError, match="written with exact weights only"):
        save_pretrained(model, tmp_path / "y", "official", weights="fp8")


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 2}, {"num_hidden_layers": 10**9}, {"n_routed_experts": 10**9}]
)
@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v32"])
def test_counts_are_those_of_the_stored_tensors(tmp_path, kind, changes):
    save_pretrained(LineageTransformer(config(kind)), tmp_path / "x")
    path = tmp_path / "x/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")
    ((key, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{key}={value}: the checkpoint has tensors for"):  # fewer are none left out
        load_pretrained(tmp_path / "x")


@pytest.mark.parametrize(("name", "total"), [("v3", 671.026), ("v3.2", 671.878)])
def test_released_sizes(name, total):
    c = LineageConfig.load(name)
    with torch.device("meta"):
        model = LineageTransformer(c)
    count = sum(t.numel() for t in model.state_dict().values())
    assert round(count / 1e9, 3) == total
    assert LineageConfig.from_dict(c.to_dict()) == c and c.sparse == (name == "v3.2")
    assert c.temperature == pytest.approx((0.1 * 3.6888795 + 1) ** 2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"index_topk": None}, "index_topk=None"),
        ({"n_group": 3}, "n_group=3: allowed is a divisor"),
        ({"n_group": 8}, "n_group=8: allowed is groups of two"),
        ({"topk_group": 5}, "topk_group=5"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5: allowed is at most 4"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7: allowed is an even"),
        ({"index_head_dim": 4}, "index_head_dim=4: allowed is at least"),
        ({"rope_scaling": {"type": "yarn"}}, "missing keys: rope_scaling.factor"),
        ({"rope_scaling": {"type": "default", "factor": 4}}, "rope_scaling.factor=4: allowed is none, because"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "rope_scaling": None}, "rope_type='dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", **YARN}}, "rope_parameters=.*: allowed is none where rope_scaling"),
        ({"head_dim": 16}, "head_dim=16: allowed is 8, qk_rope_head_dim, or none"),
        ({"qk_head_dim": 16}, r"qk_head_dim=16: allowed is 24, qk_nope_head_dim \+ qk_rope_head_dim"),
        ({"num_local_experts": 4}, "num_local_experts=4: allowed is 8, n_routed_experts"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2: allowed is num_attention_heads=4"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types=.*: allowed is .*indexed_attention"),
        ({"architectures": ["DeepseekV32Model"]}, "architectures=.*: allowed is .*DeepseekV32ForCausalLM"),
        ({"expert_dtype": "fp4"}, "expert_dtype='fp4': allowed is 'fp8' or none"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method='awq': allowed is 'fp8'"),
        ({"quantization_config": {"weight_block_size": [64, 64]}}, r"weight_block_size=\[64, 64\]: allowed is \[128"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\]: allowed is int, .* as `stop`"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, "rope_scaling.type='linear': allowed is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type='linear': allowed is 'yarn'"),
        ({"rope_scaling": "x"}, "rope_scaling='x': allowed is a table of factor, original_max"),
        ({"rope_parameters": 3}, "rope_parameters=3: allowed is a table of rope_theta, rope_type"),
        ({"quantization_config": "junk"}, "quantization_config='junk': allowed is a table"),
        ({"mlp_layer_types": ("dense", "sparse")}, r"len\(mlp_layer_types\)=2: allowed is num_hidden_layers=3"),
        (
            {"rope_scaling": {**YARN, "type": "yarn", "mscale": -0.7}},
            "rope_scaling.mscale=-0.7: allowed is numbers >= 0",
        ),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"rope_theta": 0}, "rope_theta=0.0: allowed is positive"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: allowed are finite"),
        ({"index_loss_weight": -1}, "index_loss_weight=-1.0"),
        ({"eos_token_id": 97}, "eos_token_id=97: allowed is 0 to vocab_size - 1 = 96"),
        ({"torch_dtype": "float8"}, "torch_dtype='float8'"),
        ({"num_layers": 3}, "unknown key 'num_layers': the nearest known key is 'num_hidden_layers'"),
    ],
)
def test_configurations_that_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        config("deepseek_v32", **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_theta": "x"}, "rope_theta='x': allowed is float, not str"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None: allowed is float, not NoneType"),
        ({"num_hidden_layers": 61.0}, "num_hidden_layers=61.0: allowed is int, not float"),
        ({"n_group": True}, "n_group=True: allowed is int, not bool"),
        ({"index_topk": "9"}, "index_topk='9': allowed is int, not str"),
        ({"mlp_layer_types": "dense"}, "mlp_layer_types='dense': allowed is a list of str"),
        ({"num_nextn_predict_layers": "abc"}, "num_nextn_predict_layers='abc': allowed is int, not str"),
        ({"head_dim": "zz"}, "head_dim='zz': allowed is int, not str"),
        ({"rope_scaling": {**YARN, "factor": 40}}, "rope_scaling.type=None: allowed is str"),
        ({"rope_scaling": {**YARN, "type": "yarn", "factor": "40"}}, "rope_scaling.factor='40': allowed is float"),
    ],
)
def test_types_are_checked(changes, says):
    with pytest.raises(TypeError, match=says):
        config("deepseek_v32", **changes)


def test_keys_that_are_refused(tmp_path):
    data = config("deepseek_v3").to_dict()
    for changes, says in (
        ({"scoring_func": "softmax"}, "scoring_func='softmax': allowed is 'sigmoid'"),
        ({"sliding_window": 3}, "unknown key .sliding_window.: known are model_type"),
        ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, "dense layers first"),
    ):
        with pytest.raises(ValueError, match=says):
            LineageConfig.from_dict({**data, **changes})
    with pytest.raises(ValueError, match=r"data=\[\]: allowed is a table"):
        LineageConfig.from_dict([])
    with pytest.raises(FileNotFoundError, match=r"v3, v3\.2"):
        LineageConfig.load("v2")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data), "utf-8")
    assert LineageConfig.load(path) == config("deepseek_v3")
    assert replace(LineageConfig.load(path), rope_scaling=None).temperature == 1.0

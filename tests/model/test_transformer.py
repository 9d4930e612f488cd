"""The whole model: first losses, gradients everywhere, causality, streams that separate, errors."""

import copy
import math
from pathlib import Path

import pytest
import torch
from oracle import assert_same

from abyssal.model import ModelConfig, Transformer
from abyssal.model.moe import hash_table


def draw(*shape, seed=0, top=260):
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed))


def nano(**changes):
    torch.manual_seed(0)
    return Transformer(ModelConfig.from_dict({**ModelConfig.load("nano").to_dict(), **changes}))


@pytest.mark.parametrize("name", ["nano", "toy", "long"])
def test_first_loss_is_that_of_a_uniform_guess(name):
    torch.manual_seed(0)
    model = Transformer(ModelConfig.load(name))
    losses = model(draw(2, 160), targets=draw(2, 160, seed=1)).losses
    for part in {"lm", "mtp"} & losses.keys():
        assert abs(losses[part].item() - math.log(260)) < 0.5


@pytest.mark.parametrize("t", [1, 2, 3, 4, 5, 17])
def test_short_sequences_have_finite_losses_and_gradients(t):
    model = nano()
    out = model(draw(2, t), targets=draw(2, t, seed=1))
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_no_parameter_is_dead():
    """One declared exception: the norm in front of Engram's convolution, whose weights start at zero, wakes up with
    them.
    """
    model = nano()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        model(draw(4, 200, seed=step), targets=draw(4, 200, seed=step + 9)).loss.backward()
        dead = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        assert dead == ({"layers.1.engram.conv_norm"} if step == 0 else set()), f"no gradient reaches {dead}"
        optimizer.step()


def test_causal():
    model, ids = nano().eval(), draw(1, 150)
    base = model(ids).logits
    for t in (1, 15, 16, 63, 64, 100):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 256
        logits = model(changed).logits
        assert torch.equal(logits[:, :t], base[:, :t]), f"token {t} reaches back"
        assert (logits[:, t] - base[:, t]).abs().max() > 1e-4


def test_prefix_does_not_depend_on_length():
    model, ids = nano().eval(), draw(1, 150)
    base = model(ids).logits
    for t in (1, 3, 16, 65, 149):
        assert (model(ids[:, :t]).logits - base[:, :t]).abs().max() < 1e-5


def test_starts_as_the_plain_residual():
    """With the dynamic part off, n streams behave as one pre-norm residual stream at step 0."""
    model, ids = nano(engram=None, num_nextn_predict_layers=0, compress_ratios=[0, 4, 16, 4, 16]).eval(), draw(1, 70)
    with torch.no_grad():
        model.embed.weight.mul_(50)  # so that the norms' eps is nothing beside the stream, whatever pre scales it by
        for name, parameter in model.named_parameters():
            if name.endswith(".fn"):
                parameter.zero_()
    x = model.embed(ids)
    from abyssal.model.layout import make_layout

    layout = make_layout(ids, None)
    for block in model.layers:
        x = x + block.attn(block.attn_norm(x), layout)[0]
        x = x + block.ffn(block.ffn_norm(x), ids, layout)[0]
    assert_same("logits", model(ids).logits, model.head(model.norm(x)), 1e-4)


def test_streams_separate():
    """In every layer, at once by the random projection and more with training."""
    model = nano()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    spreads = []
    for step in range(8):
        out = model(draw(2, 64, seed=step), targets=draw(2, 64, seed=step))
        spreads.append(out.metrics["spread"])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert (spreads[0] > 0).all()
    assert (spreads[-1] > 1e-3).all() and (spreads[-1] > 2 * spreads[0]).all()


def test_detached_indexer_learns_from_its_own_loss_only():
    model = nano()
    losses = model(draw(2, 160), targets=draw(2, 160, seed=1)).losses
    indexers = {n: p for n, p in model.named_parameters() if ".indexer." in n}
    rest = {n: p for n, p in model.named_parameters() if ".indexer." not in n}
    others = losses["lm"] + losses["mtp"] + losses["balance"]
    assert all(g is None for g in torch.autograd.grad(others, indexers.values(), allow_unused=True, retain_graph=True))
    grads = torch.autograd.grad(losses["index"], [*indexers.values(), *rest.values()], allow_unused=True)
    assert all(g is not None and g.any() for g in grads[: len(indexers)])
    assert all(g is None for g in grads[len(indexers) :])


def test_loss_is_the_weighted_sum_of_its_parts():
    model = nano(mtp_loss_weight=0.5, balance_loss_weight=0.25, index_loss_weight=2.0)
    out = model(draw(2, 100), targets=draw(2, 100, seed=1))
    parts = out.losses
    assert_same("loss", out.loss, parts["lm"] + 0.5 * parts["mtp"] + 0.25 * parts["balance"] + 2 * parts["index"], 1e-6)


def test_router_bias_moves_against_the_load():
    model = nano()
    out = model(draw(2, 100), targets=draw(2, 100, seed=1))
    model.update_router_bias(0.5)
    for layer, block in enumerate(model.layers):
        gate = block.ffn.gate
        if gate.is_hash:
            assert not hasattr(gate, "bias")
            continue
        load = out.metrics["load"][layer]
        assert torch.equal(gate.bias, 0.5 * torch.sign(load.mean() - load)) and gate.bias.any()
    before = model.layers[2].ffn.gate.bias.clone()
    model.eval()(draw(1, 20), targets=draw(1, 20))
    model.update_router_bias(0.5)
    assert torch.equal(model.layers[2].ffn.gate.bias, before), "a pass in eval mode must not count"


@pytest.mark.parametrize("v, e, k", [(260, 8, 2), (1000, 16, 6), (129, 7, 3), (50, 5, 5), (129280, 256, 6)])
def test_hash_table_is_balanced_and_distinct(v, e, k):
    table = hash_table(v, e, k, seed=1)
    assert table.shape == (v, k) and all(len(set(row)) == k for row in table[:300].tolist())
    counts = table.flatten().bincount(minlength=e)
    assert counts.max() - counts.min() <= k
    assert not torch.equal(table, hash_table(v, e, k, seed=2))


def test_same_bits_on_every_run():
    runs = []
    for _ in range(2):
        model = nano()
        out = model(draw(2, 130), targets=draw(2, 130, seed=1))
        out.loss.backward()
        runs.append([out.loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_bfloat16_autocast_is_close_to_float32():
    model = nano()
    ids, targets = draw(2, 130), draw(2, 130, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(ids, targets=targets)
        low.loss.backward()
    assert abs(low.losses["lm"].item() - model(ids, targets=targets).losses["lm"].item()) < 2e-2
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)


def test_logits_to_keep_and_lazy_logits():
    model, ids = nano().eval(), draw(2, 40)
    whole = model(ids).logits
    assert whole.dtype == torch.float32 and whole.shape == (2, 40, 260)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro"])
def test_released_sizes_build_on_meta(name):
    with torch.device("meta"):
        model = Transformer(ModelConfig.load(name))
    total = sum(p.numel() for p in model.parameters())
    # spec A.3, with MTP; the table counts the gate's bias, a buffer here
    assert abs(total / 1e9 - {"v4-flash": 290.94, "v4-pro": 1598.8}[name]) < 0.06


def test_every_config_key_is_read():
    """A key that nothing reads is a promise that nothing keeps."""
    root = Path(__file__).parents[2]
    sources = "".join(
        p.read_text("utf-8")
        for folder in ("model", "train")
        for p in (root / folder).rglob("*.py")
        if p.name != "config.py"
    )
    from dataclasses import fields

    described = {"torch_dtype", "expert_dtype", "quantization_config", "max_position_embeddings"}  # of a checkpoint
    unread = {f.name for f in fields(ModelConfig) if f".{f.name}" not in sources}
    assert unread <= described | {"compress_ratios", "layer_types", "num_hash_layers"}, unread


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: m(torch.tensor([[1, 260]])), IndexError, "260"),
        (lambda m: m(torch.tensor([[-1, 2]])), IndexError, "-1"),
        (lambda m: m(torch.zeros(1, 0).long()), ValueError, "at least one token"),
        (lambda m: m(torch.zeros(3).long()), ValueError, "ids"),
        (lambda m: m(torch.zeros(1, 3)), ValueError, "int64"),
        (lambda m: m(draw(1, 4), targets=draw(1, 5)), ValueError, "targets"),
        (lambda m: m(draw(1, 4), targets=draw(1, 4) * 0 + 999), IndexError, "targets holds token id 999"),
        (lambda m: m(draw(1, 4), logits_to_keep=9), ValueError, "logits_to_keep=9"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(nano())


def test_reset_parameters_fills_every_tensor_of_its_module():
    with torch.device("meta"):
        model = nano()
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(7777)
    for module in model.modules():
        getattr(module, "reset_parameters", lambda: None)()
    assert not [name for name, tensor in model.state_dict().items() if (tensor == 7777).any()]
    assert torch.equal(model.layers[1].engram.canonical, torch.arange(260))


@torch.no_grad()
def test_a_copy_reads_its_own_classes_of_tokens():
    model, ids, lookup = nano().eval(), draw(1, 12), torch.arange(260).flip(0)
    model.layers[1].engram.wkv.weight.mul_(20)
    for _ in range(3):
        model.layers[1].engram.set_canonical(torch.arange(260))
    model(ids)
    other, fresh = copy.deepcopy(model), nano().eval()
    while other.layers[1].engram.canonical._version < model.layers[1].engram.canonical._version:
        other.layers[1].engram.set_canonical(lookup)
    fresh.load_state_dict(other.state_dict())
    assert torch.equal(other(ids).logits, fresh(ids).logits)

"""Quantisation-aware training: off changes nothing, each family rounds what it names and no more, gradients pass."""

import pytest
import torch
from lively import draw_ids, lively

from abyssal.kernels import fake_quant, hadamard
from abyssal.model import ModelConfig, Transformer
from abyssal.model import decode as decode_module
from abyssal.model.moe import Experts, SharedExpert
from abyssal.model.quantization import RoundedLinear

FAMILIES = {"experts": "fp4", "linears": "fp8", "index": "fp4"}
WIDTHS = {"hidden_size": 64, "moe_intermediate_size": 96, "index_head_dim": 32, "index_topk": 2}
IDS = draw_ids(2, 40)


def aware(seed=0, **families):
    return lively(seed=seed, **WIDTHS, quantization_aware=families or None)


def loss_and_gradients(model, ids=IDS):
    model.zero_grad()
    out = model(ids, targets=ids.roll(-1, 1))
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def exact():
    model = aware()
    return model, *loss_and_gradients(model)


def test_off_by_default_and_without_a_trace(exact):
    model, out, gradients = exact
    assert model.config.quantization_aware is None and "quantization_aware" not in model.config.to_dict()
    assert not any(isinstance(module, RoundedLinear) for module in model.modules())
    nothing = lively(**WIDTHS, quantization_aware={"experts": None})
    again, more = loss_and_gradients(nothing)
    assert torch.equal(out.loss, again.loss) and all(torch.equal(gradients[name], more[name]) for name in gradients)


@pytest.mark.parametrize("family, format", [*FAMILIES.items(), ("experts", "fp8")])
def test_a_family_changes_values_and_all_gradients_flow(exact, family, format):
    _, out, gradients = exact
    model = aware(**{family: format})
    rounded, more = loss_and_gradients(model)
    changed = "index" if family == "index" else "lm"
    assert not torch.equal(rounded.losses[changed], out.losses[changed]) and rounded.loss.isfinite()
    assert more.keys() == gradients.keys()
    assert all(more[name].isfinite().all() and more[name].any() for name in gradients if gradients[name].any())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), exact[0].state_dict().values()))
    assert ModelConfig.from_dict(model.config.to_dict()) == model.config


def rounded_parameters(model, experts=None, linears=False):
    """The same model with rounded weights in its parameters, matrix by matrix as a checkpoint stores them."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Experts) and experts:
                code, block = ("e2m1", (1, 32)) if experts == "fp4" else ("e4m3", (128, 128))
                for weight in (module.w13, module.w2):
                    for parts in weight:
                        for part in parts.chunk(2) if weight is module.w13 else [parts]:
                            part.copy_(fake_quant(part, code, block=block))
            if isinstance(module, SharedExpert) and linears:
                for part in module.w13.weight.chunk(2):
                    part.copy_(fake_quant(part, "e4m3", block=(128, 128)))
            elif isinstance(module, RoundedLinear) and module.parts == 1:
                module.weight.copy_(fake_quant(module.weight, "e4m3", block=(128, 128)))
    return model


@pytest.mark.parametrize("format", ["fp4", "fp8"])
def test_experts_compute_with_rounded_weights(format):
    want = rounded_parameters(aware(), experts=format)
    got = aware(experts=format)
    assert torch.equal(got(IDS).logits, want(IDS).logits)
    targets = IDS.roll(-1, 1)
    for model in (got, want):
        model(IDS, targets=targets).loss.backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (got, want)]
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[1])  # straight-through


def test_linears_round_weights_and_inputs():
    model = aware(linears="fp8")
    names = {name for name, module in model.named_modules() if isinstance(module, RoundedLinear)}
    for layer in ("layers.0", "mtp.0"):
        for name in ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b"):
            assert f"{layer}.{name}" in names
        assert {f"{layer}.ffn.shared_experts.w13", f"{layer}.ffn.shared_experts.w2"} <= names
    assert {"mtp.0.e_proj", "mtp.0.h_proj"} <= names and any(name.endswith("indexer.wq_b") for name in names)
    kept = ("compressor.wkv", "compressor.wgate", "weights_proj", "gate", "head")
    assert not any(name.endswith(kept) for name in names)
    with torch.no_grad():
        want = rounded_parameters(aware(linears="fp8"), linears=True)
        assert torch.equal(model(IDS).logits, want(IDS).logits)  # the weights are rounded: rounding again is nothing
        module = model.layers[0].attn.wq_a
        x = torch.randn(2, 3, module.in_features)
        weight = fake_quant(module.weight, "e4m3", block=(128, 128))
        assert torch.equal(module(x), torch.nn.functional.linear(fake_quant(x, "e4m3", block=(1, 128)), weight))
        attention = model.layers[0].attn
        out = torch.randn(1, 3, model.config.num_attention_heads, model.config.head_dim)
        first = attention._project(out)
        assert torch.equal(
            first,
            attention._project(
                fake_quant(out.flatten(2).view(1, 3, model.config.o_groups, -1), "e4m3", block=(1, 128)).view(out.shape)
            ),
        )
        assert not torch.equal(first, aware().layers[0].attn._project(out))


def test_index_queries_and_keys_are_rounded(monkeypatch):
    found = []
    from abyssal.model import attention

    stock = attention.index_topk

    def watched(q, weights, keys, **options):
        found.append((q, keys))
        return stock(q, weights, keys, **options)

    monkeypatch.setattr(attention, "index_topk", watched)
    with torch.no_grad():
        aware()(IDS), aware(index="fp4")(IDS)
    assert len(found) % 2 == 0 and len(found) > 1
    (q, keys), (rounded_q, rounded_keys) = found[0], found[len(found) // 2]
    for x, y in ((q, rounded_q), (keys, rounded_keys)):
        assert torch.equal(fake_quant(hadamard(x), "e2m1", block=(1, 32)), y)


@pytest.mark.parametrize("families", [{family: format} for family, format in FAMILIES.items()] + [FAMILIES])
@pytest.mark.parametrize("storage", ["exact", "released"])
def test_decode_rounds_as_the_model_does(monkeypatch, families, storage):
    """Token by token, with no numpy path that would not."""
    model = aware(**families).double()
    taken = []
    monkeypatch.setattr(decode_module.Decoder, "__call__", lambda *_: taken.append(1))
    with torch.no_grad():
        want = model(IDS[:1, :11], cache=model.new_cache(1, 64, storage=storage)).logits
        cache = model.new_cache(1, 64, storage=storage)
        got = torch.cat([model(IDS[:1, i : i + 1], cache=cache).logits for i in range(11)], 1)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        single = aware(**families)
        cache = single.new_cache(1, 8, storage=storage)
        assert single(IDS[:1, :1], cache=cache).logits.isfinite().all() and not taken
        assert aware().config.quantization_aware is None
        with pytest.raises(TypeError):
            aware()(IDS[:1, :1], cache=aware().new_cache(1, 8))  # the exact model does take it


def test_it_trains():
    torch.manual_seed(0)
    model = aware(**FAMILIES).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(IDS, targets=IDS.roll(-1, 1)).losses["lm"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ({"experts": "fp16"}, r"^quantization_aware.experts='fp16': allowed is 'fp4' or 'fp8', or none"),
        ({"linears": "fp4"}, r"^quantization_aware.linears='fp4': allowed is 'fp8', or none"),
        ({"index": "fp8"}, r"^quantization_aware.index='fp8': allowed is 'fp4', or none"),
        ({"linear": "fp8"}, r"quantization_aware.linear'.*nearest known key is 'quantization_aware.linears'"),
    ],
)
def test_errors_name_the_family_and_what_is_allowed(families, message):
    with pytest.raises(ValueError, match=message):
        aware(**families)


def test_widths_that_the_formats_do_not_fit():
    config = ModelConfig.load("nano").to_dict()
    for change, message in (
        (
            {"hidden_size": 48, "quantization_aware": {"experts": "fp4"}},
            r"^hidden_size=48: .*quantization_aware.experts",
        ),
        ({"index_head_dim": 48, "quantization_aware": {"index": "fp4"}}, r"^index_head_dim=48: .*_aware.index"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig.from_dict({**config, **change})


def test_a_model_on_meta_has_the_same_tensors():
    config = ModelConfig.from_dict({**ModelConfig.load("nano").to_dict(), **WIDTHS, "quantization_aware": FAMILIES})
    with torch.device("meta"):
        model = Transformer(config)
    assert model.state_dict().keys() == aware().state_dict().keys()

"""mHC against a plain float64 oracle: coefficients, collapse, recombination and their gradients.

Axes: n streams (j source, k target) · d width.
"""

import inspect

import pytest
import torch
from hyper_cases import EPS, MISTAKES, NAMES, check, gradients, inputs, oracle_sublayer, rms_error, sublayer
from torch import Tensor

from abyssal.kernels.hyper import (
    eager,
    hyper_coefficients,
    hyper_collapse,
    hyper_head_weights,
    hyper_read,
    hyper_recombine,
)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
@pytest.mark.parametrize("n", [1, 3, 4, 8])
def test_forward_and_gradients_follow_the_oracle(n: int, lead: tuple[int, ...]) -> None:
    arguments = [x.requires_grad_() for x in inputs(lead, n, 7)]
    want = oracle_sublayer(*arguments)
    wanted = gradients(want, arguments)
    for at_once in (False, True):
        got = sublayer(*arguments, at_once=at_once)
        for name in want:
            check(name, got[name], want[name], 1e-12)
        for name, mine, theirs in zip(NAMES, gradients(got, arguments), wanted):
            check(f"gradient of {name}", mine, theirs, 1e-10)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_oracle_tells_mistakes_apart(mistake: str) -> None:
    arguments = inputs((6,), 4, 7)
    got, wrong = sublayer(*arguments), oracle_sublayer(*arguments, mistake=mistake)
    assert max(rms_error(got[name], wrong[name]) for name in wrong) > 1e-9


@pytest.mark.parametrize("std", [1.0, 4.0])
def test_float32_keeps_its_precision_with_sharp_logits(std: float) -> None:
    arguments = inputs((301,), 4, 24, torch.float32, std)
    exact = [x.double().requires_grad_() for x in arguments]
    arguments = [x.requires_grad_() for x in arguments]
    got, want = sublayer(*arguments), oracle_sublayer(*exact)
    for name in want:
        assert got[name].dtype == torch.float32
        check(name, got[name], want[name], 2e-6)
    for name, mine, theirs in zip(NAMES, gradients(got, arguments), gradients(want, exact)):
        check(f"gradient of {name}", mine, theirs, 5e-6)


def comb_of(logits: Tensor, iterations: int) -> Tensor:
    """Sinkhorn alone, of logits [n, n]: they are the static part, and the projection is zero."""
    n = logits.shape[-1]
    static = torch.cat([logits.new_zeros(2 * n), logits.flatten()])
    streams, fn = logits.new_ones(1, n, 2), logits.new_zeros((n + 2) * n, 2 * n)
    return hyper_coefficients(streams, fn, static, logits.new_ones(3), iterations=iterations).comb[0]


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_sinkhorn_gradient(n: int, iterations: int) -> None:
    torch.manual_seed(0)
    logits = (2 * torch.randn(n, n, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: comb_of(x, iterations), logits)


def test_sinkhorn_gradient_of_saturated_logits_is_finite() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 0.0]]).requires_grad_()
    comb = comb_of(logits, 20)
    (grad,) = torch.autograd.grad(comb[0, 0].sum(), logits)
    assert torch.isfinite(comb).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("std", [0.1, 1.0, 4.0])
def test_columns_of_comb_sum_to_one(std: float) -> None:
    streams, fn, base, scale, _ = inputs((200,), 4, 16, torch.float32, std)
    comb = hyper_coefficients(streams, fn, base, scale).comb
    assert (comb.sum(-2) - 1).abs().max() < 1e-5
    assert comb.min() >= 0
    if std < 1:
        assert (comb.sum(-1) - 1).abs().max() < 1e-5


def test_one_stream_is_a_scaled_residual() -> None:
    streams, fn, base, scale, y = inputs((9,), 1, 16)
    _, post, comb = hyper_coefficients(streams, fn, base, scale)
    assert (comb - 1).abs().max() < 1e-5
    check("mixed", hyper_recombine(y, streams, post, comb), post[..., None] * y[:, None] + streams, 1e-5)


def test_options_reach_the_arithmetic() -> None:
    arguments = inputs((5,), 4, 7)
    arguments[0] = arguments[0] * 1e-3
    got = sublayer(*arguments, iterations=3, norm_eps=1e-5)
    want = oracle_sublayer(*arguments, iterations=3, norm_eps=1e-5)
    for name in want:
        check(name, got[name], want[name], 1e-12)
    assert rms_error(got["pre"], hyper_coefficients(*arguments[:4], norm_eps=1e-6).pre) > 1e-3
    assert hyper_coefficients(*arguments[:4], eps=0.5).pre.min() > 0.5


@pytest.mark.parametrize("n", [1, 4])
def test_head_weights(n: int) -> None:
    torch.manual_seed(0)
    streams = (3 * torch.randn(2, 5, n, 6, dtype=torch.float64)).requires_grad_()
    fn = torch.randn(n, n * 6, dtype=torch.float64).requires_grad_()
    base, scale = (torch.randn(size, dtype=torch.float64).requires_grad_() for size in (n, 1))
    flat = streams.flatten(-2)
    mix = torch.einsum("bti,mi->btm", flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt(), fn)
    want = torch.sigmoid(mix * scale + base) + EPS
    check("weights", hyper_head_weights(streams, fn, base, scale), want, 1e-12)
    assert torch.autograd.gradcheck(hyper_head_weights, (streams, fn, base, scale))


def test_zero_tokens() -> None:
    arguments = [x.requires_grad_() for x in inputs((2, 0), 4, 8, torch.float32)]
    results = sublayer(*arguments)
    assert results["comb"].shape == (2, 0, 4, 4) and results["mixed"].shape == (2, 0, 4, 8)
    for argument, grad in zip(arguments, gradients(results, arguments)):
        assert grad.shape == argument.shape and not grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_streams_are_rounded_once(dtype: torch.dtype) -> None:
    arguments = inputs((40,), 4, 16, dtype)
    want = oracle_sublayer(*(x.double() for x in arguments))
    got = sublayer(*arguments)
    for name in ("pre", "post", "comb"):
        assert got[name].dtype == torch.float32
        check(name, got[name], want[name], 2e-6)
    half_step = torch.finfo(dtype).eps / 2
    for name in ("collapsed", "mixed"):
        assert got[name].dtype == dtype
        worst = ((got[name].double() - want[name]).abs() / want[name].abs().clamp_min(0.05)).max()
        assert worst < 1.01 * half_step, f"{name}: {worst:.2e} is more than one rounding"


def test_mixed_dtypes_and_gradients_in_the_dtype_of_each_input() -> None:
    streams, fn, base, scale, y = inputs((2, 33), 4, 16, torch.float32)
    arguments = [streams, fn.bfloat16(), base, scale, y.bfloat16()]
    arguments = [x.requires_grad_() for x in arguments]
    got = sublayer(*arguments)
    exact = [x.detach().double().requires_grad_() for x in arguments]
    want = oracle_sublayer(*exact)
    assert got["mixed"].dtype == got["collapsed"].dtype == torch.float32
    for argument, mine, theirs in zip(arguments, gradients(got, arguments), gradients(want, exact)):
        assert mine.dtype == argument.dtype
        check("gradient", mine, theirs, 4e-3 if argument.dtype == torch.bfloat16 else 5e-6)


def test_autocast_changes_nothing() -> None:
    arguments = [x.requires_grad_() for x in inputs((2, 33), 4, 16, torch.float32)]
    plain = sublayer(*arguments)
    plain_gradients = gradients(plain, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        cast = sublayer(*arguments)
        cast_gradients = gradients(cast, arguments)
    for name in plain:
        assert torch.equal(plain[name], cast[name]), name
    assert all(torch.equal(a, b) for a, b in zip(plain_gradients, cast_gradients))


def test_apart_and_at_once_are_the_same() -> None:
    arguments = [x.requires_grad_() for x in inputs((2, 33), 4, 16, torch.float32)]
    apart, at_once = (sublayer(*arguments, at_once=x, iterations=7, eps=1e-5, norm_eps=1e-3) for x in (False, True))
    assert all(torch.equal(apart[name], at_once[name]) for name in apart)
    for name, a, b in zip(NAMES, gradients(apart, arguments), gradients(at_once, arguments)):
        check(f"gradient of {name}", a, b, 1e-6)


def test_nan_stays_in_its_token() -> None:
    arguments = [x.requires_grad_() for x in inputs((9,), 4, 16, torch.float32)]
    want = sublayer(*arguments)
    wants = gradients(want, arguments)
    arguments[0].data[4, 2, 7] = float("nan")
    got = sublayer(*arguments)
    others = torch.arange(9) != 4
    for name, mine, theirs in [
        *((k, got[k], want[k]) for k in want),
        ("gradient", gradients(got, arguments)[0], wants[0]),
    ]:
        assert torch.equal(mine[others], theirs[others]) and mine[4].isnan().any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_tokens_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [x.requires_grad_() for x in inputs((2, 37), 4, 16, dtype)]
    whole = sublayer(*arguments)
    whole_gradients = gradients(whole, arguments)
    monkeypatch.setattr(eager, "_BLOCK_VALUES", 5 * 4 * 16)
    monkeypatch.setattr(eager, "_BLOCK_TOKENS", 11)
    blocks = sublayer(*arguments)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    for name in whole:
        check(name, blocks[name], whole[name], tolerance)
    for mine, theirs in zip(gradients(blocks, arguments), whole_gradients):
        check("gradient", mine, theirs, tolerance)


def test_the_same_bits_on_every_run() -> None:
    arguments = [x.requires_grad_() for x in inputs((1500,), 4, 32, torch.float32)]
    first, second = sublayer(*arguments), sublayer(*arguments)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(a, b) for a, b in zip(gradients(first, arguments), gradients(second, arguments)))


def test_streams_need_not_be_contiguous() -> None:
    token, fn, base, scale, y = inputs((2, 5), 1, 7)
    fn, base, scale = inputs((), 4, 7)[1:4]
    streams = token.expand(2, 5, 4, 7).requires_grad_()
    got, want = sublayer(streams, fn, base, scale, y), oracle_sublayer(streams, fn, base, scale, y)
    for name in want:
        check(name, got[name], want[name], 1e-12)
    check("gradient", gradients(got, [streams])[0], gradients(want, [streams])[0], 1e-10)


@pytest.mark.parametrize("wanted", range(5))
def test_each_gradient_alone(wanted: int) -> None:
    arguments = inputs((6,), 4, 7)
    arguments[wanted].requires_grad_()
    got, want = sublayer(*arguments), oracle_sublayer(*arguments)
    results = [{name: x for name, x in y.items() if x.requires_grad} for y in (got, want)]
    check("gradient", *(gradients(x, [arguments[wanted]])[0] for x in results), tolerance=1e-10)


def test_saved_memory_is_the_streams_and_a_few_numbers_per_token() -> None:
    n, d, tokens = 4, 64, 100
    arguments = [x.requires_grad_() for x in inputs((tokens,), n, d, torch.float32)]
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        results = sublayer(*arguments)
    known = sum(x.nbytes for x in arguments)
    assert sum(saved.values()) - known <= 5 * (n * n + 2 * n) * tokens * 4
    assert results["mixed"].requires_grad


def test_errors_name_the_argument() -> None:
    streams, fn, base, scale, y = inputs((3,), 4, 8)
    pre, post, comb = hyper_coefficients(streams, fn, base, scale)
    wrong = {
        "streams": lambda: hyper_coefficients(streams.long(), fn, base, scale),
        "fn": lambda: hyper_coefficients(streams, fn[:-1], base, scale),
        "base": lambda: hyper_coefficients(streams, fn, base[:-1], scale),
        "scale": lambda: hyper_coefficients(streams, fn, base, scale[:1]),
        "iterations=0": lambda: hyper_coefficients(streams, fn, base, scale, iterations=0),
        "eps=0": lambda: hyper_coefficients(streams, fn, base, scale, eps=0),
        "pre": lambda: hyper_collapse(streams, pre[:2]),
        "output": lambda: hyper_recombine(y[:, :4], streams, post, comb),
        "post": lambda: hyper_recombine(y, streams, post[:, :3], comb),
        "comb": lambda: hyper_recombine(y, streams, post, comb[:, :3]),
    }
    for name, call in wrong.items():
        with pytest.raises(ValueError, match=f"^{name}:"):
            call()


@pytest.mark.parametrize(
    "function", [hyper_coefficients, hyper_collapse, hyper_read, hyper_recombine, hyper_head_weights]
)
def test_the_reference_has_the_public_signature(function) -> None:
    public = dict(inspect.signature(function).parameters)
    public.pop("backend")
    twin = inspect.signature(getattr(eager, function.__name__)).parameters
    assert {k: (v.kind, v.default) for k, v in public.items()} == {k: (v.kind, v.default) for k, v in twin.items()}


def test_transformers_agrees() -> None:
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as peer
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    config = DeepseekV4Config(hidden_size=16, hc_mult=4)
    module = peer.DeepseekV4HyperConnection(config)
    streams, fn, base, scale, y = inputs((2, 9), 4, 16, torch.float32, std=2.0)
    module.load_state_dict({"fn": fn, "base": base, "scale": scale})
    post, comb, collapsed = module(streams)
    got = sublayer(streams, fn, base, scale, y)
    check("post", got["post"], post, 1e-6)
    check("comb", got["comb"], comb, 1e-6)
    check("collapsed", got["collapsed"], collapsed, 1e-6)

    head = peer.DeepseekV4HyperHead(config)
    head.load_state_dict({"hc_fn": fn[:4], "hc_base": base[:4], "hc_scale": scale[:1]})
    weights = hyper_head_weights(streams, fn[:4], base[:4], scale[:1])
    check("head", hyper_collapse(streams, weights), head(streams), 1e-6)

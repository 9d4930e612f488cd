"""mHC against a plain float64 oracle: coefficients, collapse, recombination and their gradients.

Axes: n streams (j source, k target) · d width.
"""

import inspect

import pytest
import torch
from torch import Tensor

from abyssal.kernels.hyper import hyper_coefficients, hyper_collapse, hyper_head_weights, hyper_recombine, reference

EPS = 1e-6
MISTAKES = (
    "post without the 2",
    "comb not transposed",
    "rows first",
    "no eps on pre",
    "eps on post",
    "normalised streams read",
    "pre | comb | post",
    "no eps in the softmax",
    "one round too many",
)


def check(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error = rms_error(got, want)
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    assert error < tolerance, f"{name}: relative RMS error {error:.2e}, allowed {tolerance:.0e}"


def rms_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def oracle_sinkhorn(logits: Tensor, iterations: int, mistake: str) -> Tensor:
    if mistake == "one round too many":
        iterations += 1
    comb = torch.exp(logits - logits.max(-1, keepdim=True).values)
    comb = comb / comb.sum(-1, keepdim=True)
    if mistake != "no eps in the softmax":
        comb = comb + EPS
    axes = [-2] + [-1, -2] * (iterations - 1)
    if mistake == "rows first":
        axes = [-1, -2] * iterations
        axes[-1:] = []
    for axis in axes:
        comb = comb / (comb.sum(axis, keepdim=True) + EPS)
    return comb


def oracle_sublayer(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    y: Tensor,
    *,
    iterations: int = 20,
    norm_eps: float = 1e-6,
    mistake: str = "",
) -> dict[str, Tensor]:
    """Everything one sublayer computes, stream by stream."""
    n = streams.shape[-2]
    flat = torch.cat(streams.unbind(-2), -1)
    r = 1 / (flat.square().mean(-1, keepdim=True) + norm_eps).sqrt()
    mix = torch.stack([(flat * row).sum(-1) for row in fn], -1) * r
    at = {"pre": 0, "post": n, "comb": 2 * n}
    if mistake == "pre | comb | post":
        at = {"pre": 0, "post": n + n * n, "comb": n}
    size = {"pre": n, "post": n, "comb": n * n}
    part = {key: slice(at[key], at[key] + size[key]) for key in at}
    logits = {key: mix[..., part[key]] * scale[i] + base[part[key]] for i, key in enumerate(at)}
    pre = 1 / (1 + torch.exp(-logits["pre"])) + (0 if mistake == "no eps on pre" else EPS)
    post = (1 if mistake == "post without the 2" else 2) / (1 + torch.exp(-logits["post"]))
    if mistake == "eps on post":
        post = post + EPS
    comb = oracle_sinkhorn(logits["comb"].unflatten(-1, (n, n)), iterations, mistake)
    read = [x * r for x in streams.unbind(-2)] if mistake == "normalised streams read" else streams.unbind(-2)
    collapsed = sum(pre[..., j, None] * read[j] for j in range(n))
    mixing = comb.mT if mistake == "comb not transposed" else comb
    mixed = [
        post[..., k, None] * y + sum(mixing[..., j, k, None] * streams[..., j, :] for j in range(n)) for k in range(n)
    ]
    return {"pre": pre, "post": post, "comb": comb, "collapsed": collapsed, "mixed": torch.stack(mixed, -2)}


def sublayer(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, y: Tensor, **options) -> dict[str, Tensor]:
    pre, post, comb = hyper_coefficients(streams, fn, base, scale, **options)
    collapsed = hyper_collapse(streams, pre)
    return {
        "pre": pre,
        "post": post,
        "comb": comb,
        "collapsed": collapsed,
        "mixed": hyper_recombine(y, streams, post, comb),
    }


def inputs(
    lead: tuple[int, ...], n: int, d: int, dtype: torch.dtype = torch.float64, std: float = 1.0, seed: int = 0
) -> list[Tensor]:
    """Streams of a scale far from one, and comb logits with standard deviation `std`."""
    torch.manual_seed(seed)
    m = (n + 2) * n
    streams = 3 * torch.randn(*lead, n, d, dtype=torch.float64)
    fn = torch.randn(m, n * d, dtype=torch.float64) / (n * d) ** 0.5
    scale = torch.tensor([0.7, 1.3, 0.7 * std], dtype=torch.float64)
    base = torch.randn(m, dtype=torch.float64)
    base[2 * n :] *= 0.7 * std
    y = torch.randn(*lead, d, dtype=torch.float64)
    return [
        streams.to(dtype),
        *(x.to(torch.promote_types(dtype, torch.float32)) for x in (fn, base, scale)),
        y.to(dtype),
    ]


def gradients(results: dict[str, Tensor], arguments: list[Tensor], seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    weights = [torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for x in results.values()]
    return list(torch.autograd.grad(list(results.values()), arguments, weights))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
@pytest.mark.parametrize("n", [1, 3, 4, 8])
def test_forward_and_gradients_follow_the_oracle(n: int, lead: tuple[int, ...]) -> None:
    arguments = [x.requires_grad_() for x in inputs(lead, n, 7)]
    got, want = sublayer(*arguments), oracle_sublayer(*arguments)
    for name in want:
        check(name, got[name], want[name], 1e-12)
    names = ("streams", "fn", "base", "scale", "output")
    for name, mine, theirs in zip(names, gradients(got, arguments), gradients(want, arguments)):
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
    for name, mine, theirs in zip(
        ("streams", "fn", "base", "scale", "output"), gradients(got, arguments), gradients(want, exact)
    ):
        check(f"gradient of {name}", mine, theirs, 5e-6)


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_sinkhorn_gradient(n: int, iterations: int) -> None:
    torch.manual_seed(0)
    logits = (2 * torch.randn(n, n, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference._Sinkhorn.apply(x, iterations, EPS), logits)


def test_sinkhorn_gradient_of_saturated_logits_is_finite() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 0.0]])[..., None].requires_grad_()
    comb = reference._Sinkhorn.apply(logits, 20, EPS)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_tokens_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [x.requires_grad_() for x in inputs((2, 37), 4, 16, dtype)]
    whole = sublayer(*arguments)
    whole_gradients = gradients(whole, arguments)
    monkeypatch.setattr(reference, "_BLOCK_VALUES", 5 * 4 * 16)
    monkeypatch.setattr(reference, "_BLOCK_TOKENS", 11)
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


@pytest.mark.parametrize("function", [hyper_coefficients, hyper_collapse, hyper_recombine, hyper_head_weights])
def test_the_reference_has_the_public_signature(function) -> None:
    public = dict(inspect.signature(function).parameters)
    public.pop("backend")
    twin = inspect.signature(getattr(reference, function.__name__)).parameters
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

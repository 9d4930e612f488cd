"""RMSNorm and RoPE against float64 oracles, with gradients; the frequencies against the specification and transformers.

Axes: b batch · t positions · h heads · D channels, the last `dim` of them rotated.
"""

import inspect
import math

import pytest
import torch
from torch import Tensor

from abyssal.kernels.norm_rope import eager, norm_rope, rms_norm, rope, rope_frequencies, rope_rotation


def check(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    error = rms_error(got, want)
    assert error < tolerance, f"{name}: relative RMS error {error:.2e}, allowed {tolerance:.0e}"


def rms_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def oracle_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    rows = []
    for row in x.flatten(0, -2):
        mean = sum(value * value for value in row) / len(row)
        rows.append(row / (mean + eps).sqrt() * (1 if weight is None else weight))
    return torch.stack(rows).view(x.shape)


def norm_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = 3 * torch.randn(shape, dtype=torch.float64) * torch.rand(*shape[:-1], 1, dtype=torch.float64)
    weight = torch.randn(shape[-1], dtype=torch.float64)
    return x.to(dtype), weight.to(torch.promote_types(dtype, torch.float32))


def norm_gradients(y: Tensor, arguments: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(y, arguments, torch.randn(y.shape, dtype=torch.float64).to(y.dtype))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 1), (2, 3, 8), (2, 3, 2, 5)])
def test_norm_follows_the_oracle(shape: tuple[int, ...], weighted: bool) -> None:
    x, weight = norm_inputs((1, *shape))
    x = x.reshape(shape).requires_grad_()
    arguments = [x, weight.requires_grad_()] if weighted else [x]
    scale = weight if weighted else None
    got, want = rms_norm(x, scale, 0.3), oracle_norm(x.unsqueeze(0), scale, 0.3).squeeze(0)
    check("normed", got, want, 1e-13)
    for mine, theirs in zip(norm_gradients(got, arguments), norm_gradients(want, arguments)):
        check("gradient", mine, theirs, 1e-12)


def test_norm_accepts_any_small_eps_and_zero_rows() -> None:
    x, weight = (value.requires_grad_() for value in norm_inputs((4, 8), torch.float32))
    with torch.no_grad():
        x[1] = 0
    y = rms_norm(x, weight, 1e-20)
    assert not y[1].any() and all(torch.isfinite(grad).all() for grad in norm_gradients(y, [x, weight]))
    check("normed", y, torch.nn.functional.rms_norm(x, (8,), weight, 1e-20), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [True, False])
def test_norm_in_low_precision_is_rounded_once(weighted: bool, dtype: torch.dtype) -> None:
    x, weight = norm_inputs((3, 9, 33), dtype)
    scale = weight if weighted else None
    got = rms_norm(x, scale, 1e-6)
    want = oracle_norm(x.double(), weight.double() if weighted else None, 1e-6)
    assert got.dtype == dtype
    worst = ((got.double() - want).abs() / want.abs().clamp_min(1e-2)).max()
    assert worst < 1.01 * torch.finfo(dtype).eps / 2, f"{worst:.2e} is more than one rounding"


def test_norm_gradients_have_the_dtype_of_their_input() -> None:
    x, weight = norm_inputs((3, 50, 33), torch.float32)
    for dtypes in [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]:
        arguments = [value.to(dtype).requires_grad_() for value, dtype in zip((x, weight), dtypes)]
        exact = [value.detach().double().requires_grad_() for value in arguments]
        got, want = rms_norm(*arguments, 1e-6), oracle_norm(*exact, 1e-6)
        for argument, mine, theirs in zip(arguments, norm_gradients(got, arguments), norm_gradients(want, exact)):
            assert mine.dtype == argument.dtype
            check("gradient", mine, theirs, 5e-3)


@pytest.mark.parametrize("wanted", [0, 1])
def test_each_norm_gradient_alone(wanted: int) -> None:
    arguments = norm_inputs((3, 4, 5))
    arguments[wanted].requires_grad_()
    results = [function(*arguments, 1e-6) for function in (rms_norm, oracle_norm)]
    check("gradient", *(norm_gradients(y, [arguments[wanted]])[0] for y in results), tolerance=1e-12)


def test_norm_in_blocks_under_autocast_and_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [value.requires_grad_() for value in norm_inputs((2, 37, 8), torch.float32)]
    whole = rms_norm(*arguments, 1e-6)
    grads = norm_gradients(whole, list(arguments))
    with torch.autocast("cpu", torch.bfloat16):
        cast = rms_norm(*arguments, 1e-6)
        assert torch.equal(cast, whole)
        assert all(torch.equal(a, b) for a, b in zip(norm_gradients(cast, list(arguments)), grads))
    monkeypatch.setattr(eager, "_BLOCK_VALUES", 5 * 8)
    blocks = rms_norm(*arguments, 1e-6)
    check("normed", blocks, whole, 1e-7)
    for mine, theirs in zip(norm_gradients(blocks, list(arguments)), grads):
        check("gradient", mine, theirs, 1e-6)
    empty = arguments[0][:, :0]
    assert rms_norm(empty, arguments[1], 1e-6).shape == (2, 0, 8)
    assert not norm_gradients(rms_norm(empty, arguments[1], 1e-6), [arguments[1]])[0].any()


def test_norm_gives_the_same_bits_on_every_run() -> None:
    arguments = [value.requires_grad_() for value in norm_inputs((3000, 96), torch.float32)]
    runs = [norm_gradients(rms_norm(*arguments, 1e-6), list(arguments)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def oracle_rope(x: Tensor, positions: Tensor, frequencies: Tensor, *, layout: str = "interleaved last") -> Tensor:
    """Pair by pair, with cosines and sines."""
    dim = 2 * len(frequencies)
    start = x.shape[-1] - dim if layout.endswith("last") else 0
    channels = list(x.unbind(-1))
    angles = positions.double()[..., None] * frequencies.double()
    for j in range(dim // 2):
        first, second = (2 * j, 2 * j + 1) if layout.startswith("interleaved") else (j, j + dim // 2)
        angle = angles[..., j].reshape(*angles.shape[:2], *[1] * (x.ndim - 3))
        a, b = x[..., start + first], x[..., start + second]
        channels[start + first] = a * angle.cos() - b * angle.sin()
        channels[start + second] = a * angle.sin() + b * angle.cos()
    return torch.stack(channels, -1)


def rope_inputs(between: tuple[int, ...], d: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 9, *between, d, dtype=torch.float64)
    positions = torch.stack([torch.arange(9), torch.randperm(200)[:9]])
    return x, positions, rope_frequencies(dim, 100.0)


@pytest.mark.parametrize("between", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("d", "dim"), [(8, 4), (6, 6), (7, 2)])
def test_rope_follows_the_oracle(between: tuple[int, ...], d: int, dim: int) -> None:
    x, positions, frequencies = rope_inputs(between, d, dim)
    rotation = rope_rotation(positions, frequencies)
    want = oracle_rope(x, positions, frequencies)
    check("rotated", rope(x, rotation), want, 1e-5)
    check("rotated back", rope(x, rotation, inverse=True), oracle_rope(x, -positions, frequencies), 1e-5)
    check("there and back", rope(rope(x, rotation), rotation, inverse=True), x, 1e-6)
    shared = rope_rotation(positions[:1], frequencies)
    check("shared positions", rope(x, shared), oracle_rope(x, positions[:1], frequencies), 1e-6)


@pytest.mark.parametrize("layout", ["half-split last", "interleaved first"])
def test_the_rope_oracle_tells_layouts_apart(layout: str) -> None:
    x, positions, frequencies = rope_inputs((3,), 8, 4)
    got = rope(x, rope_rotation(positions, frequencies))
    assert rms_error(got, oracle_rope(x, positions, frequencies, layout=layout)) > 1e-1


def test_rope_sees_relative_positions_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 12, 16, dtype=torch.float64)
    frequencies = rope_frequencies(8, 50.0)

    def scores(shift: int) -> Tensor:
        rotation = rope_rotation(torch.arange(12)[None] + shift, frequencies)
        return rope(q, rotation) @ rope(k, rotation).mT

    check("scores", scores(700), scores(0), 1e-4)
    assert rms_error(q @ k.mT, scores(0)) > 1e-1


@pytest.mark.parametrize("inverse", [True, False])
def test_rope_gradient(inverse: bool) -> None:
    x, positions, frequencies = rope_inputs((2,), 6, 4)
    rotation = rope_rotation(positions, frequencies)
    assert torch.autograd.gradcheck(lambda y: rope(y, rotation, inverse=inverse), x.requires_grad_())
    strided = torch.randn(2, 2, 9, 7, dtype=torch.float64)[..., 1:].transpose(1, 2).requires_grad_()
    assert torch.equal(rope(strided, rotation), rope(strided.contiguous(), rotation))
    assert torch.autograd.gradcheck(lambda y: rope(y, rotation, inverse=inverse), strided)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rope_keeps_the_dtype_and_rounds_once(dtype: torch.dtype) -> None:
    x, positions, frequencies = rope_inputs((3,), 8, 4)
    x = x.to(dtype).requires_grad_()
    before = x.detach().clone()
    rotation = rope_rotation(positions, frequencies)
    got, want = rope(x, rotation), rope(x.double(), rotation)
    assert got.dtype == dtype and torch.equal(x, before)
    assert torch.equal(got[..., :4], x[..., :4])
    step = 1.01 * torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 1e-6
    assert ((got - want).abs() / want.abs().clamp_min(0.1)).max() < step
    (grad,) = torch.autograd.grad(got, x, torch.ones_like(got))
    assert grad.dtype == dtype


def test_rope_saves_the_rotation_only_and_takes_no_tokens() -> None:
    x, positions, frequencies = rope_inputs((3,), 8, 4)
    rotation = rope_rotation(positions, frequencies)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: saved.append(y.untyped_storage().data_ptr()), lambda y: y):
        rope(x.requires_grad_(), rotation)
    assert saved == [rotation.untyped_storage().data_ptr()]
    assert rope(x[:, :0], rotation[:, :0]).shape == (2, 0, 3, 8)


def test_rotation_takes_the_angle_in_float32() -> None:
    positions = torch.tensor([[0, 1, 1_000_003]])
    frequencies = rope_frequencies(8, 10000.0)
    rotation = rope_rotation(positions, frequencies)
    assert rotation.dtype == torch.complex64 and rotation.shape == (1, 3, 4)
    angle = positions.float()[..., None] * frequencies
    check("real part", rotation.real, angle.double().cos(), 1e-6)
    check("imaginary part", rotation.imag, angle.double().sin(), 1e-6)


def test_frequencies_of_the_release() -> None:
    f = rope_frequencies(64, 160000.0, factor=16, original=65536)
    assert f.dtype == torch.float32 and f.shape == (32,)
    for pair, value in {15: 3.63554e-3, 16: 2.26563e-3, 20: 2.96978e-4, 25: 5.37231e-6, 31: 5.68053e-7}.items():
        assert f[pair].item() == pytest.approx(value, rel=3e-6), f"pair {pair}"
    plain = rope_frequencies(64, 160000.0)
    assert torch.equal(f[:16], plain[:16])
    check("slowed pairs", f[25:], plain[25:] / 16, 1e-6)
    window = rope_frequencies(64, 10000.0)
    check("window layers", window, torch.tensor([10000 ** (-2 * j / 64) for j in range(32)]), 1e-6)


def test_yarn_where_the_ramp_has_no_width() -> None:
    f = rope_frequencies(8, 10000.0, factor=4, original=7, beta_fast=1, beta_slow=1)
    assert torch.isfinite(f).all()
    plain = rope_frequencies(8, 10000.0)
    for original in (1, 1 << 60):
        f = rope_frequencies(2, 10000.0, factor=4, original=original)
        assert torch.isfinite(f).all() and (f <= plain[:1]).all() and (f >= plain[:1] / 4).all()


@pytest.mark.parametrize("factor", [4.0, 16.0, 40.0])
@pytest.mark.parametrize(
    ("dim", "theta", "original"), [(64, 160000.0, 65536), (64, 1e4, 4096), (16, 160000.0, 256), (8, 1e4, 64)]
)
def test_transformers_computes_the_same_yarn(dim: int, theta: float, original: int, factor: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    config = transformers.LlamaConfig(hidden_size=dim, num_attention_heads=1, head_dim=dim, rope_parameters=parameters)
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = rope_frequencies(dim, theta, factor=factor, original=original)
    assert ((ours - theirs) / theirs).abs().max() < 1e-6
    assert not torch.allclose(ours, rope_frequencies(dim, theta)), "YaRN changes nothing at this size"


def test_errors_name_the_argument() -> None:
    x, positions, frequencies = rope_inputs((3,), 8, 4)
    rotation = rope_rotation(positions, frequencies)
    wrong = {
        "x": lambda: rms_norm(x.long(), None, 1e-6),
        "weight": lambda: rms_norm(x, torch.ones(7), 1e-6),
        "eps=-1": lambda: rms_norm(x, None, -1),
        "dim=7": lambda: rope_frequencies(7, 1e4),
        "theta=1": lambda: rope_frequencies(8, 1),
        "factor=0.5": lambda: rope_frequencies(8, 1e4, factor=0.5),
        "original=0": lambda: rope_frequencies(8, 1e4, factor=2),
        "beta_slow=3": lambda: rope_frequencies(8, 1e4, factor=2, original=9, beta_slow=3, beta_fast=2),
        "positions": lambda: rope_rotation(positions.float(), frequencies),
        "frequencies": lambda: rope_rotation(positions, frequencies[None]),
        "rotation": lambda: rope(x, rotation[:, :3]),
        "rotation: got torch.float32": lambda: rope(x, rotation.real),
        "rotation: got torch.complex64": lambda: rope(x[..., :3], rotation),
        "x: got torch.int64": lambda: norm_rope(x.long(), None, 1e-6, rotation),
        "weight: shape": lambda: norm_rope(x, torch.ones(7), 1e-6, rotation),
        "rotation: got": lambda: norm_rope(x, None, 1e-6, rotation[:, :3]),
    }
    for name, call in wrong.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
def test_norm_and_rotation_in_one_are_the_two_in_turn(weighted: bool, dtype: torch.dtype) -> None:
    x, positions, frequencies = rope_inputs((3,), 8, 4)
    rotation, weight = rope_rotation(positions, frequencies), torch.randn(8, dtype=torch.float64)
    arguments = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()][: 2 if weighted else 1]

    def composed(x: Tensor, w: Tensor | None = None) -> Tensor:
        return rope(rms_norm(x, w, 0.3), rotation)

    got, want = norm_rope(arguments[0], *(arguments[1:] or [None]), 0.3, rotation), composed(*arguments)
    assert torch.equal(got, want) and got.dtype == dtype
    for mine, theirs in zip(norm_gradients(got, arguments), norm_gradients(want, arguments)):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("function", [rms_norm, rope, norm_rope])
def test_the_reference_has_the_public_signature(function) -> None:
    public = dict(inspect.signature(function).parameters)
    public.pop("backend")
    twin = inspect.signature(getattr(eager, function.__name__)).parameters
    assert {k: (v.kind, v.default) for k, v in public.items()} == {k: (v.kind, v.default) for k, v in twin.items()}


def test_correction_range_of_the_specification() -> None:
    low, high = (64 * math.log(65536 / (2 * math.pi * beta)) / (2 * math.log(160000)) for beta in (32, 1))
    assert (round(low, 3), round(high, 3)) == (15.453, 24.708)
    ratio = rope_frequencies(64, 160000.0, factor=16, original=65536) / rope_frequencies(64, 160000.0)
    ramp = (torch.arange(32) - 15).div(10).clamp(0, 1)
    check("ramp", ratio, 1 - ramp * (1 - 1 / 16), 1e-6)

"""RMSNorm and RoPE: the definitions against plain Python, the engines and the numpy step against the definitions; the
frequencies against the specification and transformers.

b batch · t positions · h heads · d channels, the last `dim` of them rotated
"""

import cmath
import importlib
import inspect
import math

import numpy as np
import pytest
import torch
from oracle import assert_same, hold, relative_rms
from torch.utils.checkpoint import checkpoint

from abyssal import kernels
from abyssal.kernels import norm_rope, rms_norm, rope, rope_frequencies, rope_rotation
from abyssal.kernels.norm_rope import eager, reference
from abyssal.kernels.norm_rope.step import head_norm_step, rms_norm_step, rope_rotation_step, rope_step

FLOATS = {
    "eager": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
ROUNDED = {torch.bfloat16: 1e-2, torch.float16: 1.3e-3}  # twice: a gradient's upstream, and the result
EPS = 0.1  # large enough to matter


@pytest.fixture
def by_triton(by_triton, emulated, monkeypatch):
    """Programs so few and small that rows need several."""
    from abyssal.kernels.norm_rope.triton import launch

    if emulated:
        monkeypatch.setattr(launch, "VALUES", 64)
        monkeypatch.setattr(launch, "PROGRAMS", 3)


@pytest.fixture
def real_memory(monkeypatch, by_triton):
    """Fake tensors cannot be filled with NaN, and gigabytes need not be."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turning(b, t, dim, device="cpu"):
    """The model's rotations, of positions up to a million."""
    positions = torch.randint(1 << 20, (b, t), generator=torch.Generator().manual_seed(b))
    return rope_rotation(positions, 0.9 ** torch.arange(dim // 2)).to(device)


def holds(op, given, engine, device):
    """In every dtype, with and without gradient, in blocks and at once; the weight stays in float32."""
    for dtype in FLOATS[engine]:
        limits = {
            name: ROUNDED.get(dtype, 1e-10 if dtype == torch.float64 else 2e-6) for name in ("out", "dx", "dweight")
        }
        for fixed in ((), given):
            got = hold(op, given, engine, dtype, kept={"weight"}, fixed=fixed, limits=limits, device=device)
            assert got["out"].dtype == dtype


@pytest.mark.parametrize("name", ["rms_norm", "rope", "norm_rope"])
def test_one_signature(engine, name):
    public = dict(inspect.signature(getattr(kernels, name)).parameters)
    public.pop("backend")
    for module in (reference, importlib.import_module(f"abyssal.kernels.norm_rope.{engine}")):
        given = inspect.signature(getattr(module, name)).parameters
        assert {k: (v.kind, v.default) for k, v in public.items()} == {k: (v.kind, v.default) for k, v in given.items()}


# the definitions -----------------------------------------------------------------------------------------------------


def test_definition_of_the_norm():
    rows, weight = [[3.0, -1.0, 0.5], [0.0, 0.0, 0.0]], [2.0, -1.0, 0.25]
    got = rms_norm(torch.tensor(rows).double(), torch.tensor(weight).double(), 0.3, backend="reference")
    want = [w * x / math.sqrt(sum(v * v for v in row) / 3 + 0.3) for row in rows for w, x in zip(weight, row)]
    assert got.flatten().tolist() == pytest.approx(want, abs=1e-15)


@pytest.mark.parametrize("inverse", [False, True])
def test_definition_of_the_rotation(inverse):
    """Two tokens of one plain channel and two pairs, which lie side by side and last."""
    x, positions, frequencies = draw(1, 2, 5).double(), [3, 11], [1.0, 0.01]
    angles = [[[cmath.exp(1j * t * f) for f in frequencies] for t in positions]]
    rotation = torch.tensor(angles, dtype=torch.complex128)
    got = rope(x, rotation, inverse=inverse, backend="reference")[0].tolist()
    for row, turned, t in zip(x[0].tolist(), got, positions):
        assert turned[0] == row[0]
        for j, f in enumerate(frequencies):
            z = complex(row[1 + 2 * j], row[2 + 2 * j]) * cmath.exp((-1j if inverse else 1j) * t * f)
            assert turned[1 + 2 * j : 3 + 2 * j] == pytest.approx([z.real, z.imag], abs=1e-15)


def test_rope_sees_relative_positions_only(engine, device):
    q, k = (draw(1, 12, 16, seed=i).to(device) for i in (1, 2))
    frequencies = rope_frequencies(8, 50.0)

    def scores(shift):
        rotation = rope_rotation(torch.arange(12)[None] + shift, frequencies).to(device)
        return rope(q, rotation, backend=engine) @ rope(k, rotation, backend=engine).mT

    assert_same("scores", scores(700), scores(0), 1e-4)
    assert relative_rms(q @ k.mT, scores(0)) > 1e-1


# the engines ---------------------------------------------------------------------------------------------------------

WIDTHS = [
    (7,),
    (1, 1),
    (5, 1),
    (2, 3, 8),
    (2, 3, 17),
    (2, 3, 2, 5),
    (5, 64),
    (3, 100),
    (2, 37, 8),
    (2, 1, 3, 48),
    (0, 5),
]
TURNS = {  # shape, dim
    **{f"{shape} of {dim}": (shape, dim) for shape in ((2, 5, 3, 16), (1, 9, 12), (3, 2, 2, 2, 11)) for dim in (2, 6)},
    "all channels": ((2, 9, 3, 6), 6),
    "odd width": ((2, 4, 1, 7), 6),
    "one token": ((3, 1, 2, 4), 4),
    "no head": ((3, 2, 4), 4),
    "no tokens": ((2, 0, 3, 8), 6),
    "no rows": ((0, 3, 8), 6),
}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [*WIDTHS, (3, 5000)], ids=str)
def test_norm(engine, shape, weighted, device, monkeypatch):
    eps = 9.0 if shape == (1, 1) else EPS  # a lone channel's gradient cancels
    given = {"x": 3 * draw(*shape), "weight": draw(shape[-1], seed=1) if weighted else None, "eps": eps}
    holds(rms_norm, given, engine, device)
    if engine == "eager":
        monkeypatch.setattr(eager, "_BLOCK_VALUES", 5 * 8)
        holds(rms_norm, given, engine, device)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("name", TURNS)
def test_rotation(engine, name, inverse, shared, device):
    shape, dim = TURNS[name]
    given = {"x": draw(*shape), "rotation": turning(1 if shared else shape[0], shape[1], dim), "inverse": inverse}
    holds(rope, given, engine, device)
    x, rotation = given["x"].to(device), given["rotation"].to(device)
    turned = rope(x, rotation, inverse=inverse, backend=engine)
    assert turned is not x and torch.equal(turned[..., : shape[-1] - dim], x[..., : shape[-1] - dim])
    assert torch.equal(turned, rope(x, rotation.conj(), inverse=not inverse, backend=engine))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", TURNS)
def test_norm_and_rotation_in_one(engine, name, weighted, device):
    shape, dim = TURNS[name]
    weight, rotation = draw(shape[-1], seed=1) if weighted else None, turning(shape[0], shape[1], dim)
    holds(norm_rope, {"x": draw(*shape), "weight": weight, "eps": EPS, "rotation": rotation}, engine, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(engine, dtype, device):
    x, weight, rotation = draw(2, 9, 33).to(device, dtype), draw(33, seed=1).to(device), turning(1, 9, 4, device)
    for op, *rest in ((rms_norm, weight, EPS), (rms_norm, None, EPS), (rope, rotation)):
        got, want = op(x, *rest, backend=engine), op(x.double(), *rest, backend="reference")
        assert got.dtype == dtype
        assert ((got - want).abs() <= 0.505 * torch.finfo(dtype).eps * want.abs().clamp_min(1e-2)).all()


def test_half_precision_weights(engine, device):
    for kept in ({"x"}, set()):
        given = {"x": draw(3, 50, 33), "weight": draw(33, seed=1), "eps": 1e-6}
        limits = dict.fromkeys(("out", "dx", "dweight"), ROUNDED[torch.bfloat16])
        got = hold(rms_norm, given, engine, torch.bfloat16, kept=kept, limits=limits, device=device)
        assert got["dweight"].dtype == torch.bfloat16
        assert got["dx"].dtype == got["out"].dtype == (torch.float32 if kept else torch.bfloat16)


def test_rows_of_zeros_at_any_small_eps(engine, device):
    x = draw(4, 8)
    x[1] = 0
    limits = {"dx": 1e-5}
    hold(rms_norm, {"x": x, "weight": draw(8), "eps": 1e-20}, engine, torch.float32, limits=limits, device=device)
    assert not rms_norm(torch.zeros(3, 5, device=device), None, 1e-20, backend=engine).any()


def learned(run, *leaves):
    """The value and the gradients of all leaves."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, draw(*out.shape, seed=1).to(out))]


def test_rows_stay_alone_and_runs_are_the_same(engine, device):
    rotation, x, weight = turning(1, 12, 4, device), draw(2, 12, 3, 16).to(device), draw(16).to(device)
    run = lambda x, w=weight: norm_rope(x, w, EPS, rotation[:, : x.shape[1]], backend=engine)  # noqa: E731
    full = learned(run, x, weight)
    assert all(torch.equal(a, b) for a, b in zip(full, learned(run, x, weight)))
    assert torch.equal(full[0][:, :7], run(x[:, :7])) and torch.equal(full[0].flip(0), run(x.flip(0)))
    spoilt, bad = x.clone(), torch.zeros_like(x, dtype=torch.bool)
    spoilt[0, 3, 1, 2], spoilt[1, 5, 2, 15], bad[0, 3, 1], bad[1, 5, 2] = math.nan, math.inf, True, True
    for a, b in zip(full, learned(run, spoilt)):
        assert torch.equal(a[~bad], b[~bad]) and b[0, 3, 1].isnan().all()


def test_strided_inputs(engine, device):
    rotation, x, weight = turning(2, 5, 4, device), draw(2, 5, 3, 16).to(device), draw(32).to(device)[::2]
    run = lambda x: norm_rope(x, weight, EPS, rotation.mT.contiguous().mT, backend=engine).cos()  # noqa: E731
    before = x.clone()
    for strided in (torch.cat([x, x], -1)[..., :16], x.transpose(0, 3).contiguous().transpose(0, 3)):
        assert all(torch.equal(a, b) for a, b in zip(learned(run, x), learned(run, strided)))
    assert torch.equal(x, before)
    leaf = x.clone().requires_grad_()
    rope(leaf, rotation, backend=engine).sum().backward()  # an expanded gradient
    assert_same("dx", leaf.grad, rope(torch.ones_like(x), rotation, inverse=True, backend="reference"), 1e-6)


def test_what_is_kept_for_the_backward_pass(engine, device):
    rotation, saved = turning(1, 5, 4, device), []
    x, weight = draw(2, 5, 3, 16).to(device).requires_grad_(), draw(16).to(device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda y: saved.append(y.nbytes) or y, lambda y: y):
        rope(x, rotation, backend=engine)
        assert sum(saved) == rotation.nbytes
        saved.clear()
        rms_norm(x, weight, EPS, backend=engine)
    assert sum(saved) == x.nbytes + weight.nbytes + 4 * 2 * 5 * 3


# as operators --------------------------------------------------------------------------------------------------------


def layer(backend, x, weight, rotation):
    q = norm_rope(x * 1.5, None, EPS, rotation, backend=backend) + norm_rope(
        x.sin(), weight, EPS, rotation, backend=backend
    )
    return rope(rms_norm(q, weight, EPS, backend=backend), rotation, inverse=True, backend=backend).cos().sum()


@pytest.fixture
def leaves(device):
    return draw(2, 4, 3, 9).to(device).requires_grad_(), draw(9).to(device).requires_grad_(), turning(1, 4, 4, device)


@pytest.mark.parametrize("op", ["norm", "weighted", "fused", "rope"])
def test_opcheck(real_memory, leaves, op):
    from abyssal.kernels.norm_rope import triton

    x, weight, rotation = leaves
    angles = triton._angles(rotation)
    if op == "rope":
        torch.library.opcheck(triton._rope, (x, angles, True))
    else:
        arguments = {"norm": (None, None), "weighted": (weight, None), "fused": (weight, angles)}[op]
        torch.library.opcheck(triton._norm, (x, *arguments, EPS))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(real_memory, leaves, dynamic):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f("triton", *leaves), leaves[:2]) for f in (layer, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(engine, leaves, reentrant):
    want = torch.autograd.grad(layer(engine, *leaves), leaves[:2])
    checkpoint(layer, engine, *leaves, use_reentrant=reentrant).backward()
    assert all(torch.equal(a, x.grad) for a, x in zip(want, leaves))


def test_some_gradients_alone_and_twice(engine, leaves, device):
    x, weight, rotation = leaves
    run = lambda x, w: norm_rope(x, w, EPS, rotation, backend=engine)  # noqa: E731
    want = torch.autograd.grad(run(x, weight).sum(), (x, weight))
    for i, some in enumerate(((x, weight.detach()), (x.detach(), weight))):
        loss = run(*some).sum()
        for _ in range(2):
            assert torch.equal(torch.autograd.grad(loss, some[i], retain_graph=True)[0], want[i])
    with torch.no_grad():
        assert not run(x, weight).requires_grad
    with torch.autocast(device, torch.bfloat16):
        cast = run(x, weight)
    assert cast.dtype == torch.float32 and torch.equal(cast, run(x, weight))
    for a, b in zip(torch.autograd.grad(cast.sum(), (x, weight)), want):
        assert torch.equal(a, b)


# one token in numpy --------------------------------------------------------------------------------------------------

LIMITS = {np.float32: 3e-6, np.float64: 1e-13}
steps = pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: dtype.__name__)


def exact(*arrays):
    return [torch.from_numpy(x).double() for x in arrays]


def check(name, got, want):
    assert_same(name, torch.from_numpy(got), want, LIMITS[got.dtype.type])


@steps
@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("heads, width", [(1, 1), (3, 7), (5, 64)])
def test_step_norms(heads, width, eps, dtype):
    x, weight = (0.01 * draw(heads, width)).numpy().astype(dtype), draw(width).numpy().astype(dtype)
    check("head_norm", head_norm_step(x, eps), reference.rms_norm(*exact(x), None, eps))
    for row in x:
        check("rms_norm", rms_norm_step(row, weight, eps), reference.rms_norm(*exact(row, weight), eps))
    assert not rms_norm_step(x[0] * 0, weight, eps).any() and not head_norm_step(x * 0, eps).any()


@pytest.mark.parametrize("position", [0, 1, 1000, 1_000_003])
def test_step_rotation_is_that_of_the_public_op(position):
    """Also where float32 angles are coarse: they are to be the same."""
    frequencies = rope_frequencies(16, 10000.0)
    got = rope_rotation_step(position, frequencies.numpy())
    want = rope_rotation(torch.tensor([[position]]), frequencies)[0, 0].numpy()
    assert got.dtype == want.dtype and np.abs(got - want).max() < 2e-7
    twice = rope_rotation_step(position, frequencies.double().numpy())
    assert twice.dtype == np.complex128
    assert np.abs(twice - np.exp(1j * position * frequencies.double().numpy())).max() < 1e-9


@steps
@pytest.mark.parametrize("shape, dim", [((8,), 8), ((12,), 4), ((3, 7), 2), ((2, 3, 9), 6)])
def test_step_turns_in_place_and_back(shape, dim, dtype):
    x = draw(*shape).numpy().astype(dtype)
    rotation = rope_rotation_step(5, rope_frequencies(dim, 100.0).numpy().astype(dtype))
    turned = x.copy()
    rope_step(turned, rotation)
    angles = torch.from_numpy(rotation.astype(np.complex128))[None, None]
    check("turned", turned, reference.rope(*exact(x[None, None]), angles)[0, 0])
    rope_step(turned, rotation.conj())
    check("turned back", turned, *exact(x))


# at the sizes of a model on a CUDA device ----------------------------------------------------------------------------

WIDE = [64, 128, 500, 512, 4096, 7168]


@pytest.mark.gpu
@pytest.mark.parametrize("d", WIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_values_and_gradients(real_memory, dtype, d):
    x, rotation = 3 * draw(2, 301, 3, d), rope_rotation(torch.arange(301)[None] * 7, rope_frequencies(64, 1e4))
    limits = {name: ROUNDED.get(dtype, 1e-5) for name in ("out", "dx", "dweight")}
    for weight in (None, draw(d, seed=1)):
        norm = {"x": x, "weight": weight, "eps": 1e-6}
        for op, given in ((rms_norm, norm), (norm_rope, norm | {"rotation": rotation})):
            hold(op, given, "triton", dtype, kept={"weight"}, limits=limits, device="cuda")
    for inverse in (False, True):
        hold(rope, {"x": x, "rotation": rotation, "inverse": inverse}, "triton", dtype, limits=limits, device="cuda")


def on_gpu(t=1001):
    rotation = rope_rotation(torch.arange(t)[None] * 7, rope_frequencies(64, 1e4)).cuda()
    return 3 * draw(2, t, 6, 512).to("cuda", torch.bfloat16), draw(512).cuda(), rotation


@pytest.mark.gpu
def test_gpu_rows_do_not_depend_on_their_batch(real_memory):
    x, w, turn = on_gpu()
    for run in (
        lambda x, w: rms_norm(x, w, 1e-6),
        lambda x, w: norm_rope(x, w, 1e-6, turn[:, : x.shape[1]]),
        lambda x, w: rope(x, turn[:, : x.shape[1]], inverse=True) * w.to(x.dtype),
    ):
        full, again = (learned(run, x, w) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(full, again))
        assert torch.equal(full[0][:, :37], run(x[:, :37], w))


@pytest.mark.gpu
def test_gpu_graph_replays_other_values(real_memory):
    x, w, turn = on_gpu()
    dout = torch.randn_like(x)

    def step():
        leaves = [y.detach().requires_grad_() for y in (x, w)]
        return torch.autograd.grad(rope(norm_rope(*leaves, 1e-6, turn), turn, inverse=True), leaves, dout)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


@pytest.mark.gpu
def test_gpu_nothing_waits_and_one_number_per_row_is_kept(real_memory):
    x, w, turn = on_gpu()
    x, w = x.requires_grad_(), w.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        before = torch.cuda.memory_allocated()
        out = norm_rope(x, w, 1e-6, turn)
        kept = torch.cuda.memory_allocated() - before - out.nbytes
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert kept <= 4 * out.shape[:-1].numel() + 1_000_000  # x and the rotation are the caller's


# frequencies and rotations -------------------------------------------------------------------------------------------


def test_rotation_takes_the_angle_in_float32():
    positions = torch.tensor([[0, 1, 1_000_003]])
    frequencies = rope_frequencies(8, 10000.0)
    rotation = rope_rotation(positions, frequencies)
    assert rotation.dtype == torch.complex64 and rotation.shape == (1, 3, 4)
    angle = positions.float()[..., None] * frequencies
    assert_same("real part", rotation.real, angle.double().cos(), 1e-6)
    assert_same("imaginary part", rotation.imag, angle.double().sin(), 1e-6)


def test_frequencies_of_the_release():
    f = rope_frequencies(64, 160000.0, factor=16, original=65536)
    assert f.dtype == torch.float32 and f.shape == (32,)
    for pair, value in {15: 3.63554e-3, 16: 2.26563e-3, 20: 2.96978e-4, 25: 5.37231e-6, 31: 5.68053e-7}.items():
        assert f[pair].item() == pytest.approx(value, rel=3e-6), f"pair {pair}"
    plain = rope_frequencies(64, 160000.0)
    assert torch.equal(f[:16], plain[:16])
    assert_same("slowed pairs", f[25:], plain[25:] / 16, 1e-6)
    window = rope_frequencies(64, 10000.0)
    assert_same("window layers", window, torch.tensor([10000 ** (-2 * j / 64) for j in range(32)]), 1e-6)


def test_yarn_where_the_ramp_has_no_width():
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
def test_transformers_computes_the_same_yarn(dim, theta, original, factor):
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


def test_correction_range_of_the_specification():
    low, high = (64 * math.log(65536 / (2 * math.pi * beta)) / (2 * math.log(160000)) for beta in (32, 1))
    assert (round(low, 3), round(high, 3)) == (15.453, 24.708)
    ratio = rope_frequencies(64, 160000.0, factor=16, original=65536) / rope_frequencies(64, 160000.0)
    ramp = (torch.arange(32) - 15).div(10).clamp(0, 1)
    assert_same("ramp", ratio, 1 - ramp * (1 - 1 / 16), 1e-6)


def test_errors_name_the_argument():
    x, positions, frequencies = (
        torch.randn(2, 9, 3, 8),
        torch.zeros(2, 9, dtype=torch.int64),
        rope_frequencies(4, 100.0),
    )
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

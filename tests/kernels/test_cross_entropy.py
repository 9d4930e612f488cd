"""Linear cross-entropy: the definition against hand-computed numbers, both engines against the definition."""

import importlib
import importlib.util
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import distance, hold, outcome
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import cross_entropy

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF = [torch.bfloat16, torch.float16]
absent = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
runs = pytest.mark.parametrize(
    ("engine", "dtype"),
    [pytest.param("eager", dtype, id=f"eager-{name}") for name, dtype in DTYPES.items()]
    + [pytest.param("triton", DTYPES[name], id=f"triton-{name}", marks=absent) for name in list(DTYPES)[1:]],
    indirect=["engine"],
)
of_eager = pytest.mark.parametrize("engine", ["eager"], indirect=True)
of_triton = pytest.mark.parametrize("engine", [pytest.param("triton", marks=absent)], indirect=True)
short = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def launch(emulated, monkeypatch):
    """Triton's launches; where no GPU is, a vocabulary of a few hundred takes several steps."""
    module = importlib.import_module("abyssal.kernels.cross_entropy.triton.launch") if HAS_TRITON else None
    if module and emulated:
        monkeypatch.setattr(module, "next_power", lambda n, least=1: 64)
    return module


def make(n=11, v=150, d=16, ignored=0.3, size=2.0, device="cpu", **options):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(n, d, generator=g) * size, torch.randn(v, d, generator=g)
    targets = torch.randint(0, v, (n,), generator=g).masked_fill(torch.rand(n, generator=g) < ignored, -100)
    return {"x": x.to(device), "weight": weight.to(device), "targets": targets.to(device), **options}


def with_targets(change, **options):
    inputs = make(**options)
    return inputs | {"targets": change(inputs["targets"])}


def strided(**options):
    inputs = make(**options)
    spread = torch.stack([inputs["x"], torch.full_like(inputs["x"], math.nan)], -1)[..., 0]
    targets = torch.stack([inputs["targets"], inputs["targets"] + 1], -1)[:, 0]
    return inputs | {"x": spread, "weight": inputs["weight"].T.contiguous().T, "targets": targets}


CASES = {
    **{
        f"chunk={chunk} z={z} {reduction}": make(chunk=chunk, z_loss=z, reduction=reduction)
        for chunk in (1, 2, 4, 10, 11, 12, None)
        for z, reduction in ((0.0, "mean"), (0.01, "sum"), (0.01, "mean"), (0.0, "sum"))[: 4 if chunk == 4 else 2]
    },
    **{f"v={v}": make(n=5, v=v, z_loss=0.001, chunk=2) for v in (1, 63, 64, 65, 129, 260)},
    **{f"no valid target, n={n} {r}": make(n=n, ignored=2, reduction=r) for n in (0, 6) for r in ("mean", "sum")},
    "none ignored": make(ignored=0),
    "one token": make(n=1, ignored=0),
    "ignored in a row, a chunk of them": with_targets(lambda t: t.index_fill(0, torch.arange(4, 8), -100), chunk=4),
    "ignore 7000": with_targets(lambda t: t.masked_fill(t == -100, 7000), ignore_index=7000),
    "ignore 0": with_targets(lambda t: t.clamp(min=0), ignore_index=0),
    "large logits": make(size=1e4, z_loss=1e-9),
    "strided": strided(chunk=4),
}


# the definition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [0.0, 0.5])
def test_the_definition_by_hand(z):
    """Two logits, log 3 and 0: shares 3/4 and 1/4. The token between is left out."""
    x = torch.tensor([[1.0], [5.0], [1.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[math.log(3)], [0.0]], dtype=torch.float64, requires_grad=True)
    targets, norm = torch.tensor([0, -100, 1]), math.log(4)
    loss = cross_entropy(x, weight, targets, z_loss=z, backend="reference")
    loss.backward()
    assert loss.item() == pytest.approx((norm - math.log(3) + norm) / 2 + z * norm**2)
    up = 1 + 2 * z * norm
    first, last = (0.75 * up - 1) / 2, 0.75 * up / 2  # of the first logit
    assert x.grad.flatten().tolist() == pytest.approx([first * math.log(3), 0, last * math.log(3)])
    assert weight.grad.flatten().tolist() == pytest.approx([first + last, (0.25 * up + 0.25 * up - 1) / 2])
    total = cross_entropy(x, weight, targets, z_loss=z, reduction="sum", backend="reference")
    assert total.item() == pytest.approx(2 * loss.item())


# both engines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@runs
def test_as_defined(engine, dtype, case, device):
    if case == "large logits" and dtype == torch.float16:
        pytest.skip("1e4 times a few is beyond float16")
    got = hold(cross_entropy, CASES[case], engine, dtype, device=device)
    assert got["out"].shape == () and got["out"].dtype == torch.promote_types(dtype, torch.float32)
    assert got["dx"].dtype == got["dweight"].dtype == dtype
    if case.startswith("no valid"):
        assert not any(x.any() for x in got.values())


@pytest.mark.parametrize("half", HALF, ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("half_one", "wide"), [("x", "weight"), ("weight", "x")])
def test_mixed_precisions_are_multiplied_in_float32(engine, half_one, wide, half, device):
    limits = {"out": 2e-6, f"d{wide}": 2e-6, f"d{half_one}": 8e-3 if half == torch.bfloat16 else 1e-3}
    hold(cross_entropy, make(), engine, half, kept=(wide,), device=device, limits=limits)


def test_the_weights_gradient_is_summed_in_float32(engine, device):
    """Many small shares after a large one: each would be lost in bfloat16, chunk by chunk."""
    x, weight = torch.full((33, 16), 2.0**-7, device=device).bfloat16(), torch.zeros(2, 16, device=device).bfloat16()
    x[0] = 4.0
    targets = torch.zeros(33, dtype=torch.int64, device=device)
    cross_entropy(x, weight.requires_grad_(), targets, chunk=1, reduction="sum", backend=engine).backward()
    assert (weight.grad == torch.tensor([-2.125, 2.125], device=device)[:, None]).all()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@short
def test_ignored_tokens_are_not_read(engine, dtype, device):
    inputs = make(ignored=0.5, chunk=4)
    want = outcome(cross_entropy, inputs, backend=engine, dtype=dtype, device=device)
    inputs["x"][inputs["targets"] == -100] = math.nan
    assert same(outcome(cross_entropy, inputs, backend=engine, dtype=dtype, device=device), want)


@short
def test_the_same_bits_on_each_run_under_autocast_and_without_gradient(engine, dtype, device):
    run = partial(outcome, cross_entropy, make(n=50, chunk=16), backend=engine, dtype=dtype, device=device)
    want = run()
    assert same(run(), want)
    with torch.autocast(device, torch.bfloat16):
        assert same(run(), want)
        with torch.no_grad():
            assert same(run(), {"out": want["out"]})


def test_each_gradient_alone_and_none(engine, device):
    run = partial(outcome, cross_entropy, make(), backend=engine, dtype=torch.float32, device=device)
    both = run()
    for name, other in (("x", "weight"), ("weight", "x")):
        assert same(run(fixed=(other,)), {k: both[k] for k in ("out", f"d{name}")})
    x, weight, targets = leaves(device)
    with torch.no_grad():
        assert not cross_entropy(x, weight, targets, backend=engine).requires_grad


def leaves(device, **options):
    inputs = make(device=device, **options)
    return inputs["x"].requires_grad_(), inputs["weight"].requires_grad_(), inputs["targets"]


def test_backward_twice_and_accumulation(engine, device):
    x, weight, targets = leaves(device)
    loss = cross_entropy(x, weight, targets, backend=engine)
    loss.backward(retain_graph=True)
    once = x.grad.clone(), weight.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once[0]) and torch.equal(weight.grad, 2 * once[1])
    cross_entropy(x, weight, targets, backend=engine).backward()
    assert distance(weight.grad, 3 * once[1]) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(engine, device, reentrant):
    x, weight, targets = leaves(device, n=5)
    want = torch.autograd.grad(cross_entropy(x, weight, targets, backend=engine), (x, weight))
    run = partial(cross_entropy, backend=engine)
    checkpoint(run, x, weight, targets, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, want[0]) and torch.equal(weight.grad, want[1])


def test_a_second_derivative_is_refused(engine, device):
    x, weight, targets = leaves(device, n=3)
    (dx,) = torch.autograd.grad(cross_entropy(x, weight, targets, backend=engine), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.square().sum().backward()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation returned, and where tensors of that size lie."""

    numel, places = 0, frozenset()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.numel() >= self.numel:
                self.places = (self.places if t.numel() == self.numel else frozenset()) | {t.data_ptr()}
                self.numel = t.numel()
        return out


@of_eager
def test_one_chunk_of_logits_exists_at_a_time_however_many_the_tokens(engine):
    for n in (64, 640):
        x, weight, targets = leaves("cpu", n=n, v=1000, d=4, ignored=0)
        with Largest() as largest:
            cross_entropy(x, weight, targets, chunk=16, backend=engine).backward()
        assert len(largest.places) == 1 and largest.numel == 16 * 1000


def test_a_target_outside_the_vocabulary(engine, device):
    x, weight, targets = leaves(device, v=53, ignored=0)
    for bad in (53, -1, -99):
        wrong = targets.where(targets != targets[3], bad)
        if device == "cpu":
            with pytest.raises(IndexError, match=rf"targets contains {bad}: allowed are 0\.\.52 and ignore_index=-100"):
                cross_entropy(x, weight, wrong, backend=engine)
        elif engine == "triton":
            assert cross_entropy(x, weight, wrong, backend=engine).isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(150, 15)}, r"expected \[tokens, d\]"),
        ({"targets": torch.zeros(11, dtype=torch.int32)}, "targets is torch.int32"),
        (
            {"targets": torch.zeros(10, dtype=torch.int64)},
            r"targets is torch.int64 \(10,\): expected torch.int64 \[11\]",
        ),
        ({"reduction": "none"}, "reduction='none'"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_refusals_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**make(ignored=0) | change)


# Triton: rows of logits ----------------------------------------------------------------------------------------------


def rows_of(launch, logits, targets, dtype=torch.float32, z_loss=0.0):
    """Losses and gradients of given logits."""
    losses = logits.new_empty(len(logits))
    return losses, launch.loss_rows(logits.clone(), targets, losses, -100, z_loss, dtype).clone()


def exact_rows(logits, targets, z_loss=0.0):
    """torch's, in float64."""
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits, targets, reduction="none") + z_loss * logits.logsumexp(-1).square()
    return losses.detach(), torch.autograd.grad(losses, logits, torch.ones_like(losses))[0]


@of_triton
@short
def test_an_ignored_row_is_zero_whatever_its_logits(engine, launch, device, dtype):
    logits = torch.full((3, 150), math.nan, device=device)
    logits[1] = 0
    losses, grads = rows_of(launch, logits, torch.tensor([-100, 149, -100], device=device), dtype)
    assert losses[[0, 2]].tolist() == [0, 0] and not grads[[0, 2]].any()
    assert abs(losses[1] - math.log(150)) < 1e-6 and grads[1, 149] < -0.9


@of_triton
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("sm_90", torch.bfloat16), ("sm_90", torch.float32), ("hip", torch.float32), ("hip", torch.bfloat16)],
)
def test_where_the_gradient_lies(engine, launch, device, monkeypatch, architecture, dtype):
    """In the logits' place, but for a half precision on AMD."""
    logits, targets = torch.randn(3, 150, device=device), torch.tensor([1, 2, 149], device=device)
    monkeypatch.setattr(launch, "architecture", lambda: architecture)
    place = logits.clone()
    grads = launch.loss_rows(place, targets, logits.new_empty(3), -100, 0.0, dtype)
    assert (grads.data_ptr() == place.data_ptr()) == ((architecture, dtype) != ("hip", torch.bfloat16))
    assert grads.dtype == dtype and distance(grads, exact_rows(logits, targets)[1]) < 4e-3


@of_triton
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_rows_with_large_and_missing_logits(engine, launch, device, z_loss):
    """+-1e4, -inf in places, in the first and in the last block, everywhere but at the target, and at it."""
    logits = torch.randn(7, 200, generator=torch.Generator().manual_seed(1)).to(device)
    targets = torch.tensor([0, 5, 199, 70, 64, 3, 150], device=device)
    logits[0] *= 1e4
    logits[1] -= 1e4
    logits[2, :100] = -math.inf
    logits[3, 128:] = -math.inf
    logits[4] = torch.where(torch.arange(200, device=device) == 64, 3.0, -math.inf)
    logits[5, 3] = -math.inf
    logits[6] = 1e4
    losses, grads = rows_of(launch, logits, targets, z_loss=z_loss)
    want, dwant = exact_rows(logits, targets, z_loss)
    assert losses[5] == math.inf and not grads.isnan().any()
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads.double(), dwant, rtol=2e-6, atol=1e-6)


@of_triton
@short
def test_nan_infinity_and_targets_outside_stay_in_their_row(engine, launch, device, dtype):
    logits = torch.randn(6, 150, device=device)
    targets = torch.tensor([1, 2, 149, 4, 150, -1], device=device)
    clean = rows_of(launch, logits, targets, dtype)
    logits[0, 77], logits[1, 3], logits[2] = math.nan, math.inf, -math.inf
    losses, grads = rows_of(launch, logits, targets, dtype)
    assert torch.equal(losses[3], clean[0][3]) and torch.equal(grads[3], clean[1][3])
    assert losses[:3].isnan().all() and grads[:3].isnan().any(1).all()
    assert losses[4:].isnan().all() and grads[4:].isnan().all(), "a target outside the vocabulary"


@of_triton
@short
def test_a_row_does_not_depend_on_the_others(engine, launch, device, dtype):
    logits, targets = torch.randn(9, 300, device=device) * 5, torch.randint(300, (9,), device=device)
    losses, grads = rows_of(launch, logits, targets, dtype, 1e-3)
    order = torch.randperm(9, device=device)
    again = rows_of(launch, logits[order], targets[order], dtype, 1e-3)
    assert torch.equal(losses[order], again[0]) and torch.equal(grads[order], again[1])


# Triton: launches and operators --------------------------------------------------------------------------------------


@of_triton
def test_one_chunk_of_logits_exists_at_a_time(engine, launch, device, monkeypatch):
    """And without a need, no gradient is made of it."""
    calls, loss_rows = [], launch.loss_rows
    monkeypatch.setattr(launch, "loss_rows", lambda *a: calls.append((*a[0].shape, a[-1])) or loss_rows(*a))
    x, weight, targets = leaves(device, v=70)
    cross_entropy(x, weight, targets, chunk=4)
    cross_entropy(x.detach(), weight.detach(), targets)
    with torch.no_grad():
        cross_entropy(x, weight, targets)
    assert calls == [*((n, 70, torch.float32) for n in (4, 4, 3)), *[(11, 70, None)] * 2] and launch.CHUNK >= 4096


@of_triton
def test_float64_is_refused_by_name(engine, device):
    x, weight, targets = leaves(device)
    for a, b in ((x.double(), weight), (x, weight.double())):
        with pytest.raises(RuntimeError, match="float64"):
            cross_entropy(a, b, targets)
        assert cross_entropy(a, b, targets, backend="auto").dtype == torch.float64


@pytest.fixture
def real_memory(engine, monkeypatch):
    """Fake tensors cannot be filled with NaN, and real sizes would fill gigabytes."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch._C.TensorBase.new_empty)


@of_triton
@pytest.mark.parametrize(("dtype", "need_w"), [(torch.float32, True), (torch.bfloat16, False)])
def test_opcheck(engine, real_memory, device, dtype, need_w):
    from abyssal.kernels.cross_entropy.triton import _cross_entropy

    x, weight, targets = leaves(device, n=3, v=70)
    x, weight = x.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_(need_w)
    torch.library.opcheck(_cross_entropy, (x, weight, targets, -100, 0.01, True, 2, True, need_w))


@of_triton
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(engine, real_memory, device, dynamic):
    x, weight, targets = leaves(device, n=5)

    def run(x, weight):
        return cross_entropy(x.sin(), weight.cos(), targets, z_loss=0.01, chunk=3) * 1.5

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f(x, weight), (x, weight)) for f in (run, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


# on a CUDA device, at a language model's sizes -----------------------------------------------------------------------

V = 129_280


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.usefixtures("real_memory")(of_triton(test)))


def large(n=5000, v=V, d=512, dtype=torch.bfloat16):
    g = torch.Generator(device="cuda").manual_seed(0)
    x, weight = (torch.randn(rows, d, generator=g, device="cuda") for rows in (n, v))
    targets = torch.randint(0, v, (n,), generator=g, device="cuda")
    targets[torch.rand(n, generator=g, device="cuda") < 0.2] = -100
    return x.to(dtype).requires_grad_(), (weight / d**0.5).to(dtype).requires_grad_(), targets


def results(x, weight, targets):
    loss = cross_entropy(x, weight, targets)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("v", [8192, 32_003])
def test_large_as_defined(engine, dtype, v):
    x, weight, targets = large(n=2000, v=v)
    inputs = {"x": 4 * x.detach().cpu(), "weight": weight.detach().cpu(), "targets": targets.cpu()}
    hold(cross_entropy, {**inputs, "z_loss": 1e-4, "chunk": 768}, engine, dtype, device="cuda")


@on_gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-3), (torch.float16, 5e-4)])
def test_rows_are_those_of_the_equations(engine, launch, dtype, limit):
    """Given logits, so that no product rounds: also where the gradient overwrites them in half precision."""
    logits, targets = torch.randn(64, V, device="cuda") * 5, torch.randint(0, V, (64,), device="cuda")
    want, dwant = exact_rows(logits, targets)
    for _ in range(5):
        losses, grads = rows_of(launch, logits, targets, dtype)
        torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
        assert (grads.double() - dwant).norm() < limit * dwant.norm()


@on_gpu
def test_bits_and_ignored_tokens_at_large(engine):
    x, weight, targets = large(n=9000)
    want = results(x, weight, targets)
    assert all(torch.equal(a, b) for a, b in zip(results(x, weight, targets), want))
    with torch.no_grad():
        x[targets == -100] = math.nan
    assert all(torch.equal(a, b) for a, b in zip(results(x, weight, targets), want))
    assert cross_entropy(x, weight, torch.full_like(targets, -100)) == 0


@on_gpu
@pytest.mark.parametrize("n", [4096, 16_384])
def test_memory_is_one_chunk_of_logits_and_the_gradients(engine, launch, n):
    x, weight, targets = large(n=n)
    results(x[:64], weight, targets[:64])  # the library's workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = cross_entropy(x, weight, targets)
    chunk, gradients = 4 * launch.CHUNK * V, x.nbytes + 2 * weight.nbytes  # dx in bf16, dw in fp32
    assert torch.cuda.max_memory_allocated() - before <= chunk + gradients + 4 * x[: launch.CHUNK].nbytes + 30_000_000
    assert torch.cuda.memory_allocated() - before <= gradients + 100_000
    loss.backward()


@on_gpu
def test_nothing_waits_for_the_device_and_a_graph_replays(engine):
    x, weight, targets = large(v=8192)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results(x, weight, targets)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(x, weight, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cross_entropy(x, weight, targets)
        x.copy_(torch.randn_like(x))
        targets.fill_(-100)
        targets[5:50] = 17
        graph.replay()
        assert torch.equal(out, cross_entropy(x, weight, targets))

"""The compressor's pooling against loops in float64, on regular windows, on windows of packed documents and in blocks.

Axes: b batch · t tokens · p entries · D channels of an entry.
"""

import inspect

import pytest
import torch
from torch import Tensor

from abyssal.kernels.pool import eager, pool

MISTAKES = ("bias added to kv", "halves swapped", "softmax shared over channels", "missing window counts", "no bias")


def check(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    error = rms_error(got, want)
    assert error < tolerance, f"{name}: relative RMS error {error:.2e}, allowed {tolerance:.0e}"


def rms_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def oracle(
    kv: Tensor,
    gate: Tensor,
    bias: Tensor,
    *,
    ratio: int,
    overlap: bool,
    first: Tensor | None = None,
    follows: Tensor | None = None,
    mistake: str = "",
) -> Tensor:
    """Entry by entry, a list of slots each."""
    batch, tokens, channels = kv.shape
    d = channels // 2 if overlap else channels
    before, own = slice(0, d), slice(channels - d, channels)
    if mistake == "halves swapped":
        before, own = own, before
    if first is None:
        first = torch.arange(tokens // ratio).mul(ratio).expand(batch, -1)
        follows = first > 0
    rows = []
    for b in range(batch):
        entries = [torch.zeros(0, d, dtype=kv.dtype)]
        for start, joined in zip(
            first[b].tolist(), [False] * first.shape[1] if follows is None else follows[b].tolist()
        ):
            if start < 0:
                entries.append(torch.zeros(1, d, dtype=kv.dtype))
                continue
            slots = [(start + r, r, own) for r in range(ratio)]
            if overlap and joined:
                slots = [(start - ratio + r, r, before) for r in range(ratio)] + slots
            k = torch.stack([kv[b, t, part] for t, r, part in slots])
            z = torch.stack([gate[b, t, part] + (0 if mistake == "no bias" else bias[r, part]) for t, r, part in slots])
            if mistake == "bias added to kv":
                k = k + torch.stack([bias[r, part] for _, r, part in slots])
            if mistake == "softmax shared over channels":
                z = z.mean(-1, keepdim=True).expand_as(z)
            if mistake == "missing window counts" and overlap and not joined:
                k, z = torch.cat([torch.zeros_like(k), k]), torch.cat([torch.zeros_like(z), z])
            weights = torch.exp(z - z.amax(0))
            entries.append(((weights / weights.sum(0)) * k).sum(0, keepdim=True))
        rows.append(torch.cat(entries))
    return torch.stack(rows)


def inputs(
    shape: tuple[int, int, int], ratio: int, *, overlap: bool, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    torch.manual_seed(seed)
    batch, tokens, d = shape
    channels = 2 * d if overlap else d
    kv, gate = (torch.randn(batch, tokens, channels, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(ratio, channels, dtype=torch.float64)
    return [kv.to(dtype), (2 * gate).to(dtype), bias.to(torch.promote_types(dtype, torch.float32))]


def gradients(result: Tensor, arguments: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    weights = torch.randn(result.shape, dtype=torch.float64).to(result.dtype)
    return list(torch.autograd.grad(result, arguments, weights))


def check_with_gradients(arguments: list[Tensor], **options) -> None:
    arguments = [x.requires_grad_() for x in arguments]
    got, want = pool(*arguments, **options), oracle(*arguments, **options)
    check("pooled", got, want, 1e-12)
    for name, mine, theirs in zip(("kv", "gate", "bias"), gradients(got, arguments), gradients(want, arguments)):
        check(f"gradient of {name}", mine, theirs, 1e-12)


def packed(lengths: list[int], ratio: int) -> tuple[Tensor, Tensor]:
    """The windows of documents that lie one after the other: `first` and `follows`, [P]."""
    first, follows, origin = [], [], 0
    for length in lengths:
        for i in range(length // ratio):
            first.append(origin + i * ratio)
            follows.append(i > 0)
        origin += length
    return torch.tensor(first), torch.tensor(follows)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("ratio", "tokens"), [(4, 16), (4, 19), (4, 4), (1, 5), (32, 71), (128, 300)])
def test_regular_windows_follow_the_oracle(ratio: int, tokens: int, overlap: bool) -> None:
    check_with_gradients(inputs((2, tokens, 3), ratio, overlap=overlap), ratio=ratio, overlap=overlap)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_oracle_tells_mistakes_apart(mistake: str) -> None:
    arguments = inputs((2, 19, 3), 4, overlap=True)
    got = pool(*arguments, ratio=4, overlap=True)
    assert rms_error(got, oracle(*arguments, ratio=4, overlap=True, mistake=mistake)) > 1e-2


@pytest.mark.parametrize("overlap", [True, False])
def test_too_few_tokens_give_no_entry(overlap: bool) -> None:
    for tokens in (0, 3):
        arguments = [x.requires_grad_() for x in inputs((2, tokens, 5), 4, overlap=overlap)]
        got = pool(*arguments, ratio=4, overlap=overlap)
        assert got.shape == (2, 0, 5)
        for argument, grad in zip(arguments, gradients(got, arguments)):
            assert grad.shape == argument.shape and not grad.any()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("ratio", [4, 32])
def test_gathered_windows_equal_regular_ones(ratio: int, overlap: bool) -> None:
    arguments = [x.requires_grad_() for x in inputs((2, 4 * ratio + 3, 5), ratio, overlap=overlap, dtype=torch.float32)]
    first = torch.arange(0, 4 * ratio, ratio).expand(2, -1)
    regular = pool(*arguments, ratio=ratio, overlap=overlap)
    gathered = pool(*arguments, ratio=ratio, overlap=overlap, first=first, follows=first > 0)
    check("pooled", gathered, regular, 1e-6)
    for mine, theirs in zip(gradients(gathered, arguments), gradients(regular, arguments)):
        check("gradient", mine, theirs, 1e-6)


@pytest.mark.parametrize("overlap", [True, False])
def test_packed_documents_equal_separate_ones(overlap: bool) -> None:
    ratio, lengths = 4, [9, 3, 4, 0, 13]
    kv, gate, bias = inputs((1, sum(lengths), 3), ratio, overlap=overlap)
    first, follows = packed(lengths, ratio)
    got = pool(kv, gate, bias, ratio=ratio, overlap=overlap, first=first[None], follows=follows[None])
    pieces = zip(kv.split(lengths, 1), gate.split(lengths, 1))
    want = torch.cat([pool(k, z, bias, ratio=ratio, overlap=overlap) for k, z in pieces], 1)
    check("pooled", got, want, 1e-12)
    joined = pool(kv, gate, bias, ratio=ratio, overlap=overlap, first=first[None], follows=(first >= ratio)[None])
    if overlap:
        assert rms_error(joined, want) > 1e-2, "the window of another document makes no difference"


@pytest.mark.parametrize("overlap", [True, False])
def test_gathered_windows_follow_the_oracle(overlap: bool) -> None:
    first = torch.tensor([[0, 5, 9, -1, 15], [-1, 4, 8, 13, -1]])
    follows = torch.tensor([[False, False, True, True, False], [True, True, False, True, False]])
    arguments = inputs((2, 19, 3), 4, overlap=overlap)
    check_with_gradients(arguments, ratio=4, overlap=overlap, first=first, follows=follows)


def test_windows_may_share_rows() -> None:
    first = torch.tensor([[4, 4, 6, 5]])
    follows = torch.tensor([[True, False, True, True]])
    check_with_gradients(inputs((1, 11, 3), 4, overlap=True), ratio=4, overlap=True, first=first, follows=follows)


def test_a_missing_entry_is_zero_and_passes_no_gradient() -> None:
    kv, gate, bias = (x.requires_grad_() for x in inputs((1, 8, 3), 4, overlap=True))
    with torch.no_grad():
        kv[:, :4] = torch.nan
        gate[:, :4] = torch.nan
    first, follows = torch.tensor([[-1, 4]]), torch.tensor([[True, False]])
    pooled = pool(kv, gate, bias, ratio=4, overlap=True, first=first, follows=follows)
    assert not pooled[:, 0].any()
    grad = torch.ones_like(pooled)
    grad[:, 0] = torch.nan
    for name, got in zip(("kv", "gate", "bias"), torch.autograd.grad(pooled, [kv, gate, bias], grad)):
        assert torch.isfinite(got).all(), f"gradient of {name}"
    none = {"first": torch.full((1, 3), -1), "follows": torch.zeros(1, 3, dtype=torch.bool)}
    nothing = pool(kv[:, :2], gate[:, :2], bias, ratio=4, overlap=True, **none)
    assert nothing.shape == (1, 3, 3) and not nothing.any()


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_nan_stays_in_the_entries_of_its_window(overlap: bool, gathered: bool) -> None:
    arguments = inputs((2, 24, 3), 4, overlap=overlap)
    for x in arguments[:2]:
        x[0, 9] = torch.nan
    first = torch.arange(0, 24, 4).expand(2, -1)
    windows = {"first": first, "follows": first > 0} if gathered else {}
    spoilt = torch.isnan(pool(*arguments, ratio=4, overlap=overlap, **windows)).all(-1)
    assert spoilt.nonzero().tolist() == ([[0, 2], [0, 3]] if overlap else [[0, 2]])


def test_the_gradient_of_a_nan_stays_in_its_document() -> None:
    lengths = [12, 12]
    arguments = inputs((1, 24, 3), 4, overlap=True)
    for x in arguments[:2]:
        x[0, 12:16] = torch.nan
    arguments = [x.requires_grad_() for x in arguments]
    first, follows = (x[None] for x in packed(lengths, 4))
    grads = gradients(pool(*arguments, ratio=4, overlap=True, first=first, follows=follows), arguments)
    for name, grad in zip(("kv", "gate"), grads):
        assert torch.isfinite(grad[:, :12]).all() and torch.isfinite(grad[:, 20:]).all(), f"gradient of {name}"


@pytest.mark.parametrize("overlap", [True, False])
def test_extreme_gates_select_a_value(overlap: bool) -> None:
    kv, gate, bias = inputs((1, 16, 3), 4, overlap=overlap, dtype=torch.float32)
    torch.manual_seed(3)
    gate = 1e4 * torch.randn_like(gate).sign() * (1 + torch.rand_like(gate))
    arguments = [x.requires_grad_() for x in (kv, gate, bias)]
    exact = [x.detach().double().requires_grad_() for x in arguments]
    got, want = (function(*x, ratio=4, overlap=overlap) for function, x in ((pool, arguments), (oracle, exact)))
    check("pooled", got, want, 1e-5)
    assert all(torch.isfinite(x).all() for x in gradients(got, arguments))


@pytest.mark.parametrize("overlap", [True, False])
def test_low_precision_is_rounded_once(overlap: bool) -> None:
    arguments = inputs((2, 37, 5), 4, overlap=overlap, dtype=torch.bfloat16)
    got = pool(*arguments, ratio=4, overlap=overlap)
    want = oracle(*(x.double() for x in arguments), ratio=4, overlap=overlap)
    assert got.dtype == torch.bfloat16
    worst = ((got.double() - want).abs() / want.abs().clamp_min(1e-3)).max()
    assert worst < 1.01 * torch.finfo(torch.bfloat16).eps / 2


def test_gradients_have_the_dtype_of_their_input() -> None:
    kv, gate, bias = inputs((2, 37, 5), 4, overlap=True, dtype=torch.float32)
    arguments = [x.requires_grad_() for x in (kv.bfloat16(), gate, bias)]
    exact = [x.detach().double().requires_grad_() for x in arguments]
    got, want = pool(*arguments, ratio=4, overlap=True), oracle(*exact, ratio=4, overlap=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(got, pool(*arguments, ratio=4, overlap=True))
    for argument, mine, theirs in zip(arguments, gradients(got, arguments), gradients(want, exact)):
        assert mine.dtype == argument.dtype
        check("gradient", mine, theirs, 4e-3)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_blocks_of_entries_change_nothing(overlap: bool, gathered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [x.requires_grad_() for x in inputs((2, 4 * 11, 3), 4, overlap=overlap)]
    first = torch.arange(0, 44, 4).expand(2, -1)
    options = {"ratio": 4, "overlap": overlap} | ({"first": first, "follows": first > 0} if gathered else {})
    whole = pool(*arguments, **options)
    whole_gradients = gradients(whole, arguments)
    for entries in (1, 3):
        monkeypatch.setattr(eager, "_BLOCK_VALUES", entries * 2 * arguments[2].numel())
        blocks = pool(*arguments, **options)
        assert torch.equal(whole, blocks)
        for mine, theirs in zip(gradients(blocks, arguments), whole_gradients):
            check("gradient", mine, theirs, 1e-14)


@pytest.mark.parametrize("gathered", [True, False])
def test_the_same_bits_on_every_run(gathered: bool) -> None:
    arguments = [x.requires_grad_() for x in inputs((2, 3000, 16), 4, overlap=True, dtype=torch.float32)]
    first = torch.arange(0, 3000, 4).expand(2, -1)
    options = {"first": first, "follows": first > 0} if gathered else {}
    runs = [gradients(pool(*arguments, ratio=4, overlap=True, **options), arguments) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_only_the_inputs_are_saved() -> None:
    arguments = [x.requires_grad_() for x in inputs((2, 64, 8), 4, overlap=True, dtype=torch.float32)]
    saved = []

    def count(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        pool(*arguments, ratio=4, overlap=True)
    assert set(saved) == {x.untyped_storage().data_ptr() for x in arguments}


def test_inputs_need_not_be_contiguous() -> None:
    arguments = inputs((2, 19, 3), 4, overlap=True)
    strided = [x.mT.contiguous().mT.requires_grad_() for x in arguments]
    check_with_gradients(strided, ratio=4, overlap=True)


def test_errors_name_the_argument() -> None:
    kv, gate, bias = inputs((2, 16, 3), 4, overlap=True)
    first = torch.tensor([[0, 4], [0, -1]])
    follows = first > 0
    options = {"ratio": 4, "overlap": True}
    wrong = {
        "ratio=0": lambda: pool(kv, gate, bias, ratio=0, overlap=True),
        "kv": lambda: pool(kv[..., :5], gate, bias, **options),
        "gate": lambda: pool(kv, gate[:, :3], bias, **options),
        "bias": lambda: pool(kv, gate, bias[:3], **options),
        "first": lambda: pool(kv, gate, bias, first=first[:1], follows=follows, **options),
        "follows": lambda: pool(kv, gate, bias, first=first, follows=follows[:, :1], **options),
        "follows: None": lambda: pool(kv, gate, bias, first=first, **options),
        "follows: given without first": lambda: pool(kv, gate, bias, follows=follows, **options),
    }
    for name, call in wrong.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            call()
    for bad in (13, -2):
        with pytest.raises(IndexError, match=r"^first"):
            pool(kv, gate, bias, first=torch.full((2, 1), bad), follows=torch.zeros(2, 1, dtype=torch.bool), **options)
    with pytest.raises(IndexError, match=r"^follows"):
        pool(kv, gate, bias, first=first, follows=first >= 0, **options)


def test_the_reference_has_the_public_signature() -> None:
    public = dict(inspect.signature(pool).parameters)
    public.pop("backend")
    twin = inspect.signature(eager.pool).parameters
    assert {k: (v.kind, v.default) for k, v in public.items()} == {k: (v.kind, v.default) for k, v in twin.items()}

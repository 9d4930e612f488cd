"""What is predicted: every op at the shapes of real models, and whole passes; record.py files it.

    python tests/support/speed_cases.py hyper              an op at its shapes on an H100, by the model of speed.py
    python tests/support/speed_cases.py attention csa -v   those whose name has these words, with each launch and loop
    python tests/support/speed_cases.py passes             a training step of `small`, layers of V4-Flash, by kernel
    python tests/support/speed_cases.py --json hyper       what is filed of an op, or of passes

h heads · d head dim or width · p entries · b texts of t tokens · n tokens in all
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import aot
import torch
from speed import L2, LAUNCH, digests
from speed_work import Launch, Pass, passes
from torch import Tensor

from abyssal import kernels
from abyssal.train.measure import roofline
from abyssal.train.measure.roofline import Work, elementwise

WINDOW, RATIO, HEAVY = 128, 4, 128
Row = dict[str, Any]
half, whole, ids = torch.bfloat16, torch.float32, torch.int64


def leaf(*shape: int, dtype: torch.dtype = half) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def learn(*outputs: Tensor) -> None:
    """All of the backward pass."""
    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])


# shapes --------------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    width: int
    heads: int
    dim: int
    rotary: int
    picks: int
    index_heads: int
    index_dim: int
    experts: int
    expert_width: int
    slots: int
    vocabulary: int
    tokens: tuple[int, ...]
    batch: int = 1


MODELS = {
    "v4-flash": Model(4096, 64, 512, 64, 512, 64, 128, 256, 2048, 6, 129280, (4096, 16384, 65536, 131072)),
    "v4-pro": Model(7168, 128, 512, 64, 1024, 64, 128, 384, 3072, 6, 129280, (4096, 65536)),
    "small": Model(512, 8, 128, 32, 256, 16, 64, 24, 160, 4, 260, (2048,), 8),
}
Texts = Iterator[tuple[str, Model, int, int]]


def texts() -> Texts:
    """Model, texts and their length."""
    for name, m in MODELS.items():
        yield from ((f"{name}, {m.batch} x {t}" if m.batch > 1 else f"{name}, {t}", m, m.batch, t) for t in m.tokens)


def and_a_token() -> Texts:
    yield from texts()
    yield from ((f"{name}, a token", m, 1, 1) for name, m in MODELS.items())


def decoded() -> Iterator[tuple[str, Model, int]]:
    """Model, and how many tokens lie before the one that it decodes."""
    yield from ((f"{name}, a token after {t}", m, t) for name, m in MODELS.items() for t in (4096, 131072))


class Case(NamedTuple):
    """`backward`: none is asked for where there is no work."""

    name: str
    run: Callable[[], Any]
    forward: Work
    backward: Work | None = None


def times(b: int, work: Work) -> Work:
    return Work(b * work.flops, b * work.bytes)


# ops -----------------------------------------------------------------------------------------------------------------


def attention() -> Iterator[Case]:
    def run(m: Model, b: int, new: int, past: int, ratio: int, picks: int) -> Any:
        p, bound = past // ratio if ratio else 0, leaf(1, new, dtype=ids)
        entries = {"index": leaf(b, new, min(picks, p), dtype=ids)} if picks else {"start": bound, "end": bound}
        tensors = leaf(b, new, m.heads, m.dim), leaf(b, new if new == past else WINDOW, m.dim)
        compressed, sink = leaf(b, p, m.dim) if ratio else None, leaf(m.heads, dtype=whole)
        given = {"window": WINDOW, "scale": 0.1, **(entries if ratio else {})}
        return kernels.attention(*tensors, compressed, sink, **given)[0]

    for name, m, b, t in texts():
        for kind, ratio, picks in (("sliding", 0, 0), ("csa", RATIO, m.picks), ("hca", HEAVY, 0)):
            w = roofline.Attention(t, m.heads, m.dim, WINDOW, ratio, picks or None)
            make = partial(run, m, b, t, t, ratio, picks)
            if ratio or t <= 4096:
                yield Case(f"{kind} {name}", make, times(b, w.forward), times(b, w.backward))
    for name, m, t in decoded():
        for kind, ratio, picks in (("csa", RATIO, m.picks), ("hca", HEAVY, 0)):
            keys = WINDOW + min(picks or t, t // ratio)
            work = Work(4 * m.heads * m.dim * keys, 2 * m.dim * (keys + 2 * m.heads))
            yield Case(f"{kind} {name}", partial(run, m, 1, 1, t, ratio, picks), work)


def index_topk() -> Iterator[Case]:
    def run(m: Model, b: int, new: int, p: int) -> Any:
        q, weights, bound = (
            leaf(b, new, m.index_heads, m.index_dim),
            leaf(b, new, m.index_heads),
            leaf(1, new, dtype=ids),
        )
        return kernels.index_topk(q, weights, leaf(b, p, m.index_dim), k=m.picks, start=bound, end=bound)

    for name, m, b, t in texts():
        work = roofline.Indexer(t, m.index_heads, m.index_dim, RATIO, m.picks).topk
        yield Case(name, partial(run, m, b, t, t // RATIO), times(b, work))
    for name, m, t in decoded():
        values = t // RATIO * m.index_dim
        yield Case(name, partial(run, m, 1, 1, t // RATIO), Work(2 * m.index_heads * values, 2 * values))


def index_loss() -> Iterator[Case]:
    def run(m: Model, b: int, t: int) -> Any:
        p, bound, index = t // RATIO, leaf(1, t, dtype=ids), leaf(b, t, min(m.picks, t // RATIO), dtype=ids)
        student = leaf(b, t, m.index_heads, m.index_dim), leaf(b, t, m.index_heads), leaf(b, p, m.index_dim)
        teacher = leaf(b, t, m.heads, m.dim), leaf(b, p, m.dim), leaf(b, t, m.heads, dtype=whole)
        return kernels.index_loss(*student, *teacher, scale=0.1, start=bound, end=bound, index=index)[0]

    for name, m, b, t in texts():
        w = roofline.Indexer(t, m.index_heads, m.index_dim, RATIO, m.picks)
        heads = roofline.Attention(t, m.heads, m.dim, WINDOW, RATIO, m.picks)
        work = roofline.index_loss(w, heads) + roofline.index_loss_backward(w)
        yield Case(f"{name}, with gradients", partial(run, m, b, t), times(b, work))


def exact_linear() -> Iterator[Case]:
    def run(n: int, d: int, o: int) -> Any:
        return kernels.exact_linear(leaf(n, d), leaf(o, d, dtype=whole))

    for name, n, d, o in (
        ("csa v4-flash", 4096, 4096, 1024),
        ("router v4-flash", 4096, 4096, 256),
        ("csa small", 16384, 512, 256),
    ):
        flops, moved = 2 * n * d * o, 2 * n * d + 4 * (n + d) * o
        yield Case(f"{name}, {n}", partial(run, n, d, o), Work(flops, moved), Work(2 * flops, moved + 2 * n * d))


def hyper() -> Iterator[Case]:
    def run(d: int, n: int) -> Any:
        streams, fn = leaf(1, n, 4, d), leaf(24, 4 * d, dtype=whole)
        u, found, passing = kernels.hyper_branch(streams, fn, leaf(24, dtype=whole), leaf(3, dtype=whole))
        return kernels.hyper_recombine(u, passing, found.post, found.comb)

    for name, m, b, t in and_a_token():
        w = roofline.Hyper(b * t, m.width)
        back = w.post_backward + w.pre_backward if t > 1 else None
        yield Case(name, partial(run, m.width, b * t), w.pre + w.post, back)


def _moe() -> Iterator[tuple[str, roofline.MoE]]:
    yield from ((f"main, {n}", roofline.MoE(n, 2048, 768, 128, 8)) for n in (8192, 32768))
    for name, m, b, t in and_a_token():
        if t <= 65536:
            yield name, roofline.MoE(b * t, m.width, m.expert_width, m.experts, m.slots)


def moe_experts() -> Iterator[Case]:
    def run(m: roofline.MoE) -> Any:
        n, _, e, d, f, _ = m.sizes
        weights = leaf(n, m.slots, dtype=ids), leaf(n, m.slots, dtype=whole), leaf(e, 2 * f, d), leaf(e, d, f)
        return kernels.moe_experts(leaf(n, d), *weights, limit=10.0, shared=leaf(n, d))

    for name, m in _moe():
        work = roofline.moe_forward(m, keep=m.tokens > 1)
        unread = 6 * max(m.experts - m.rows, 0) * m.width * m.expert_width  # of few tokens
        back = roofline.moe_backward(m) if m.tokens > 1 else None
        yield Case(name, partial(run, m), Work(work.flops, work.bytes - unread), back)


def moe_route() -> Iterator[Case]:
    def run(m: roofline.MoE) -> Any:
        logits, bias = leaf(m.tokens, m.experts, dtype=whole), leaf(m.experts, dtype=whole)
        scores, chosen, weights = kernels.moe_route(logits, top_k=m.slots, scale=1.5, bias=bias)
        kernels.moe_permutation(chosen, m.experts)
        return kernels.balance_loss(scores[None], chosen[None]), weights

    for name, m in _moe():
        scores = elementwise(m.tokens * m.experts, 4, 0)
        back = roofline.moe_route_backward(m) + scores + scores if m.tokens > 1 else None
        work = roofline.moe_route(m) + roofline.moe_permutation(m) + scores
        yield Case(f"{name}, with balance", partial(run, m), work, back)


def cross_entropy() -> Iterator[Case]:
    def run(m: Model, n: int) -> Any:
        return kernels.cross_entropy(leaf(n, m.width), leaf(m.vocabulary, m.width), leaf(n, dtype=ids))

    for name, m, b, t in texts():
        if t <= 16384:
            w = roofline.CrossEntropy(b * t, m.width, m.vocabulary)
            yield Case(f"{name}, with gradients", partial(run, m, b * t), w.forward + w.backward)


def norm_rope() -> Iterator[Case]:
    def run(n: int, h: int, d: int, dim: int) -> Any:
        if not dim:
            return kernels.rms_norm(leaf(1, n, h, d), leaf(d), 1e-6)
        rotation = torch.empty(1, n, dim // 2, dtype=torch.complex64, device="meta")
        return kernels.norm_rope(leaf(1, n, h, d), None, 1e-6, rotation)

    for name, m, b, t in texts():
        for what, h, d, dim in (("queries", m.heads, m.dim, m.rotary), ("model", 1, m.width, 0)):
            make, n = partial(run, b * t, h, d, dim), b * t * h * d
            yield Case(f"{what} {name}", make, elementwise(n, 2, 2), elementwise(n, 4, 2))


def pool() -> Iterator[Case]:
    def run(b: int, t: int, d: int, ratio: int, overlap: bool) -> Any:
        c = 2 * d if overlap else d
        return kernels.pool(leaf(b, t, c), leaf(b, t, c), leaf(ratio, c, dtype=whole), ratio=ratio, overlap=overlap)

    for name, m, b, t in texts():
        for kind, ratio, overlap in (("csa", RATIO, True), ("hca", HEAVY, False)):
            w = roofline.Pool(b * t, m.dim, ratio, overlap)
            yield Case(f"{kind} {name}", partial(run, b, t, m.dim, ratio, overlap), w.forward, w.backward)


def engram() -> Iterator[Case]:
    def rows(t: int, table: int) -> Any:
        numbers = leaf(4, dtype=ids), leaf(3, 8, dtype=ids), leaf(24, dtype=ids)
        return kernels.engram_gather(leaf(table, 256), kernels.engram_hash(leaf(1, t, dtype=ids), *numbers, pad=2))

    def gate(t: int, d: int) -> Any:
        return kernels.engram_gate(leaf(1, t, 4, d), leaf(1, t, 4, d), leaf(1, t, d), leaf(4, d), leaf(4, d), eps=1e-6)

    for t in (8192, 32768):
        w, table = roofline.Engram(t, 5120), 4_800_000
        yield Case(f"v4.1 rows, {t}", partial(rows, t, table), w.lookup(24, 256), w.lookup_backward(24, 256, table))
        yield Case(f"v4.1 gate, {t}", partial(gate, t, 5120), w.gate, w.gate_backward)


def newton_schulz() -> Iterator[Case]:
    for count, r, c in ((16, 2048, 4096), (16, 4096, 1024), (312, 160, 512), (96, 512, 512)):
        work = roofline.NewtonSchulz(count, r, c, 10).forward
        make = partial(kernels.newton_schulz, leaf(count, r, c).detach(), compute_dtype=half)
        yield Case(f"{count} of {r} x {c}", make, work)


def quant() -> Iterator[Case]:
    for form, block, bits in (("e4m3", 128, 8), ("e2m1", 32, 4)):
        x, n = leaf(65536, 4096).detach(), 65536 * 4096
        coded = Work(0, 2 * n + n * bits // 8 + n // block)
        yield Case(f"quantize {form}", partial(kernels.quantize, x, form, block=block), coded)
        yield Case(f"fake_quant {form}", partial(kernels.fake_quant, x, form, block=block), elementwise(n, 2, 2))
    rows = leaf(65536 * 64, 128).detach()
    yield Case("hadamard, 65536 x 64 x 128", partial(kernels.hadamard, rows), elementwise(rows.numel(), 2, 2))


OPS: dict[str, Callable[[], Iterator[Case]]] = {op: globals()[op] for op in aot.OPS}

# rows ----------------------------------------------------------------------------------------------------------------


def rows(op: str, *words: str) -> Iterator[tuple[Row, Pass]]:
    """Of each case whose name has all of these words, forward and backward."""
    for case in OPS[op]():
        if all(word in case.name for word in words):
            found = passes(case.run, _learn if case.backward else None)
            for stage, taken, work in zip(("forward", "backward"), found, (case.forward, case.backward)):
                yield {"case": case.name, "stage": stage} | _numbers(taken, work or case.forward), taken


def _learn(found: Any) -> None:
    learn(*(found if isinstance(found, tuple) else (found,)))


def by_kernel(launches: list[Launch]) -> dict[str, list[Launch]]:
    """What takes longest first."""
    found: dict[str, list[Launch]] = {}
    for x in launches:
        found.setdefault(x.kernel, []).append(x)
    return dict(sorted(found.items(), key=lambda item: -sum(x.time.seconds for x in item[1])))


def _numbers(taken: Pass, work: Work) -> Row:
    seconds, (name, longest) = taken.seconds + taken.beside, next(iter(by_kernel(taken.launches).items()))
    numbers = {
        "ms": 1e3 * seconds,
        "torch ms": 1e3 * taken.beside,
        "TFLOP/s": work.flops / seconds / 1e12,
        "GB/s": work.bytes / seconds / 1e9,
        "share": roofline.H100_ACHIEVED.seconds(work) / seconds,
    }
    found: Row = {"launches": len(taken.launches), "longest": name}
    found["bound"] = max(longest, key=lambda x: x.time.seconds).time.bound
    return {key: float(f"{value:.4g}") for key, value in numbers.items()} | found


def small() -> list[Pass]:
    """A training step without the optimizer, its documents packed."""
    from abyssal.model import ModelConfig, Transformer

    with torch.device("meta"):
        model, tokens = Transformer(ModelConfig.load("small")).train(), torch.zeros(8, 2048, dtype=ids)
    return passes(partial(model, tokens, targets=tokens, documents=tokens), lambda out: out.loss.backward())


def layer(number: int, t: int) -> list[Pass]:
    """Of V4-Flash, its experts' weights in half precision."""
    from abyssal.model import ModelConfig
    from abyssal.model.block import Block
    from abyssal.model.layout import make_layout

    def back(found: Any) -> None:
        learn(found[0], found[1].router.balance, *([found[1].indexer.loss] if found[1].indexer else []))

    with torch.device("meta"):
        block, tokens = Block(config := ModelConfig.load("v4-flash"), number).train(), torch.zeros(1, t, dtype=ids)
    for x in block.ffn.experts.parameters():
        x.data = x.data.to(half)
    streams = leaf(1, t, config.hc_mult, config.hidden_size)
    return passes(partial(block, streams, tokens, make_layout(tokens, None), learn=True), back)


def whole_passes() -> Iterator[Row]:
    """Milliseconds of both directions, of ours by kernel: [milliseconds, launches, at least]."""
    made: dict[str, Callable[[], list[Pass]]] = {"small, a training step of 8 x 2048": small}
    for t in (4096, 65536):
        made |= {f"v4-flash, a {kind} layer, {t}": partial(layer, n, t) for kind, n in (("csa", 4), ("hca", 5))}
    for name, run in made.items():
        found = run()
        by = {
            kernel: (1e3 * sum(x.time.seconds for x in xs), len(xs), 1e3 * sum(x.time.least for x in xs))
            for kernel, xs in by_kernel([x for taken in found for x in taken.launches]).items()
        }
        numbers = {
            "forward ms": found[0].seconds,
            "backward ms": found[1].seconds,
            "torch ms": sum(taken.beside for taken in found),
            "launching ms": LAUNCH * sum(len(taken.launches) for taken in found),
        }
        rounded = {kernel: [float(f"{x:.4g}") for x in row] for kernel, row in by.items()}
        yield {"case": name} | {key: float(f"{1e3 * x:.4g}") for key, x in numbers.items()} | {"kernels": rounded}


def document(op: str) -> Row:
    """What is filed of an op: rows, and digests of what its cases compile in half precision; or of "passes"."""
    public = {path for path in aot.loaded() if path.startswith("kernels/")}
    found: Row = {"rows": list(whole_passes()) if op == "passes" else [row for row, _ in rows(op)]}
    if op != "passes":
        digested = digests(op, lambda case: "bf16" in case or "fp16" in case)
        found["kernels"] = [{key: value for key, value in x.items() if key != "loops"} for x in digested]
    return found | {"sources": {path: digest for path, digest in aot.sources(public).items() if digest}}


# command line --------------------------------------------------------------------------------------------------------


def show(row: Row, taken: Pass, each: bool) -> None:
    print(*(f"{key} {value}" for key, value in row.items()), sep=", ")
    for name, xs in by_kernel(taken.launches).items() if each else ():
        for code in {id(x.code): x.code for x in xs}.values():
            mine = [x for x in xs if x.code is code]
            x, seconds = max(mine, key=lambda x: x.time.seconds), sum(x.time.seconds for x in mine)
            print(
                f"  {len(mine):4} {name:24} {1e3 * seconds:9.4f} ms {x.time.bound:7} {x.grid}, {code.programs} per SM,"
                f" {code.warps} warps, {code.registers} registers, {x.moved / 1e6:.1f} MB"
            )
            for part, s in zip(x.time.parts, code.segments):
                print(
                    f"         {part.over[:40]:40} {part.turns:7.1f} turns {1e3 * part.seconds:9.4f} ms {part.bound:7}"
                    f" tensor {s.tensor:.0f} issue {s.issue:.0f} shared {s.shared:.0f} L2 {s.loaded / L2:.0f}"
                    f" serial {s.serial:.0f}"
                )


def main(op: str, *words: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are not imported yet
    if op == "--json":
        print(json.dumps(document(*words)))
    elif op == "--digests":  # of one op and case
        print(json.dumps(list(digests(words[0], lambda case: case == words[1]))))
    elif op == "passes":
        for row in whole_passes():
            by = row.pop("kernels")
            print(*(f"{key} {value}" for key, value in row.items()), sep=", ")
            for name, (ms, n, least) in by.items():
                print(
                    f"  {name:24} {ms:9.3f} ms {n:4.0f} launches, at least {least:9.3f}, to gain {ms - least:9.3f} ms"
                )
    else:
        for row, taken in rows(op, *(w for w in words if w != "-v")):
            show(row, taken, "-v" in words)


if __name__ == "__main__":
    main(*sys.argv[1:])

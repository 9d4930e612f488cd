"""A million tokens on two cores: prefill in chunks, decode, and where the time and the memory go.

    python -m abyssal.train.measure.long_context --tokens 1048576 --decode 256 --out long.json

The text is the corpus, document after document, from the start again when it ends. At 4k and 64k tokens the prefill
stops for a few decoded tokens, which are then taken back exactly (the cache's rewind): the same probe as at the end.

Times are split by part with a stopwatch around modules and ops. A part's time is its own, without that of the parts
inside it, so that they add up to the whole.

b batch (1) · t tokens
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...model import ModelConfig, Transformer, load_pretrained
from ...model.accounting import cache_bytes
from ...model.cache import Cache, Step
from ...model.decode import decoder
from ...model.disk import write_json
from ...model.generation.prefill import chunk_tokens
from ...model.kinds import HEAVY, SLIDING, SPARSE
from ..data.corpus import load_corpus
from ..data.rows import Stream
from ..run.metrics import peak_memory_gib
from .follow import following

MARKS = (4_096, 65_536)  # tokens after which a few are decoded and taken back
PROBE = 16  # tokens of such a probe
SEGMENTS = 64  # pieces of the prefill that are timed on their own
KINDS = {SLIDING: "sliding", SPARSE: "CSA", HEAVY: "HCA"}


class Stopwatch:
    """Seconds of parts by (kind of layer, part), without those of parts inside them.

    parts: what is timed, and as what; the kind None is that of the part around it.
    """

    def __init__(self, parts: dict[Any, tuple[str | None, str]]) -> None:
        self.parts = parts
        self.seconds: dict[tuple[str, str], float] = {}
        self._running: list[tuple[str, str]] = []
        self._since = 0.0

    def begins(self, what: Any) -> None:
        if what in self.parts:
            self._count()
            kind, part = self.parts[what]
            if kind is None:
                kind = self._running[-1][0] if self._running else ""
            self._running.append((kind, part))

    def ends(self, what: Any) -> None:
        if what in self.parts:
            self._count()
            self._running.pop()

    def _count(self) -> None:
        """What passed since the last change is the innermost part's."""
        now = time.perf_counter()
        if self._running:
            label = self._running[-1]
            self.seconds[label] = self.seconds.get(label, 0.0) + now - self._since
        self._since = now


def parts_of(model: Transformer) -> dict[Any, tuple[str | None, str]]:
    """What a stopwatch times of a model."""
    every = "every layer"
    parts: dict[Any, tuple[str | None, str]] = {
        model: ("model", "embedding, streams, head"),
        "attention": (None, "attention"),
        "index_topk": (None, "index top-k"),
        "hyper_recombine": (every, "mHC"),
    }
    for layer, block in enumerate(model.layers):
        kind, attn = KINDS[model.config.layer_kind(layer)], block.attn
        parts |= {block: (kind, "norms"), attn: (kind, "projections"), block.ffn: (every, "experts")}
        parts |= {block.hc_attn: (every, "mHC"), block.hc_ffn: (every, "mHC")}
        if attn.ratio:
            parts[attn.compressor] = kind, "compressor"
        if attn.kind == SPARSE:
            parts[attn.indexer] = kind, "indexer"
        if block.engram is not None:
            parts[block.engram] = every, "Engram"
    return parts


@contextmanager
def timed(model: Transformer, in_numpy: bool = False) -> Iterator[Stopwatch]:
    """A stopwatch on the parts of a model; `in_numpy` leaves alone the modules of layers, which must have no hooks."""
    watch = Stopwatch(parts_of(model))
    modules = [part for part in watch.parts if isinstance(part, nn.Module)]
    with following(watch, [model] if in_numpy else modules):
        yield watch


@dataclass(frozen=True)
class Piece:
    """Some tokens in a row, the last of which is number `end`, and what they took."""

    end: int
    tokens: int
    seconds: float
    parts: dict[str, float]  # seconds

    @property
    def milliseconds(self) -> float:
        """Per token."""
        return 1e3 * self.seconds / self.tokens


@dataclass(frozen=True)
class Result:
    """What a run measured. Bytes of the cache are those reserved, `formula` what `cache_bytes` says they are."""

    config: str
    tokens: int
    chunk: int
    threads: int
    prefill: list[Piece]
    decode: list[Piece]
    text: list[int]
    peak_gib: float
    base_gib: float
    cache: int
    formula: int

    @property
    def seconds(self) -> float:
        return sum(piece.seconds for piece in self.prefill)

    def to_dict(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in vars(self).items() if name not in ("prefill", "decode")},
            "prefill_seconds": self.seconds,
            "seconds_per_million_tokens": 1e6 * self.seconds / self.tokens,
            "torch": torch.__version__,
            **{name: [asdict(piece) for piece in getattr(self, name)] for name in ("prefill", "decode")},
        }


@torch.no_grad()
def measure(
    model: Transformer,
    ids: Tensor,
    decode: int,
    *,
    chunk: int | None = None,
    name: str = "",
    marks: Sequence[int] = MARKS,
    shown: bool = True,
) -> Result:
    """Prefills ids [1, t] and decodes `decode` more tokens, greedily, with a stopwatch on every part.

    Raises:
        ValueError: sizes that are not positive, or more tokens than the model's `max_position_embeddings`.
    """
    t = ids.shape[1]
    chunk = chunk or chunk_tokens(model.config, model.embed.weight.element_size(), 1)
    for argument, value in (("chunk", chunk), ("decode", decode)):
        if value < 1:
            raise ValueError(f"{argument}={value}: allowed are positive numbers")
    base = peak_memory_gib(ids.device)
    cache = model.new_cache(1, t + decode, rewind=PROBE)
    prefill: list[Piece] = []
    probes: list[Piece] = []
    with _Bar(t, shown) as bar:
        for first, last in _segments(t, chunk, marks):
            piece, logits = _read(model, cache, ids[:, first:last], chunk, bar)
            prefill.append(piece)
            if last in marks and last < t:
                probe, _ = _write(model, cache, logits, min(PROBE, t - last))
                probes.append(probe)
                cache.truncate(last)
        written, text = _write(model, cache, logits, decode)
    return Result(
        config=name,
        tokens=t,
        chunk=chunk,
        threads=torch.get_num_threads(),
        prefill=prefill,
        decode=[*probes, written],
        text=text,
        peak_gib=peak_memory_gib(ids.device),
        base_gib=base,
        cache=cache.nbytes(),
        formula=cache_bytes(model.config, 1, t + decode, PROBE, model.embed.weight.element_size()),
    )


def report(result: Result) -> str:
    """The measurements as lines of text."""
    tokens, seconds = result.tokens, result.seconds
    lines = [
        "",
        f"prefill     {tokens:,} tokens in {seconds:,.1f} s: {1e6 * seconds / tokens:,.0f} s per million tokens, "
        f"chunks of {result.chunk:,}, {result.threads} threads",
        f"memory      peak {result.peak_gib:.2f} GiB, {result.base_gib:.2f} GiB of them before the cache was made",
        f"cache       {result.cache:,} bytes, {result.formula:,} by the formula",
    ]
    read = [piece for piece in result.prefill if piece.end in MARKS or piece.end == tokens]
    lines += ["", "prefill, ms per token, around a token", _by_part(read)]
    lines += ["", "prefill, s in all", _by_part([_total(result.prefill)], scale=1.0)]
    lines += ["", "decode, ms per token, after that many tokens", _by_part(result.decode)]
    early = next((piece for piece in result.decode if piece.end <= MARKS[0] + PROBE), None)
    if early and early is not result.decode[-1]:
        ratio = result.decode[-1].milliseconds / early.milliseconds
        lines.append(f"decode at {tokens:,} takes {ratio:.2f} times as long as at {MARKS[0]:,}")
    return "\n".join(lines)


def long_text(source: str, count: int) -> Tensor:
    """ids [1, count]: the corpus's documents, each behind its bos, from the start again when they end."""
    corpus = load_corpus(source)
    stream = Stream([*corpus.train, *corpus.held_out], 1).tokens
    return torch.from_numpy(np.resize(stream, count).astype(np.int64))[None]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"long_context: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.tokens < 1:
        raise ValueError(f"tokens={options.tokens}: allowed are positive numbers")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    weights = options.checkpoint
    config = ModelConfig.load(weights or options.config)
    longest = max(config.max_position_embeddings, options.tokens + options.decode)
    model = Transformer(replace(config, max_position_embeddings=longest)).eval()
    if weights:
        model.load_state_dict(load_pretrained(weights, dtype=torch.float32).state_dict())
    text = long_text(options.source, options.tokens)
    name = str(weights or options.config)
    result = measure(model, text, options.decode, chunk=options.chunk, name=name)
    print(report(result))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, result.to_dict())
        print(f"\n{options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m abyssal.train.measure.long_context", description=__doc__.splitlines()[0]
    )
    for name, kind, default, meaning in (
        ("--tokens", int, 2**20, "tokens of the prefill"),
        ("--decode", int, 256, "tokens written after them"),
        ("--config", str, "long", "shipped name, .toml or .json file: new weights"),
        ("--checkpoint", Path, None, "run, checkpoint or folder of weights, instead of --config"),
        ("--source", str, "stdlib", "'stdlib', a folder or a text file"),
        ("--chunk", int, None, "tokens per pass; None = from a memory budget"),
        ("--threads", int, None, "of torch; None = as torch chooses"),
        ("--seed", int, 0, "of new weights"),
        ("--out", Path, None, "JSON file to write"),
    ):
        text = f"{meaning} ({kind.__name__.lower()}; default: {default})"
        parser.add_argument(name, type=kind, default=default, metavar=name.strip("-").upper(), help=text)
    return parser


def _segments(t: int, chunk: int, marks: Sequence[int]) -> list[tuple[int, int]]:
    """Where the timed pieces of the prefill begin and end: whole chunks but for those that end at a mark."""
    size = max(1, t // SEGMENTS // chunk) * chunk
    ends = sorted({*range(size, t, size), *(mark for mark in marks if mark < t), t})
    return list(zip([0, *ends[:-1]], ends))


def _read(model, cache: Cache, ids: Tensor, chunk: int, bar: "_Bar") -> tuple[Piece, Tensor]:
    """Prefills ids [1, t] in chunks."""
    began = time.perf_counter()
    with timed(model) as watch:
        for piece in ids.split(chunk, 1):
            logits = model(piece, cache=cache, logits_to_keep=1).logits
            bar.add(piece.shape[1])
    seconds = time.perf_counter() - began
    return Piece(int(cache.lengths[0]), ids.shape[1], seconds, _named(watch.seconds)), logits


def _write(model, cache: Cache, logits: Tensor, count: int) -> tuple[Piece, list[int]]:
    """Decodes `count` tokens greedily, each of them through the cache."""
    text = []
    in_numpy = decoder(model, Step([1], [1], 1)) is not None
    began = time.perf_counter()
    with timed(model, in_numpy) as watch:
        for _ in range(count):
            token = logits.argmax(-1)
            text.append(int(token))
            logits = model(token, cache=cache).logits
    seconds = time.perf_counter() - began
    return Piece(int(cache.lengths[0]), count, seconds, _named(watch.seconds)), text


def _named(parts: dict[tuple[str, str], float]) -> dict[str, float]:
    return {f"{kind}: {part}": seconds for (kind, part), seconds in sorted(parts.items())}


def _total(pieces: Sequence[Piece]) -> Piece:
    parts = {name: sum(piece.parts.get(name, 0.0) for piece in pieces) for piece in pieces[-1:] for name in piece.parts}
    return Piece(pieces[-1].end, 1, sum(piece.seconds for piece in pieces), parts)


def _by_part(pieces: Sequence[Piece], scale: float = 1e3) -> str:
    """A row for each part and a column for each piece: time per token and share."""
    rows = [f"{'':<34}" + "".join(f"{piece.end:>19,}" for piece in pieces)]
    names = sorted(pieces[-1].parts, key=pieces[-1].parts.__getitem__, reverse=True)
    for name in names:
        cells = (
            f"{scale * seconds / piece.tokens:>12.3f} {seconds / piece.seconds:>5.0%}"
            for piece in pieces
            for seconds in [piece.parts.get(name, 0.0)]
        )
        rows.append(f"  {name:<32}" + "".join(f"{cell:>19}" for cell in cells))
    totals = (f"{scale * piece.seconds / piece.tokens:>12.3f} {'':>5}" for piece in pieces)
    return "\n".join([*rows, f"  {'all':<32}" + "".join(f"{cell:>19}" for cell in totals)])


class _Bar:
    """Tokens so far: tqdm on a terminal, otherwise a line at every tenth."""

    def __init__(self, total: int, shown: bool) -> None:
        self.total, self.done, self.shown, self.bar = total, 0, shown, None
        self.began = time.perf_counter()

    def __enter__(self) -> "_Bar":
        if self.shown and sys.stderr.isatty():
            try:
                from tqdm import tqdm

                self.bar = tqdm(total=self.total, unit="token", unit_scale=True, dynamic_ncols=True)
            except ModuleNotFoundError:
                self.bar = None
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, count: int) -> None:
        tenth = 10 * self.done // self.total
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.shown and 10 * self.done // self.total > tenth:
            seconds = time.perf_counter() - self.began
            print(f"{self.done:>11,} of {self.total:,} tokens, {seconds:,.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Needles: facts hidden in long text and asked for at its end. What does a model find, and from how far?

    prompt   bos, text, fact, text, question         "The code of the amber key is 4821."
    control  the same with other text in the fact's place
    found    greedy decoding continues the prompt with the whole code
    margin   log p(code | prompt) - log p(code | control), nats: 0 if the fact changes nothing

Text is the corpus's held-out part. Greedy decoding gives the whole code if and only if each of its tokens is the
likeliest one after the tokens before it, so that one pass over the code gives both numbers. Everything is drawn from
the seed, a needle from its own place in the plan: more trials or lengths leave the others as they are.

b prompts and controls · k tokens of the code · v vocabulary
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from ...model import Transformer
from ...model.disk import write_json
from ...model.generation.prefill import prefill
from ..data.corpus import Corpus
from ..data.tokenizers import BOS
from ..plots.style import canvas, save

FILE = "needle.json"
PICTURE = "needle.png"
COLOURS = (
    "amber",
    "azure",
    "coral",
    "crimson",
    "cyan",
    "ebony",
    "golden",
    "indigo",
    "ivory",
    "jade",
    "lilac",
    "silver",
)
DIGITS = 4
LINE = 120  # bytes that a fact may be moved up to stand at the start of a line


@dataclass(frozen=True)
class Needle:
    """One question; `distance` counts the tokens from the fact's code to where the answer begins."""

    prompt: list[int]
    control: list[int]
    code: list[int]
    distance: int


@dataclass(frozen=True)
class Answer:
    """What the model made of one needle: whether the code was found, and its log-probability."""

    distance: int
    found: bool
    found_without: bool
    log_probability: float
    log_probability_without: float

    @property
    def margin(self) -> float:
        return self.log_probability - self.log_probability_without


@dataclass(frozen=True)
class Cell:
    """Averages over needles: those of one length and depth, or those of one range of distances."""

    trials: int
    distance: float
    accuracy: float
    accuracy_without: float
    log_probability: float
    log_probability_without: float
    margin: float
    margin_error: float | None  # standard error of the mean; None for a single needle


@dataclass(frozen=True)
class Report:
    """cells[i][j] is depth i and length j; `by_distance` has a cell for each power of two: (least distance, cell)."""

    lengths: list[int]
    depths: list[float]
    cells: list[list[Cell]]
    by_distance: list[tuple[int, Cell]]

    @property
    def all(self) -> list[Cell]:
        return [cell for row in self.cells for cell in row]

    def to_dict(self) -> dict[str, Any]:
        return {
            "lengths": self.lengths,
            "depths": self.depths,
            "cells": [
                {"depth": depth, "length": length, **asdict(cell)}
                for depth, row in zip(self.depths, self.cells)
                for length, cell in zip(self.lengths, row)
            ],
            "by_distance": [{"from": least, "to": 2 * least - 1, **asdict(cell)} for least, cell in self.by_distance],
        }


def evaluate(
    model: Transformer,
    corpus: Corpus,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    trials: int = 8,
    batch: int = 8,
    seed: int = 0,
    tell: Callable[[float, int, Cell], None] | None = None,
) -> Report:
    """Plants `trials` facts for each length and depth, asks for each, and averages.

    Args:
        lengths: tokens of the prompt, the question included.
        depths: where the fact stands in the text: 0 at its start, 1 at its end, right before the question.
        batch: needles that are asked side by side; it changes the speed only.
        tell: is called with each depth, length and cell as it is done.

    Raises:
        ValueError: no length or depth, one out of range, or fewer than one trial.
    """
    text = b"".join(document.text for document in corpus.held_out)
    _check(model, lengths, depths, trials, batch)
    was_training = model.training
    model.eval()
    answers: dict[tuple[float, int], list[Answer]] = {}
    for length in lengths:
        for depth in depths:
            needles = [plant(text, length, depth, random.Random(f"{seed}/{length}/{depth}/{i}")) for i in range(trials)]
            pieces = [needles[i : i + batch] for i in range(0, trials, batch)]
            answers[depth, length] = [answer for piece in pieces for answer in ask(model, piece)]
            if tell:
                tell(depth, length, average(answers[depth, length]))
    model.train(was_training)
    cells = [[average(answers[depth, length]) for length in lengths] for depth in depths]
    return Report(list(lengths), list(depths), cells, _by_distance([a for some in answers.values() for a in some]))


def plant(text: bytes, length: int, depth: float, draw: random.Random) -> Needle:
    """A prompt of `length` tokens around a stretch of the text, which goes round; the code is nowhere else in it."""
    colour = draw.choice(COLOURS)
    room = length - shortest(colour)
    filler = _stretch(text, draw.randrange(len(text)), room)
    other = _stretch(text, draw.randrange(len(text)), len(_fact(colour, b"0" * DIGITS)) - 1) + b"\n"
    code = _code(draw, filler + other)
    fact, question = _fact(colour, code), _question(colour)
    at = _line_start(filler, round(depth * room))
    prompt, control = ([BOS, *filler[:at], *middle, *filler[at:], *question] for middle in (fact, other))
    distance = len(prompt) - (1 + at + fact.index(code))
    return Needle(prompt, control, list(code), distance)


def shortest(colour: str = max(COLOURS, key=len)) -> int:
    """Tokens of a prompt without any text."""
    return 1 + len(_fact(colour, b"0" * DIGITS)) + len(_question(colour))


@torch.no_grad()
def ask(model: Transformer, needles: Sequence[Needle]) -> list[Answer]:
    """All needles, of one length, in one batch: the prompts in chunks into a cache, then the codes."""
    device = next(model.parameters()).device
    prompts = torch.tensor([n.prompt for n in needles] + [n.control for n in needles], device=device)
    codes = torch.tensor([n.code for n in needles] * 2, device=device)
    cache = model.new_cache(len(prompts), prompts.shape[1] + DIGITS - 1)
    logits = [prefill(model, prompts, cache).logits, model(codes[:, :-1], cache=cache).logits]
    log_probabilities = torch.cat(logits, 1).double().log_softmax(-1)  # [b, k, v]
    of_code = log_probabilities.gather(-1, codes[..., None]).sum((1, 2)).tolist()
    found = (log_probabilities.argmax(-1) == codes).all(-1).tolist()
    n = len(needles)
    return [
        Answer(needle.distance, found[i], found[n + i], of_code[i], of_code[n + i]) for i, needle in enumerate(needles)
    ]


def average(answers: Sequence[Answer]) -> Cell:
    """The averages over one or more answers."""
    margins = [answer.margin for answer in answers]
    return Cell(
        trials=len(answers),
        distance=fmean(answer.distance for answer in answers),
        accuracy=fmean(answer.found for answer in answers),
        accuracy_without=fmean(answer.found_without for answer in answers),
        log_probability=fmean(answer.log_probability for answer in answers),
        log_probability_without=fmean(answer.log_probability_without for answer in answers),
        margin=fmean(margins),
        margin_error=stdev(margins) / math.sqrt(len(margins)) if len(margins) > 1 else None,
    )


def picture(report: Report, path: Path, title: str, window: int) -> Path:
    """Two heat maps, depth by length, and both numbers by distance. Raises ModuleNotFoundError without matplotlib."""
    figure = canvas(15, 4.6)
    accuracy, margin, distance = figure.subplots(1, 3)
    values = [[cell.accuracy for cell in row] for row in report.cells]
    _heat(accuracy, report, values, "{:.0%}", cmap="cividis", vmin=0, vmax=1)
    accuracy.set_title("Found: greedy decoding gives the whole code")
    values = [[cell.margin for cell in row] for row in report.cells]
    widest = max(1e-3, *(abs(value) for row in values for value in row))
    _heat(margin, report, values, "{:+.2f}", cmap="PuOr", vmin=-widest, vmax=widest)
    margin.set_title("Margin: nats that the fact adds to log p(code)")
    _distances(distance, report, window)
    return save(figure, path, title)


def table(report: Report) -> str:
    """Accuracy and margin by depth and length, then by distance, as lines of text."""
    lines = [f"{'depth':>6}" + "".join(f"{length:>16,}" for length in report.lengths)]
    for depth, row in zip(report.depths, report.cells):
        lines.append(f"{depth:>6.2f}" + "".join(f"{f'{cell.accuracy:.0%} {cell.margin:+.2f}':>16}" for cell in row))
    lines += ["", f"{'distance':>17}{'needles':>10}{'found':>8}{'without':>9}{'margin, nats':>22}"]
    for least, cell in report.by_distance:
        error = "" if cell.margin_error is None else f" ± {cell.margin_error:.3f}"
        reach, margin = f"{least:,} - {2 * least - 1:,}", f"{cell.margin:+.3f}{error}"
        lines.append(f"{reach:>17}{cell.trials:>10}{cell.accuracy:>8.0%}{cell.accuracy_without:>9.0%}{margin:>22}")
    return "\n".join(lines)


def run(checkpoint: Path, lengths: str, depths: str, trials: int, batch: int, seed: int, out: Path | None) -> None:
    """`abyssal eval needle`: asks a checkpoint, prints the table, writes needle.json and needle.png.

    Raises:
        ValueError: a length or depth that is no number or out of range.
        FileNotFoundError: no such checkpoint.
    """
    from ..data.corpus import load_corpus
    from ..run import checkpoint as checkpoints
    from ..run.load import open_model

    loaded = open_model(checkpoint)
    if loaded.spelling().name != "bytes":
        raise ValueError(f"{str(checkpoint)!r} reads tokens of {loaded.spelling().name}: a needle is planted in bytes")
    asked = numbers("lengths", lengths, int), numbers("depths", depths, float)
    folder, data = loaded.folder, loaded.learning().data
    out = out or checkpoints.require_run(folder)
    corpus = load_corpus(data.source, data.held_out_fraction, text_key=data.text_key)
    print(f"{folder}: {trials} needles for each of {len(asked[0])} lengths and {len(asked[1])} depths")
    report = evaluate(loaded.model, corpus, *asked, trials=trials, batch=batch, seed=seed, tell=_tell)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"checkpoint": str(folder), "source": data.source, "trials": trials, "seed": seed}
    window = loaded.model.config.sliding_window
    write_json(out / FILE, {**facts, "window": window, **report.to_dict()})
    print(f"\nfound and margin in nats, by depth and length\n{table(report)}\n\n{summary(report)}\n{out / FILE}")
    try:
        place = checkpoints.run_of(folder) or folder
        title = f"{place.resolve().name} · {folder.resolve().name} · {trials} needles per cell · seed {seed}"
        print(picture(report, out / PICTURE, title, window))
    except ModuleNotFoundError as error:
        print(f"not drawn: {error.name} is not installed (pip install matplotlib)")


def summary(report: Report) -> str:
    total = sum(cell.trials for cell in report.all)
    found, without = (sum(getattr(cell, name) * cell.trials for cell in report.all) for name in (
        "accuracy", "accuracy_without"))  # fmt: skip
    return f"found {found:.0f} of {total}; without the fact {without:.0f} of {total}"


def numbers(name: str, text: str, kind: type) -> list[Any]:
    """Comma-separated numbers. Raises ValueError naming the one that is none."""
    found = []
    for part in text.split(","):
        try:
            found.append(kind(part))
        except ValueError:
            raise ValueError(
                f"{name}={text!r}: {part.strip()!r} is no {kind.__name__}; give numbers as 1,2,3"
            ) from None
    return found


def _check(model: Transformer, lengths: Sequence[int], depths: Sequence[float], trials: int, batch: int) -> None:
    least, most = shortest() + 1, model.config.max_position_embeddings - DIGITS + 1
    for length in lengths:
        if not least <= length <= most:
            raise ValueError(
                f"lengths has {length}: allowed are {least} (fact and question) to {most} (the model's limit)"
            )
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depths has {depth}: allowed are 0 (start of the text) to 1 (its end)")
    for name, value in (("lengths", len(lengths)), ("depths", len(depths)), ("trials", trials), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}: {value} given, at least 1 is needed")


def _fact(colour: str, code: bytes) -> bytes:
    return b"The code of the %s key is %s.\n" % (colour.encode(), code)


def _question(colour: str) -> bytes:
    return b"\nThe code of the %s key is " % colour.encode()


def _stretch(text: bytes, start: int, count: int) -> bytes:
    """`count` bytes of the text from `start`, going round at its end."""
    rounds = -(-(start + count) // len(text))
    return (text * rounds)[start : start + count]


def _code(draw: random.Random, filler: bytes) -> bytes:
    for number in draw.sample(range(10**DIGITS), 10**DIGITS):
        code = b"%0*d" % (DIGITS, number)
        if code not in filler:
            break
    return code


def _line_start(filler: bytes, at: int) -> int:
    """The start of the line around `at`, unless it lies too far before."""
    start = filler.rfind(b"\n", 0, at) + 1
    return start if at - start <= LINE else at


def _by_distance(answers: Sequence[Answer]) -> list[tuple[int, Cell]]:
    groups: dict[int, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(1 << (answer.distance.bit_length() - 1), []).append(answer)
    return [(least, average(groups[least])) for least in sorted(groups)]


def _tell(depth: float, length: int, cell: Cell) -> None:
    print(
        f"  length {length:>9,}  depth {depth:.2f}  found {cell.accuracy:>4.0%}  margin {cell.margin:+.3f}", flush=True
    )


def _heat(axis: Any, report: Report, values: list[list[float]], form: str, **colours: Any) -> None:
    """Depth downwards, length to the right, the number in every cell."""
    image = axis.imshow(values, aspect="auto", **colours)
    axis.set(xlabel="tokens of the prompt", ylabel="depth of the fact (0 = start, 1 = before the question)")
    axis.set_xticks(range(len(report.lengths)), [f"{length:,}" for length in report.lengths])
    axis.set_yticks(range(len(report.depths)), [f"{depth:g}" for depth in report.depths])
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            axis.text(j, i, form.format(value), ha="center", va="center", color=ink, fontsize=9)
    axis.title.set_fontsize(11)


def _distances(axis: Any, report: Report, window: int) -> None:
    middle = [cell.distance for _, cell in report.by_distance]
    cells = [cell for _, cell in report.by_distance]
    errors = [cell.margin_error or 0 for cell in cells]
    margins = [cell.margin for cell in cells]
    bars = axis.errorbar(middle, margins, errors, color="#D55E00", marker="o", capsize=3, label="margin (left)")
    axis.axvline(window, color="#595959", linestyle="--", linewidth=1.2)
    at = {"transform": axis.get_xaxis_transform(), "rotation": 90, "ha": "right", "va": "center"}
    axis.text(window, 0.5, f"window {window}", color="#595959", **at)
    axis.axhline(0, color="#595959", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="tokens from the fact to the answer (log scale)", ylabel="margin, nats (± standard error)")
    right = axis.twinx()
    (line,) = right.plot(middle, [cell.accuracy for cell in cells], color="#0072B2", marker="s", label="found (right)")
    right.set(ylim=(-0.03, 1.03), ylabel="share found")
    axis.legend(handles=[bars, line], loc="upper right", frameon=False, fontsize=9)
    axis.set_title("By distance", fontsize=11)

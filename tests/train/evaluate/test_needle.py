"""Needles: prompts as they are said to be, and a report that tells the truth about models whose memory is known."""

import json
import random
from dataclasses import replace

import pytest
import torch

from abyssal.model import ModelConfig, Transformer, generate
from abyssal.model.transformer import Output
from abyssal.train.data.corpus import Corpus, Document
from abyssal.train.data.tokenizers import BOS, ByteTokenizer
from abyssal.train.evaluate import needle

TEXT = b"".join(b"line %d of the text, of some length\n" % i for i in range(200))
CORPUS = Corpus((Document("a", TEXT),), (Document("b", TEXT),))


def nano(**changes):
    torch.manual_seed(0)
    return Transformer(ModelConfig.from_dict({**ModelConfig.load("nano").to_dict(), **changes})).eval()


class Reader(Transformer):
    """Not a model but a search: it answers with the code that began at most `reach` tokens ago, behind its colour.

    Where it finds none it is sure of a space. It keeps what it was fed, as a model's cache would.
    """

    def __init__(self, config, reach):
        super().__init__(config)
        self.reach = reach
        self.head.weight = torch.nn.Parameter(torch.eye(config.vocab_size))

    def forward(self, ids, *, cache, lengths=None, logits_to_keep=0):
        step = cache.begin(self.config, ids, lengths)
        rows = [[]] * len(ids) if step.past[0] == 0 else self.seen
        self.seen = [row + new for row, new in zip(rows, ids.tolist())]
        with cache.appending(step):
            t = ids.shape[1]
            likely = [[self.next_byte(row[: len(row) - t + 1 + i]) for i in range(t)] for row in self.seen]
        hidden = 30 * torch.nn.functional.one_hot(torch.tensor(likely), self.config.vocab_size).float()
        return Output(hidden[:, -logits_to_keep:], self.head.weight)

    def next_byte(self, row):
        text = bytes(min(token, 255) for token in row)
        start = text.rfind(b"\n") + 1
        name, verb, written = text[start:].partition(b" is ")
        code = text.find(name + verb, 0, start) + len(name + verb)
        if not verb or code < len(name + verb) or len(text) - len(written) - code > self.reach:
            return ord(" ")
        return text[code + len(written)]


@pytest.mark.parametrize("depth", [0, 0.31, 0.5, 1])
@pytest.mark.parametrize("length", [needle.shortest() + 1, 100, 301, 20_000])
def test_a_prompt_is_what_it_says(length, depth):
    for seed in range(5):
        got = needle.plant(TEXT, length, depth, random.Random(seed))
        assert len(got.prompt) == len(got.control) == length and got.prompt[0] == got.control[0] == BOS
        prompt, control, code = (ByteTokenizer().decode(tokens) for tokens in (got.prompt, got.control, got.code))
        colour = prompt.rpartition("The code of the ")[2].split()[0]
        assert colour in needle.COLOURS and prompt.endswith(f"\nThe code of the {colour} key is ")
        fact = f"The code of the {colour} key is {code}.\n"
        assert prompt.count(fact) == 1 and fact not in control and code not in control
        before = prompt.index(fact)
        assert control[:before] == prompt[:before] and control[before + len(fact) :] == prompt[before + len(fact) :]
        text = len(prompt) - len(fact) - len(f"\nThe code of the {colour} key is ")
        assert depth * text - needle.LINE - 1 <= before <= depth * text + 1
        assert got.distance == len(prompt) - prompt.index(code) == length - got.prompt.index(got.code[0], before)


def test_facts_stand_at_line_starts_where_there_are_lines():
    got = ByteTokenizer().decode(needle.plant(TEXT, 2000, 0.5, random.Random(0)).prompt)
    assert "\nThe code" in got[:1990].rpartition(" is ")[0]
    unbroken = needle.plant(b"x" * 5000, 2000, 0.5, random.Random(0))
    assert abs(unbroken.distance - 1000) < 60


def test_the_code_is_one_that_the_text_does_not_hold():
    text = b" ".join(b"%04d" % number for number in range(10_000) if number != 42)
    for seed in range(3):
        assert ByteTokenizer().decode(needle.plant(text, 60_000, 0.5, random.Random(seed)).code) == "0042"


def test_a_needle_does_not_depend_on_the_others():
    model = nano(engram=None, num_hidden_layers=1, compress_ratios=[0])
    few = needle.evaluate(model, CORPUS, [100], [0.5], trials=2, batch=1)
    more = needle.evaluate(model, CORPUS, [90, 100], [0.2, 0.5], trials=2, batch=2)
    assert more.cells[1][1].margin == pytest.approx(few.cells[0][0].margin, abs=1e-5)
    assert more.cells[1][1].distance == few.cells[0][0].distance
    other = needle.evaluate(model, CORPUS, [100], [0.5], trials=2, seed=1)
    assert other.cells[0][0].log_probability != few.cells[0][0].log_probability


def test_found_and_margin_are_those_of_plain_passes():
    """Log-probabilities from a full pass without a cache; the verdict from greedy generation."""
    model = nano()
    with torch.no_grad():
        model.head.weight.mul_(20)
    needles = [needle.plant(TEXT, 150, depth, random.Random(3)) for depth in (0.1, 0.9)]
    greedy = generate(model, needles[1].prompt, max_new_tokens=needle.DIGITS, temperature=0)
    right = [int(token) for token in greedy]
    needles[1] = replace(needles[1], code=right)
    needles.append(replace(needles[1], code=[*right[:-1], (right[-1] + 1) % 256]))
    for asked, answer in zip(needles, needle.ask(model, needles)):
        for prompt, found, got in (
            (asked.prompt, answer.found, answer.log_probability),
            (asked.control, answer.found_without, answer.log_probability_without),
        ):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + asked.code])).logits[0, len(prompt) - 1 : -1]
            want = logits.double().log_softmax(-1)[range(needle.DIGITS), asked.code].sum().item()
            assert got == pytest.approx(want, abs=1e-3)
            written = generate(model, prompt, max_new_tokens=needle.DIGITS, temperature=0)
            assert found == ([int(token) for token in written] == asked.code)
    assert [answer.found for answer in needle.ask(model, needles)[1:]] == [True, False]


@pytest.mark.parametrize("reach", [0, 150, 10**6])
def test_the_report_tells_how_far_a_model_sees(reach):
    report = needle.evaluate(Reader(nano().config, reach), CORPUS, [100, 200, 400], [0, 0.5, 1], trials=3, batch=2)
    answered = [cell for cell in report.all if cell.distance < reach - 5]
    missed = [cell for cell in report.all if cell.distance > reach + 5]
    assert len(answered) == {0: 0, 150: 6, 10**6: 9}[reach] and len(answered) + len(missed) == 9
    assert all(cell.accuracy == 1 and cell.margin > 100 for cell in answered)
    assert all(cell.accuracy == 0 and abs(cell.margin) < 1e-6 for cell in missed)
    assert all(cell.accuracy_without == 0 and cell.trials == 3 for cell in report.all)
    for least, cell in report.by_distance:
        assert least <= cell.distance < 2 * least
    assert sum(cell.trials for _, cell in report.by_distance) == 27
    found = sum(round(3 * cell.accuracy) for cell in report.all)
    assert needle.summary(report) == f"found {found} of 27; without the fact 0 of 27"


def test_depth_is_the_row_and_length_the_column():
    report = needle.evaluate(Reader(nano().config, 130), CORPUS, [100, 400], [0, 1], trials=2)
    assert [[cell.accuracy for cell in row] for row in report.cells] == [[1, 0], [1, 1]]
    cells = report.to_dict()["cells"]
    assert [(cell["depth"], cell["length"], cell["accuracy"]) for cell in cells] == [
        *((0, 100, 1), (0, 400, 0), (1, 100, 1), (1, 400, 1))
    ]
    rows = needle.table(report).splitlines()
    assert [row.split()[:4:2] for row in rows[1:3]] == [["0.00", margin(report, 0)], ["1.00", margin(report, 1)]]
    assert [row.split()[1:4:2] for row in rows[1:3]] == [["100%", "0%"], ["100%", "100%"]]


def margin(report, depth):
    """As the table prints it, of the first length."""
    return f"{report.cells[depth][0].margin:+.2f}"


def test_averages():
    answers = [needle.Answer(8, True, False, -1.0, -3.0), needle.Answer(10, False, False, -2.0, -2.5)]
    got = needle.average(answers)
    assert (got.trials, got.distance, got.accuracy, got.accuracy_without) == (2, 9, 0.5, 0)
    assert (got.log_probability, got.log_probability_without, got.margin) == (-1.5, -2.75, 1.25)
    assert got.margin_error == pytest.approx(0.75)
    assert needle.average(answers[:1]).margin_error is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [50]}, "lengths has 50: allowed are 71"),
        ({"lengths": [100, 8190]}, "lengths has 8190: allowed are .* to 8189"),
        ({"lengths": []}, "lengths: 0 given"),
        ({"depths": [1.5]}, "depths has 1.5: allowed are 0"),
        ({"depths": []}, "depths: 0 given"),
        ({"trials": 0}, "trials: 0 given"),
        ({"batch": 0}, "batch: 0 given"),
    ],
)
def test_settings_are_checked(changes, message):
    settings = {"lengths": [100], "depths": [0.5], "trials": 1, "batch": 1, **changes}
    with pytest.raises(ValueError, match=message):
        needle.evaluate(nano(), CORPUS, settings.pop("lengths"), settings.pop("depths"), **settings)


def test_numbers_are_read_or_named():
    assert needle.numbers("lengths", "1, 2,3", int) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"depths='0\.5,deep': 'deep' is no float"):
        needle.numbers("depths", "0.5,deep", float)


def test_the_files_of_a_checkpoint(tiny, tmp_path, capsys):
    from abyssal.train.start import train

    run = tmp_path / "run"
    train(tiny("train.steps=1", "train.eval_every=0", "train.sample_tokens=0"), run, shown=False)
    needle.run(run, "80,120", "0,1", trials=2, batch=2, seed=0, out=None)
    text = capsys.readouterr().out
    report = json.loads((run / needle.FILE).read_text("utf-8"))
    assert [(cell["depth"], cell["length"]) for cell in report["cells"]] == [(0, 80), (0, 120), (1, 80), (1, 120)]
    assert report["trials"] == 2 and report["window"] == 16 and report["checkpoint"].endswith("step-000001")
    assert sum(cell["trials"] for cell in report["by_distance"]) == 8
    assert (run / needle.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert f"found {sum(cell['accuracy'] * 2 for cell in report['cells']):.0f} of 8" in text
    assert str(run / needle.PICTURE) in text and "margin" in text

"""`abyssal eval constrained`: what it prints and refuses; what comes out is judged in test_constrain.py."""

import re

import pytest

from abyssal.train.cli import main
from abyssal.train.evaluate.constrained import SCHEMAS, TOOLS, Report, json_tasks, open_model, run, tool_tasks

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")


def test_the_command(capsys):
    assert main(["eval", "constrained", "--answers", "6", "--tokens", "60", "--batch", "6", "--seed", "2"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"answers +([\d,]+), ([\d,]+) of them valid", out) == [("6", "6"), ("2", "2")]
    assert out.count("us per token") == 4 and "vocabulary  288 tokens" in out


@pytest.mark.parametrize("options, message", [
    (["--answers", "0"], "answers=0"),
    (["--batch", "0"], "batch=0"),
    (["--tokens", "5"], "max_new_tokens=5"),
    (["--random", "nowhere"], "nowhere"),
    (["no/such/run"], "no/such/run"),
])  # fmt: skip
def test_mistakes_end_in_a_line(capsys, options, message):
    assert main(["eval", "constrained", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_invalid_answers_end_with_an_error(monkeypatch, capsys):
    from abyssal.train.evaluate import constrained

    report = Report(288, 3, ["map: wrong"], 30, 0.001, 0.002)
    monkeypatch.setattr(constrained, "run", lambda *given: report)
    assert main(["eval", "constrained", "--answers", "3"]) == 2
    out, error = capsys.readouterr()
    assert "3, 2 of them valid" in out and "INVALID     map: wrong" in out and "2 answers are not valid" in error
    assert "constraint  33 us per token" in out and "model       33 us per token" in out


def test_cut_off_answers_are_failures():
    """Without `finish` a random model is cut off, and the report says so."""
    from abyssal.model.text.constrain import Constraint

    model, tokenizer = open_model(None, "nano", None, 0)
    task = json_tasks(tokenizer)[0]
    task.constraint = Constraint(task.constraint.grammar, tokenizer, finish=False)
    assert run(model, tokenizer, [task], 2, tokens=5).failures == ["nested objects: not complete"] * 2


def test_as_many_as_promised():
    _, tokenizer = open_model(None, "nano", "bytes", 0)
    assert len(SCHEMAS) == 20 == len(json_tasks(tokenizer))
    assert len(tool_tasks(tokenizer)) == 2 * (2 + len(TOOLS))

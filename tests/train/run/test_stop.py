"""Ctrl-C, SIGTERM and a pipe that nobody reads: the step ends, a checkpoint is saved, the resumed run has the bits."""

import os
import signal
import subprocess
import sys
import threading

import kills
import pytest

from abyssal.train.cli import main
from abyssal.train.run import checkpoint, loop, metrics
from abyssal.train.run.folder import LOCK
from abyssal.train.run.stop import noted
from abyssal.train.start import train

STEPS = 14


def command(texts, out, *more: str) -> list[str]:
    keys = [f"data.source={texts}", "data.sequence_length=48", "data.batch_size=2", "data.held_out_rows=3"]
    keys += ["optim.warmup_steps=2", f"train.steps={STEPS}", "train.eval_every=5", "train.checkpoint_every=5"]
    keys += ["train.sample_tokens=0", "train.log_every=1", "train.device=cpu", *more]
    return ["train", "nano", "--out", str(out), *(word for key in keys for word in ("--set", key))]


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("stop") / "whole"
    assert main(command(texts, out)) == 0
    return out


def same_end(out, whole) -> None:
    assert main(["train", "--resume", str(out)]) == 0
    assert kills.records(out) == kills.records(whole)
    for file in ("model", "optimizer", "random"):
        a, b = (kills.load_file(checkpoint.find(run) / f"{file}.safetensors") for run in (out, whole))
        assert a.keys() == b.keys() and all(kills.torch.equal(a[key], b[key]) for key in a)


def started(arguments: list[str]) -> subprocess.Popen:
    line = [sys.executable, "-m", "abyssal", *arguments]
    root = os.path.dirname(os.path.dirname(os.path.dirname(loop.__file__)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_step(number, code, texts, whole, tmp_path):
    out = tmp_path / "run"
    process = started(command(texts, out))
    while not process.stdout.readline().startswith("step  6/"):
        pass
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    last = len(metrics.read(out))
    assert process.returncode == code and 6 <= last < STEPS, said
    assert checkpoint.find(out).name == f"step-{last:06d}"
    told = f"abyssal train: stopped after step {last} of {STEPS}; go on with: abyssal train --resume {out}"
    assert said.split("\n") == [
        "",
        "ending after this step, with a checkpoint; once more ends it at once",
        "",
        told,
        "",
    ]
    same_end(out, whole)


def test_a_pipe_that_nobody_reads_ends_the_run_quietly_and_whole(texts, whole, tmp_path):
    out = tmp_path / "run"
    process = started(command(texts, out))
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE and said == ""
    assert len(metrics.read(out)) < STEPS and not (out / LOCK).exists()
    assert [path.name for path in checkpoint.checkpoints(out)] == [f"step-{len(metrics.read(out)):06d}"]
    same_end(out, whole)


def interrupting(monkeypatch, at: int, times: int) -> None:
    plain = loop.Run.step

    def step(run):
        for _ in range(times if run.progress.step == at else 0):
            signal.raise_signal(signal.SIGINT)
        return plain(run)

    monkeypatch.setattr(loop.Run, "step", step)


def test_the_second_ends_it_at_once(texts, tmp_path, monkeypatch, capsys):
    interrupting(monkeypatch, 2, 2)
    before = signal.getsignal(signal.SIGINT)
    assert main(command(texts, tmp_path / "run", "train.checkpoint_every=1")) == 130
    assert "interrupted; the last checkpoint is step-000002: go on with --resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_of_a_program_is_interrupted_as_any_other(tiny, tmp_path, monkeypatch):
    interrupting(monkeypatch, 1, 1)
    with pytest.raises(KeyboardInterrupt) as end:
        train(tiny(), tmp_path / "run", shown=False)
    assert type(end.value) is KeyboardInterrupt and not checkpoint.checkpoints(tmp_path / "run")


def test_nobody_listens_beside_the_main_thread_and_ignored_signals_stay_ignored():
    def look(found):
        with noted(True):
            found.append(signal.getsignal(signal.SIGTERM))

    found, before = [], signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look, args=(found,))
    thread.start()
    thread.join()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        look(found)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == [before, signal.SIG_IGN]

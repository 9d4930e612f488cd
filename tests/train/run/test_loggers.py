"""Lines of metrics as other programs see them: each number under a tag, a resumed run where it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from abyssal.train.recipe import Recipe, load_recipe
from abyssal.train.run import loggers, metrics, provenance
from abyssal.train.run.loggers import Loggers, scalars
from abyssal.train.start import train

RECORD = {"step": 3, "lm": 2.5, "load_max": [1.5, None], "grad_by": {"attn": 0.25}, "text": "no number"}


class Fake:
    """Keeps what it is told; fails from the given step on."""

    def __init__(self, folder: Path, recipe: Recipe, step: int) -> None:
        self.began, self.told, self.closed, self.fails_at = step, [], 0, 10**9

    def write(self, step, numbers):
        if step >= self.fails_at:
            raise RuntimeError("no room")
        self.told.append((step, numbers))

    def close(self):
        self.closed += 1


@pytest.fixture
def fakes(monkeypatch):
    made = []

    def make(*arguments):
        made.append(Fake(*arguments))
        return made[-1]

    monkeypatch.setitem(loggers.LOGGERS, "wandb", make)
    return made


def asking(*names):
    return load_recipe("nano", [f"train.log={json.dumps(names)}"])


def test_every_number_has_a_tag_of_its_own():
    assert dict(scalars(RECORD)) == {"lm": 2.5, "load_max/0": 1.5, "grad_by/attn": 0.25}


def test_a_run_tells_every_step_and_closes(tiny, tmp_path, fakes):
    recipe = tiny("train.steps=3", "train.eval_every=0", "train.sample_tokens=0", 'train.log=["wandb"]')
    train(recipe, tmp_path / "run", stop_at=2, shown=False)
    train(recipe, tmp_path / "run", resume=tmp_path / "run", shown=False)
    assert [fake.began for fake in fakes] == [0, 2] and [fake.closed for fake in fakes] == [1, 1]
    told = [step for fake in fakes for step, _ in fake.told]
    assert told == [1, 2, 3] and fakes[0].told[0][1]["lm"] == metrics.read(tmp_path / "run")[0]["lm"]


def test_one_that_fails_is_given_up_once_and_the_others_go_on(tmp_path, fakes, monkeypatch):
    other = Fake(tmp_path, None, 0)
    monkeypatch.setitem(loggers.LOGGERS, "trackio", lambda *_: other)
    found = Loggers(tmp_path, asking("wandb", "trackio"))
    fakes[0].fails_at = 3
    with pytest.warns(UserWarning, match=r"nothing more is written for wandb: no room; metrics\.jsonl has") as told:
        for step in (2, 3, 4):
            found.write({**RECORD, "step": step})
        found.close()
    assert len(told) == 1 and [step for step, _ in other.told] == [2, 3, 4] and other.closed == 1


def test_what_cannot_begin_is_named(tmp_path, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'wandb'", name="wandb")

    def refuses(*_):
        raise RuntimeError("no account\nlog in")

    monkeypatch.setitem(loggers.LOGGERS, "wandb", missing)
    words = r"train\.log=\['wandb'\]: wandb is not installed \(pip install 'abyssal\[wandb\]'\)"
    with pytest.raises(ModuleNotFoundError, match=words):
        Loggers(tmp_path, asking("wandb"))
    monkeypatch.setitem(loggers.LOGGERS, "wandb", refuses)
    with pytest.raises(ValueError, match="wandb cannot begin: no account log in"):
        Loggers(tmp_path, asking("wandb"))


@pytest.mark.parametrize(
    ("overrides", "log"),
    [
        (["train.tensorboard=true"], ("tensorboard",)),
        (['train.log=["wandb"]', "train.tensorboard=true"], ("wandb", "tensorboard")),
        (['train.log=["tensorboard", "wandb"]', "train.tensorboard=false"], ("wandb",)),
        (["train.tensorboard=false"], ()),
    ],
)
def test_an_earlier_recipe_asks_for_tensorboard(overrides, log):
    recipe = load_recipe("nano", overrides)
    assert recipe.train.log == log and Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("log", ['["mlflow"]', '["wandb", "wandb"]'])
def test_unknown_programs_are_refused(log):
    with pytest.raises(ValueError, match=r"train\.log=.*allowed is tensorboard, trackio, wandb, each at most once"):
        load_recipe("nano", [f"train.log={log}"])


def test_event_files_hold_the_numbers_and_a_resumed_run_hides_what_it_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Loggers(tmp_path, asking("tensorboard"))
    for step in range(1, 6):
        board.write({"step": step, "lm": float(step)})
    board.close()
    board = Loggers(tmp_path, asking("tensorboard"), step=3)
    board.write({"step": 4, "lm": 40.0})
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("lm")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def twice(tmp_path, name: str, then: str = "") -> str:
    """A run of three steps and its resumption for three more, in a process that is the library's own."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / provenance.FILE).write_text('{"starts": [{"time": "now", "recipe": {}}]}', "utf-8")
    code = f"""
import sys; sys.path.insert(0, {str(Path(loggers.__file__).parents[2])!r})
from pathlib import Path
from abyssal.train.recipe import load_recipe
from abyssal.train.run.loggers import Loggers
for first in (1, 4):
    found = Loggers(Path("mine"), load_recipe("nano", ['train.log=["{name}"]']), first - 1)
    for step in range(first, first + 3):
        found.write({{"step": step, "lm": step / 2, "load_max": [step]}})
    assert found.open
    found.close()
{then}"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wandb_takes_a_run_without_an_account(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    twice(tmp_path, "wandb")
    runs = sorted((tmp_path / "mine" / "wandb").glob("offline-run-*"))
    assert len({run.name.rpartition("-")[2] for run in runs}) == 1 and all(list(run.glob("*.wandb")) for run in runs)


def test_trackio_takes_a_run_on_this_machine(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    read = """
import json; from trackio.sqlite_storage import SQLiteStorage
print(json.dumps([[r["step"], r["lm"], r["load_max/0"]] for r in SQLiteStorage.get_logs("abyssal", "mine")]))"""
    (told,) = (line for line in twice(tmp_path, "trackio", read).splitlines() if line.startswith("[["))
    assert json.loads(told) == [[s, s / 2, s] for s in range(1, 7)]

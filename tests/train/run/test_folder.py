"""A run's folder: one writer, names that never collide, foreign things left alone, files that are broken named."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch as safetensors
import torch
from patience import wait_for

import abyssal
from abyssal.model import disk
from abyssal.model.disk import lock
from abyssal.train.cli import main
from abyssal.train.distributed.world import ALONE
from abyssal.train.run import checkpoint, folder, loop, metrics, provenance
from abyssal.train.run.folder import _Held
from abyssal.train.run.load import load_trained
from abyssal.train.start import never_saved, train

HOLDER = """
import sys, time
from pathlib import Path
from abyssal.train.distributed.world import ALONE
from abyssal.train.run import folder
with folder.written(Path(sys.argv[1]), "run", ALONE):
    print("here", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def recipe(tiny):
    return tiny("train.steps=2", "train.eval_every=0", "train.checkpoint_every=1", "train.sample_tokens=0")


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    return train(recipe, tmp_path_factory.mktemp("whole") / "run", shown=False).out


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_a_second_writer_is_refused_by_name_until_the_first_is_dead(run, recipe, capsys):
    root = str(Path(abyssal.__file__).resolve().parents[1])
    command = [sys.executable, "-c", HOLDER, str(run)]
    holder = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"here\n"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(run), "--set", "train.steps=3"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{str(run)!r} is being written by process {holder.pid} on " in said
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert checkpoint.find(run).name == "step-000002" and len(metrics.read(run)) == 2, "readers are not hindered"
    holder.send_signal(signal.SIGKILL)
    wait_for(lambda: holder.poll() is not None)
    assert (run / folder.LOCK).exists()
    train(recipe, run, resume=run, shown=False)
    assert not (run / folder.LOCK).exists()


def test_a_run_of_which_nothing_came_leaves_nothing(recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(recipe, tmp_path / "a" / "b", resume=tmp_path / "nowhere", shown=False)
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path):
    (tmp_path / "file").touch()
    held = lock(tmp_path / "file")
    assert held is not None and lock(tmp_path / "file") is None
    (tmp_path / "file").unlink()
    with pytest.raises(FileNotFoundError):
        lock(tmp_path / "file")
    os.close(held)


@pytest.mark.parametrize("code", disk.WITHOUT_LOCKS)
def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, code):
    """As some of clusters are; and those of NFS lock a file exclusively only if it is open for writing."""
    (tmp_path / "file").touch()
    held = lock(tmp_path / "file")
    assert fcntl.fcntl(held, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"file' cannot be locked here \(.*\): let one process at a time write there"):
        os.close(lock(tmp_path / "file"))
    os.close(held)


def moved(out: Path) -> None:
    os.rename(out, out.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("go", "other", "call"),
    [
        (moved, True, "save"),
        (shutil.rmtree, True, "save"),
        (moved, False, "save"),
        (shutil.rmtree, True, "_restore"),
        (moved, True, "sample"),
    ],
)
def test_a_folder_that_is_moved_or_removed_ends_its_run(go, other, call, run, recipe, tiny, monkeypatch):
    """Before its next write, which would be into a folder that another run may have made there meanwhile."""
    plain, lost = getattr(loop.Run, call), []

    def loses(self, *arguments):
        found = plain(self, *arguments)
        if not lost:
            go(run)
            lost.append(other and _Held(run, "run"))
        return found

    longer = tiny("train.steps=4", "train.eval_every=0", "train.checkpoint_every=1")
    monkeypatch.setattr(loop.Run, call, loses)
    with pytest.raises(folder.FolderLost, match=r"'.*run' was moved or removed meanwhile") as error:
        train(longer, run, resume=run, shown=False)
    assert not getattr(error.value, "__notes__", None)
    assert [path.name for path in run.iterdir()] == [folder.LOCK] if other else not run.exists()


def test_folders_of_one_second_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder.time, "strftime", lambda _: "20260101-120000")
    first = folder.fresh("nano")
    with folder.written(None, "nano", ALONE) as second, folder.written(None, "nano", ALONE) as third:
        names = [path.name for path in (first, second[0], third[0])]
    assert names == ["nano-20260101-120000", "nano-20260101-120000-2", "nano-20260101-120000-3"]
    assert list((tmp_path / "runs").iterdir()) == [first.absolute()], "empty ones are gone"


def litter(parent: Path) -> list[Path]:
    """Everything that people leave beside checkpoints."""
    good, made = parent / "step-000002", []
    for name in ("step-000002-good", "step-000002 (copy)", "step-old", "step-2", "step-0000009"):
        made.append(Path(shutil.copytree(good, parent / name)))
    for name in ("step-000007", "step-000003", ".tmp", "empty"):
        (parent / name).mkdir()
    for name in ("step-000008", "step-notes", "README", ".writing-notes"):
        (parent / name).write_text("mine", "utf-8")
    (parent / "step-000010").symlink_to(shutil.copytree(good, parent / "kept"), target_is_directory=True)
    (parent / "latest").symlink_to("nowhere")
    return [path for path in parent.iterdir() if path.name not in ("step-000001", "step-000002")]


def test_foreign_things_beside_checkpoints_are_left_alone(run, recipe, tiny):
    parent = run / checkpoint.FOLDER
    foreign = litter(parent)
    before = {path: sorted(path.iterdir()) if path.is_dir() else None for path in foreign}
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step-000001", "step-000002"]
    longer = tiny("train.steps=4", "train.eval_every=0", "train.checkpoint_every=1", "train.sample_tokens=0")
    with pytest.warns(UserWarning, match=r"step-000003' is not of this run: moved to 'step-000003.1'"):
        train(longer, run, resume=run, shown=False)
    del before[parent / "step-000003"]
    assert before == {path: sorted(path.iterdir()) if path.is_dir() else None for path in before}
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step-000003", "step-000004"]
    assert (parent / "step-000003.1").is_dir() and os.readlink(parent / "latest") == "nowhere"


def other(text: bytes, **values) -> bytes:
    return json.dumps({**json.loads(text), **values}).encode()


def moments(text: bytes, change, name: str = "exp_avg") -> bytes:
    """The moments of a file with one of them changed."""
    tensors = safetensors.load(text)
    return safetensors.save({**tensors, f"embed.weight.{name}": change(tensors["embed.weight.exp_avg"]).clone()})


BROKEN = {
    "{}": ("checkpoint.json", lambda text: b"{}", "has no 'recipe'"),
    "[]": ("checkpoint.json", lambda text: b"[]", "is no JSON object"),
    "no text": ("checkpoint.json", lambda text: b"\xff\xfe", "utf-8"),
    "cut": ("checkpoint.json", lambda text: text[:99], "cut off"),
    "empty": ("checkpoint.json", lambda text: b"", "cut off"),
    "version": (
        "checkpoint.json",
        lambda text: text.replace(b'"lr"', b'"lr_of_later"'),
        "another version.*lr_of_later",
    ),
    "step": ("checkpoint.json", lambda text: text.replace(b'"step": 2', b'"step": -2'), "is broken"),
    "progress": ("checkpoint.json", lambda text: text.replace(b'"step": 2', b'"steps": 2'), "broken.*steps"),
    "weights cut": ("model.safetensors", lambda text: text[:-5], "cut off"),
    "weights gone": ("model.safetensors", lambda text: None, "has no model.safetensors"),
    "other weights": ("model.safetensors", lambda text: text.replace(b"embed.weight", b"embed.wsight"), "does not fit"),
    "moments empty": ("optimizer.safetensors", lambda text: b"", "cut off"),
    "moments cut": ("optimizer.safetensors", lambda text: moments(text, lambda m: m[:1]), r"exp_avg is .*\[1, "),
    "moments of integers": ("optimizer.safetensors", lambda text: moments(text, torch.Tensor.int), "exp_avg is int32"),
    "steps in rows": ("optimizer.safetensors", lambda text: moments(text, lambda m: m[0], "step"), r"step is .*\[64\]"),
    "no moments": ("optimizer.safetensors", lambda text: safetensors.save({}), "holds nothing after 2 steps"),
    "moments gone": ("optimizer.safetensors", lambda text: None, "has no optimizer.safetensors"),
    "random gone": ("random.safetensors", lambda text: None, "random.safetensors': no such file"),
    "random foreign": ("random.safetensors", lambda text: text.replace(b'"cpu"', b'"gpu"'), "random generators"),
    "deep": ("checkpoint.json", lambda text: b"[" * 100_000, "nested too deeply"),
    "recipe": ("checkpoint.json", lambda text: other(text, recipe=None), "recipe=None"),
    "model": ("checkpoint.json", lambda text: other(text, recipe={"model": 5}), "model=5"),
    "data": ("checkpoint.json", lambda text: other(text, data=5), "data=5"),
    "seconds": ("checkpoint.json", lambda text: text.replace(b'"seconds": ', b'"seconds": -'), "is broken"),
    "no progress": ("checkpoint.json", lambda text: other(text, progress={}), "progress={}"),
    "other step": ("checkpoint.json", lambda text: text.replace(b'"step": 2', b'"step": 1'), "its step is 1"),
    "deep run": ("../../run.json", lambda text: b"[" * 100_000, "nested too deeply"),
    "no recipe": ("../../run.json", lambda text: b'{"starts": [{"recipe": []}]}', "no list of the run's starts"),
    "run": ("../../run.json", lambda text: b'{"starts": []}', "no list of the run's starts"),
    "run cut": ("../../run.json", lambda text: text[:50], "cut off"),
    "metrics": ("../../metrics.jsonl", lambda text: b"\x00\n" + text, "line 1 is no record"),
    "deep metrics": ("../../metrics.jsonl", lambda text: b"[" * 100_000 + b"\n" + text, "line 1 is no record"),
    "not finite": ("../../metrics.jsonl", lambda text: b'{"step": 1, "loss": NaN}\n' + text, "line 1 is no record"),
    "words": ("../../metrics.jsonl", lambda text: b'{"step": 1, "lm": "x"}\n' + text, "line 1 is no record"),
    "in layers": ("../../metrics.jsonl", lambda text: b'{"step": 1, "gain": ["x"]}\n' + text, "line 1 is no record"),
    "other metrics": ("../../metrics.jsonl", lambda text: b"[1]\n" + text, "line 1 is no record"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named_in_one_line(case, run, capsys):
    name, change, message = BROKEN[case]
    path = (checkpoint.find(run) / name).resolve()
    text = change(path.read_bytes())
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(run), "--set", "train.steps=3"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and path.name in said
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert re.search(message, said), said


@pytest.mark.parametrize("key", ["hidden_size", "n_routed_experts", "vocab_size", "engram.vocab_size", "head_dim"])
def test_a_model_larger_than_its_checkpoint_is_not_built(key, run, capsys):
    path = checkpoint.find(run) / checkpoint.STATE
    state = json.loads(path.read_bytes())
    *table, name = key.split(".")
    (state["recipe"]["model"][table[0]] if table else state["recipe"]["model"])[name] = 10**9
    path.write_text(json.dumps(state), "utf-8")
    for command in (["train", "--resume"], ["generate"], ["eval"]):
        assert main([*command, str(run)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "model.safetensors' is not of its recipe's model: 988,586 numbers" in said


def test_a_pipe_for_weights_is_not_waited_for(run, capsys):
    path = checkpoint.find(run) / "model.safetensors"
    path.unlink()
    os.mkfifo(path)
    assert main(["generate", str(run)]) == 2
    assert "has no model.safetensors" in capsys.readouterr().err


def test_a_picture_that_fails_fails_no_run(run, capsys):
    (run / metrics.FILE).write_text('{"step": 1}\n{"step": 2}\n', "utf-8")
    assert main(["train", "--resume", str(run)]) == 0
    assert re.search(r"not drawn: .*metrics.jsonl': line 1 has no tokens", capsys.readouterr().out)
    assert main(["plot", str(run)]) == 2


@pytest.mark.parametrize("kept", [b"", None, b'{"step": 1, "lm": 3.0}\n{"step": 2, "l'])
def test_metrics_that_are_gone_or_cut_do_not_hinder_a_run(kept, run, recipe, tiny):
    path = run / metrics.FILE
    path.unlink() if kept is None else path.write_bytes(kept)
    with pytest.warns(UserWarning, match=rf"metrics.jsonl' has {bool(kept):d} of 2 steps so far"):
        train(tiny("train.steps=3", "train.eval_every=0", "train.sample_tokens=0"), run, resume=run, shown=False)
    assert [record["step"] for record in metrics.read(run)] == [1, 3][not kept :]


def test_the_newest_with_its_state_is_found(run):
    (checkpoint.find(run) / checkpoint.STATE).unlink()
    assert checkpoint.find(run).name == "step-000001"


def test_what_a_resumed_run_changes_is_said_and_kept(run, recipe, texts, tmp_path, capsys):
    other = Path(shutil.copytree(texts, tmp_path / "texts"))
    (other / "text00.txt").write_text("something else\n" * 40, "utf-8")
    sets = ("optim.lr=1e-4", "train.seed=3", f"data.source={other}", "train.steps=3", "data.batch_size=1")
    assert main(["train", "--resume", str(run), *(word for text in sets for word in ("--set", text))]) == 0
    said = capsys.readouterr().out
    wanted = [
        "data.batch_size: 2 -> 1",
        f"data.source: {str(texts)!r} -> {str(other)!r}",
        "optim.lr: 0.003 -> 0.0001",
        "train.seed: 0 -> 3",
        "train.steps: 2 -> 3",
    ]
    changed = json.loads((run / provenance.FILE).read_text("utf-8"))["starts"][-1]["changed"]
    assert changed[:-1] == wanted
    assert changed[-1].startswith(f"contents of data.source={str(other)!r}: ")
    assert all(f"changed  {text}\n" in said for text in changed)


def test_the_same_path_with_other_contents_is_said(whole, tiny, texts, tmp_path, capsys):
    source = Path(shutil.copytree(texts, tmp_path / "texts"))
    made = tiny(f"data.source={source}", "train.steps=1", "train.sample_tokens=0")
    out = train(made, tmp_path / "run", shown=False).out
    assert train(made, out, resume=out, shown=False) and "changed" not in capsys.readouterr().out
    (source / "text00.txt").write_text("something else\n" * 40, "utf-8")
    train(made, out, resume=out, shown=False)
    assert f"changed  contents of data.source={str(source)!r}: " in capsys.readouterr().out


@pytest.mark.parametrize("full", [1, 4, 6, 8])
def test_a_full_disk_ends_a_run_with_what_to_do_and_loses_nothing(full, tiny, whole, tmp_path, monkeypatch, capsys):
    """Tensors and lines of metrics are written in turns; write number `full` finds no room."""
    writes = []

    def room(path):
        writes.append(path)
        if len(writes) == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([str(path)] if path else []))

    save, write = disk.save_file, metrics._line
    monkeypatch.setattr(disk, "save_file", lambda tensors, path, **kept: room(path) or save(tensors, path, **kept))
    monkeypatch.setattr(metrics, "_line", lambda record: room(None) or write(record))
    out = tmp_path / "run"
    sets = [f"data.source={tiny().data.source}", "data.sequence_length=48", "data.batch_size=2", "data.held_out_rows=3"]
    sets += ["optim.warmup_steps=2", "train.steps=2", "train.eval_every=0", "train.checkpoint_every=1"]
    sets += ["train.sample_tokens=0", "train.device=cpu", "train.log_every=1"]
    command = ["train", "nano", "--out", str(out), *(word for text in sets for word in ("--set", text))]
    assert main(command) == 2
    said, last = capsys.readouterr().err, "none" if full < 5 else "step-000001"
    assert said.count("\n") == 1 and "no space left on device; make room there, or choose another place; " in said
    assert f"the last checkpoint is {last}: go on with --resume {out}\n" in said
    assert not list(out.rglob(".*"))
    assert main(["train", "--resume", str(out)]) == 0
    for file in ("model", "optimizer", "random"):
        a, b = (safetensors.load_file(checkpoint.find(run) / f"{file}.safetensors") for run in (whole, out))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [record["step"] for record in metrics.read(out)] == [1, 2]


@pytest.mark.parametrize(
    ("inside", "named", "out"),
    [
        ("run/checkpoints", "step-000002", None),
        ("run/checkpoints/step-000002", ".", None),
        (".", "best", None),  # a link
        ("elsewhere", "step-000002", "out"),
        (".", "elsewhere/step-000002", "out"),
        ("elsewhere/step-000002", ".", "out"),
    ],
)
def test_a_checkpoint_goes_on_by_whatever_path_leads_to_it(inside, named, out, run, monkeypatch, capsys):
    """In its own run; one that lies in none, in a folder that has to be named."""
    parent, newest = run.parent, checkpoint.find(run)
    (parent / "best").symlink_to(newest)
    shutil.copytree(newest, parent / "elsewhere" / newest.name)
    monkeypatch.chdir(parent / inside)
    command = ["train", "--resume", named, "--set", "train.steps=3"]
    if out:
        before = sorted(parent.rglob("*"))
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "lies in no run: give --out" in said
        assert sorted(parent.rglob("*")) == before
        with pytest.warns(UserWarning, match="has 0 of 2 steps"):
            assert main([*command, "--out", str(parent / out)]) == 0
    else:
        assert main(command) == 0
    assert checkpoint.find(parent / (out or "run")).name == "step-000003"


def test_checkpoints_may_lie_on_another_disk(run, recipe, tiny):
    (run / checkpoint.FOLDER).rename(run.parent / "disk")
    (run / checkpoint.FOLDER).symlink_to(run.parent / "disk")
    longer = tiny("train.steps=3", "train.eval_every=0", "train.sample_tokens=0")
    assert train(longer, run, resume=run, shown=False).checkpoint == run / checkpoint.FOLDER / "step-000003"


def test_a_run_of_another_kind_cannot_go_on(run, recipe, tiny):
    values = recipe.to_dict()
    other = type(recipe).from_dict({**values, "reason": {"tasks": ["addition-1"]}})
    with pytest.raises(ValueError, match=r"is of a run without \[reason\]: start a new one with train\.init"):
        train(other, run, resume=run, shown=False)


def test_of_two_who_write_a_file_at_once_the_later_one_wins(tmp_path):
    path = tmp_path / "x.json"
    dead, held = disk.open_beside(path)
    os.close(held)  # as its process' end does
    with disk.whole(path) as first:
        assert not dead.exists()
        with disk.whole(path) as second:
            first.write_text("1", "utf-8")
            second.write_text("2", "utf-8")
        assert path.read_text("utf-8") == "2"
    assert path.read_text("utf-8") == "1" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_written_where_its_link_leads_whatever_its_name_and_a_device_stays_one(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("target")
    disk.write_text(tmp_path / "link", "1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text("utf-8") == "1"
    disk.write_text(tmp_path / ("ä" * 127), "2")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setattr(disk, "flush", None)
    disk.write_text(tmp_path / "pipe", "3")
    assert os.read(reader, 9) == b"3" and len(list(tmp_path.iterdir())) == 4
    os.close(reader)


def test_without_locks_nobody_is_taken_for_dead(tmp_path, monkeypatch):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked here"), disk.whole(tmp_path / "x") as first:
        disk.write_text(tmp_path / "x", "2")
        first.write_text("1", "utf-8")
    assert (tmp_path / "x").read_text("utf-8") == "1" and len(list(tmp_path.iterdir())) == 1


def test_a_run_json_that_is_gone_ends_no_training(tmp_path):
    with pytest.warns(UserWarning, match=r"run\.json cannot say that there is a checkpoint"):
        provenance.mark_saved(tmp_path)


def test_a_run_that_began_from_anothers_checkpoint_does_not_start_over(run, recipe, tmp_path, monkeypatch):
    out = tmp_path / "branch"
    longer = replace(recipe, train=replace(recipe.train, steps=9, checkpoint_every=0))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(longer, out, resume=run, stop_at=3, shown=False)
    with pytest.raises(FileNotFoundError, match="put them back, or resume another's"):
        train(longer, out, resume=out, shown=False)


def test_runs_of_earlier_versions_do_not_say_that_they_were_saved(run):
    values = json.loads((run / "run.json").read_text("utf-8"))
    assert values.pop("saved") is True
    (run / "run.json").write_text(json.dumps(values), "utf-8")
    assert provenance.saved(run) is None
    (run / checkpoint.FOLDER).rename(run / "aside")
    with pytest.raises(FileNotFoundError, match="out of reach"):
        never_saved(run)


@pytest.mark.parametrize("how", ["edited", "removed", "folder moved"])
def test_lines_go_on_in_the_file_that_is_there(how, tmp_path):
    """An editor replaces a file; and what is another's folder by now gets no line."""
    out = tmp_path / "run"
    out.mkdir()
    file = metrics.MetricsFile(out)
    file.write({"step": 1})
    path = out / metrics.FILE
    if how == "edited":
        (out / "new").write_text(path.read_text("utf-8") + '{"step": 2}\n', "utf-8")
        (out / "new").rename(path)
    elif how == "removed":
        path.unlink()
    else:
        out.rename(tmp_path / "elsewhere")
        out.mkdir()
    if how == "folder moved":
        file.write({"step": 3})
    else:
        with pytest.warns(UserWarning, match=r"metrics\.jsonl' was replaced or removed: lines are added"):
            file.write({"step": 3})
    file.write({"step": 4})
    file.close()
    steps = {"edited": [1, 2, 3, 4], "removed": [3, 4], "folder moved": [1, 3, 4]}[how]
    assert [
        record["step"] for record in metrics.read(tmp_path / "elsewhere" if how == "folder moved" else out)
    ] == steps
    assert how != "folder moved" or not list(out.iterdir())


def test_a_run_that_has_nowhere_to_go_back_to_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoints' holds no checkpoint any more to go back to"):
        checkpoint.go_back(tmp_path, 3)


def test_checkpoints_that_cannot_be_listed_are_no_missing_ones(run, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(PermissionError, match="checkpoints"):
        checkpoint.find(run)


def test_a_checkpoint_that_its_run_removes_while_it_is_read_gives_way_to_the_newest(run, monkeypatch):
    oldest, newest = checkpoint.checkpoints(run)
    find, found = checkpoint.find, [oldest, newest]
    monkeypatch.setattr(checkpoint, "find", lambda path: found.pop(0))
    monkeypatch.setattr(checkpoint, "check_size", lambda folder, config: oldest.exists() and checkpoint.remove(oldest))
    load_trained(run)
    assert not found and find(run) == newest
    monkeypatch.setattr(checkpoint, "find", find)
    (newest / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model"):
        load_trained(run)


def test_a_text_at_the_end_that_the_model_cannot_read_is_told_at_the_start(tiny, tmp_path):
    most = tiny().model.max_position_embeddings
    with pytest.raises(ValueError, match=rf"train\.sample_tokens={most - 4} behind train\.sample_prompt: together at"):
        train(tiny(f"train.sample_tokens={most - 4}", "train.sample_prompt='def '"), tmp_path / "x", shown=False)


def test_a_lock_is_no_link_to_others_files_and_waits_for_no_pipe(tmp_path):
    (tmp_path / "others").write_text("theirs", "utf-8")
    (tmp_path / "link").symlink_to("others")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="symbolic"):
        lock(tmp_path / "link")
    os.close(lock(tmp_path / "pipe"))


def test_weights_that_may_not_be_read_are_not_missing(tmp_path, monkeypatch):
    def refuse(path, mode="r"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    safetensors.save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(Path, "open", refuse)
    for read in (disk.read_tensors, disk.tensor_shapes):
        with pytest.raises(PermissionError, match=r"x\.safetensors"):
            read(tmp_path / "x.safetensors")

"""A first contact with a GPU, tried on a CPU: every part to its end; parts that hang, crash or are cut off leave what
they have told.
"""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests/first_contact"

FAILING = """
import os, time

def hangs(at):
    for item in at.items(["first", "hangs", "last"]):
        if item == "hangs":
            time.sleep(600)
        at.tell(done=item)

def crashes(at):
    for item in at.items(["first", "crashes", "last"]):
        if item == "crashes":
            print("what it says last", flush=True)
            os.abort()
        at.tell(done=item)

def goes_on(at):
    while True:
        at.tell(done="something")
        time.sleep(0.05)

def fails(at):
    raise RuntimeError("nothing comes of it")

def works(at):
    at.tell(left=at.left)
"""


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """The runner, and a module of parts that other processes can import."""
    (tmp_path / "failing_parts.py").write_text(FAILING, "utf-8")
    for folder in (HERE, tmp_path):
        monkeypatch.syspath_prepend(folder)
    import runner

    yield runner
    for name in ("runner", "failing_parts"):
        sys.modules.pop(name, None)


def part(runner, name, seconds=30.0, item=2.0, least=0.1):
    import failing_parts

    return runner.Part(name, getattr(failing_parts, name), seconds, least=least, item=item)


def done(runner, out, name):
    return [row["done"] for row in runner.rows(out, name) if "done" in row]


def test_an_item_that_hangs_is_ended_and_the_next_one_runs(runner, tmp_path):
    row = runner.run_part(part(runner, "hangs"), tmp_path, "cpu", 60)
    assert done(runner, tmp_path, "hangs") == ["first", "last"]
    assert row["status"] == "died" and "hangs: hung" in row["note"] and row["seconds"] < 30


def test_an_item_that_crashes_is_told_and_the_next_one_runs(runner, tmp_path):
    row = runner.run_part(part(runner, "crashes"), tmp_path, "cpu", 60)
    assert done(runner, tmp_path, "crashes") == ["first", "last"]
    assert row["status"] == "died" and "crashes: died" in row["note"]
    assert "what it says last" in (tmp_path / "crashes.log").read_text("utf-8")


def test_a_part_that_is_cut_off_leaves_what_it_has_told(runner, tmp_path):
    row = runner.run_part(part(runner, "goes_on"), tmp_path, "cpu", 4)
    assert row["status"] == "cut" and 3 < row["seconds"] < 20 and done(runner, tmp_path, "goes_on")
    with runner.journal(tmp_path, "goes_on").open("a") as file:
        file.write('{"done": "half a li')
    assert set(done(runner, tmp_path, "goes_on")) == {"something"}


def test_parts_share_what_is_left(runner, tmp_path):
    parts = [
        part(runner, "fails", 40),
        part(runner, "goes_on", 2),
        part(runner, "works", 30),
        part(runner, "hangs", 1, least=90),
    ]
    said = []
    told = runner.run_all(parts, tmp_path, "cpu", 30, said.append)
    assert [row["status"] for row in told] == ["died", "cut", "ok", "skipped"]
    assert "nothing comes of it" in told[0]["note"] and "were left for it" in told[3]["note"]
    assert json.loads((tmp_path / "parts.json").read_text("utf-8")) == told
    (left,) = (row["left"] for row in runner.rows(tmp_path, "works"))
    assert 2 < left < 30 and any("works: ok" in line for line in said)


def test_of_a_small_budget_the_first_parts_get_enough(runner, tmp_path):
    parts = [part(runner, "works", 1, least=6), part(runner, "goes_on", 9, least=4), part(runner, "hangs", 90, least=9)]
    told = runner.run_all(parts, tmp_path, "cpu", 12, lambda _: None)
    assert [row["status"] for row in told][::2] == ["ok", "skipped"]
    (left,) = (row["left"] for row in runner.rows(tmp_path, "works"))
    assert left > 1


def test_a_run_that_was_cut_off_is_told(runner, tmp_path):
    import whole

    folder = tmp_path / "runs/train"
    (folder / "checkpoints").mkdir(parents=True)
    steps = [{"step": i, "tokens": 9 * i, "seconds": i, "tokens_per_second": 10 * i, "peak_memory_gib": 1, "loss": 3}
             for i in (1, 2, 3)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 4', "utf-8")
    whole.rescue(tmp_path)
    whole.rescue(tmp_path)
    (row,) = runner.rows(tmp_path, "train")
    assert row["cut"] and row["steps"] == 3 and row["tokens_per_second"] == 25 and not list(folder.glob("checkpoints"))
    sys.modules.pop("whole", None)


def test_graphs_are_held_against_eager(runner, tmp_path):
    import whole

    def told(way, losses, text):
        folder = tmp_path / f"runs/train-{way}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"loss": x}) + "\n" for x in losses), "utf-8")
        runner.Context("graphs", tmp_path, "cuda", 0.0).tell(item=f"decode {way}", text=text)

    assert whole.compared(tmp_path) == {"steps_compared": 0, "same_losses": None, "same_tokens": None}
    told("graph", [3.0, 2.0, 1.0], [5, 6])
    told("eager", [3.0, 2.0], [5, 6])
    assert whole.compared(tmp_path) == {"steps_compared": 2, "same_losses": True, "same_tokens": True}
    told("eager", [3.0, 2.5], [5, 7])
    assert whole.compared(tmp_path) == {"steps_compared": 2, "same_losses": False, "same_tokens": False}
    sys.modules.pop("whole", None)


def test_killed_it_leaves_what_was_done_and_no_process(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(HERE), "--cpu", "--only", "machine,micro", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 300
    while not (out / "micro.jsonl").is_file() and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()
    process.wait()
    told = json.loads((out / "parts.json").read_text("utf-8"))
    assert [(row["part"], row["status"]) for row in told] == [("machine", "ok"), ("micro", "cut")]
    time.sleep(5)
    begun = [line for line in (out / "micro.jsonl").read_text("utf-8").splitlines() if "begin" in line]
    time.sleep(5)
    assert [line for line in (out / "micro.jsonl").read_text("utf-8").splitlines() if "begin" in line] == begun
    assert len(begun) < 6, "of 12"


def test_interrupted_it_says_what_there_is(tmp_path):
    out = tmp_path / "out"
    code = "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    code += "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(HERE), "--cpu", "--only", "machine,micro", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 300
    while not list(out.glob("benchmarks/*.json")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted" in said and "micro attention" in said and str(out) in said


def contact(*options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(HERE), *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow("every part of a first contact runs, each in a process of its own")
def test_every_part_runs_to_its_end_on_a_cpu(tmp_path):
    began, out = time.time(), tmp_path / "out"
    ran = contact("--cpu", "--out", str(out), "--cache", str(tmp_path / "cache"))
    parts = {row["part"]: row for row in json.loads((out / "parts.json").read_text("utf-8"))}
    assert ran.returncode == 0, (parts, ran.stdout[-3000:], ran.stderr[-3000:])
    assert list(parts) == ["machine", "compile", "smoke", "tests", "micro", "train", "decode", "graphs", "profile"]
    assert {row["status"] for row in parts.values()} == {"ok"}
    told = {
        name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text("utf-8").splitlines()] for name in parts
    }
    assert told["machine"][0]["versions"].keys() >= {"torch", "triton", "transformers", "python"}
    assert [row["right"] for row in told["smoke"] if "item" in row] == [True, True]
    assert told["tests"][0]["passed"] > 50 and not told["tests"][0]["red"] and (out / "tests/tests.xml").is_file()
    assert not [row for row in told["micro"] if "error" in row]
    assert len(list((out / "benchmarks").glob("*.json"))) == sum("file" in row for row in told["micro"]) == 13
    assert told["train"][-1]["steps"] == 3 and told["train"][-1]["tokens_per_second"] > 0
    assert [row["batch"] for row in told["decode"] if "batch" in row] == [1, 8]
    assert told["profile"][0]["training"]["total"] > 0 and not list(out.rglob("checkpoints"))
    if "note" not in told["compile"][0]:
        assert told["compile"][-1]["compiled"] == told["compile"][-1]["new_entries"] > 0
        carried(tmp_path)
    filed(out, tmp_path / "root")
    assert "tests: " in (out / "log.txt").read_text("utf-8") and time.time() - began < 600


def carried(folder):
    """A cache holds in another checkout of the same sources."""
    for name in ("abyssal", "kernels", "model", "hf", "train", "configs", "tests/first_contact", "tests/support"):
        shutil.copytree(ROOT / name, folder / "elsewhere" / name, ignore=shutil.ignore_patterns("*.png", "__pycache__"))
    command = [sys.executable, str(folder / "elsewhere/tests/first_contact"), "--cpu", "--only", "compile"]
    command += ["--cache", str(folder / "cache"), "--out", str(folder / "again")]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    last = json.loads((folder / "again/compile.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["compiled"] > 0 and last["new_entries"] == 0


def filed(out, root):
    """The pages that are written from it."""
    for folder in ("kernels/benchmarks", "train/measure"):
        (root / folder).mkdir(parents=True)
    code = f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(ROOT)!r}]; import page; from pathlib import Path;"
    code += f"page.file(Path({str(out)!r}), Path({str(root)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    text = (root / "train/measure/FIRST_CONTACT.md").read_text("utf-8")
    assert "| train train | " in text and "against its definitions" in text and "torch 2." in text
    assert "(profile-nano-" in text and len(list((root / "train/measure").glob("profile-nano-*"))) == 2
    assert len(list((root / "kernels/benchmarks").glob("*.png"))) == 13
    assert {path.name for path in (root / "kernels/benchmarks").glob("*.json")} == {
        path.name for path in (out / "benchmarks").glob("*.json")
    }


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    ran = contact("--cpu", "--out", str(tmp_path))
    assert ran.returncode == 2 and "there is something in it" in ran.stdout
    ran = contact("--cpu", "--out", str(tmp_path / "mine"))
    assert ran.returncode == 2 and "File exists; another folder is allowed" in ran.stdout


def test_what_is_compiled_ahead_is_compiled_for_what_a_driver_names():
    pytest.importorskip("triton")
    import dryrun
    from triton.backends.nvidia.driver import CudaDriver

    for capability in ((8, 0), (9, 0), (10, 0)):
        card = SimpleNamespace(get_current_device=lambda: 0, get_device_capability=lambda _, found=capability: found)
        assert CudaDriver.get_current_target(card) == dryrun._target("sm_{}{}".format(*capability))


@pytest.mark.parametrize(
    ("part", "row"),
    [
        ("tests", {"red": [{"id": "a"}]}),
        ("tests", {"passed": 0}),
        ("smoke", {"right": False}),
        ("micro", {"error": "x"}),
        ("graphs", {"same_tokens": False}),
        ("benchmarks", {"contender": "triton", "status": "wrong"}),
        ("graphs", {}),
    ],
)
def test_what_is_wrong_is_an_exit_status(runner, tmp_path, part, row):
    """Even where every part came to its end."""
    fine = {"right": True, "red": [], "passed": 3, "same_losses": None, "contender": "eager", "status": "ok"}
    (tmp_path / "benchmarks").mkdir()
    if part == "benchmarks":
        (tmp_path / "benchmarks/op.json").write_text(json.dumps({"rows": [fine, fine | row]}), "utf-8")
    else:
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(fine | row) + "\n", "utf-8")
    found = runpy.run_path(str(HERE / "__main__.py"), run_name="first_contact")["wrong"](tmp_path)
    assert found == bool(row)


def test_a_red_test_is_the_exit_status_of_the_command(tmp_path):
    code = f"""
import runpy, sys
main = runpy.run_path({str(HERE / "__main__.py")!r}, run_name="first_contact")["main"]

def run_all(parts, out, *_):
    (out / "tests.jsonl").write_text('{{"report": "one red", "red": [{{"id": "it", "outcome": "failed"}}]}}')
    return [{{"status": "ok"}}]

main.__globals__["run_all"] = run_all
sys.argv = ["first_contact", "--cpu", "--out", {str(tmp_path / "out")!r}]
sys.exit(main())
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1 and "failed: it" in ran.stdout, ran.stderr


def test_unknown_parts_are_named():
    assert "allowed are machine, compile, smoke" in contact("--only", "everything").stderr

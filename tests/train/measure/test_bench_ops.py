"""Benchmarks of every op at tiny sizes: contenders agree with eager, wrong ones are found out, two commits."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import interp_shim
import pytest
import torch

from abyssal.train.cli import main
from abyssal.train.measure.bench import (
    OPS,
    attention,
    base,
    checks,
    clocks,
    cross_entropy,
    index_topk,
    measure,
    ours,
    peers,
    run,
)
from abyssal.train.measure.bench.task import Contender, Setting
from abyssal.train.measure.roofline import Peak

TINY = {
    "moe_experts": ("32x16x6x3", 40),
    "moe_route": ("32x16x6x3", 40),
    "attention": ("3x24x20x4x8x16", 133),
    "index_topk": ("4x16x8x4x2x24x16", 90),
    "index_loss": ("4x16x8x4x2x24x16", 90),
    "pool": ("16x4x32", 133),
    "norm_rope": ("3x16x6", 133),
    "exact_linear": ("24x5", 70),
    "hyper": ("24x3", 50),
    "engram": ("40x3x2x2x8x500", 150),
    "cross_entropy": ("24x100", 130),
    "newton_schulz": ("40x24", 3),
    "quant": ("256x64", 30),
}
CPU, GENERATOR = torch.device("cpu"), torch.Generator()
CANNOT = {
    "needs a CUDA device",
    "triton is not installed",
    "not installed",
    "is compiled for CUDA; without that it is the dense product",
}
CANNOT |= {"computes in bfloat16 only", "that commit has no such op"}


def tasks(op, dtype=torch.float32, data=None, **changes):
    module = run.load(op)
    shape, tokens = TINY[op]
    setting = Setting(run._shape(module, shape), tokens, dtype, CPU, data or next(iter(module.data)))
    return module.tasks(replace(setting, **changes))


def rows_of(task, dtype=torch.float32, repeats=1):
    return {row["contender"]: row for row in measure.measure(task, dtype, repeats, lambda text: None)}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(measure, "measured_peak", lambda *arguments: Peak(1e11, 1e10, "invented"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op, data", [(op, data) for op in OPS for data in run.load(op).data])
def test_every_contender_agrees_with_eager(op, data, dtype):
    found = tasks(op, dtype, data)
    assert found
    for task in found:
        for row in rows_of(task, dtype).values():
            left_out = row["note"] in CANNOT or "has no Triton kernel" in row["note"]
            assert row["status"] == "ok" or (row["status"] == "not run" and left_out), (task.name, row)
            assert row["contender"] != "eager" or row["status"] == "ok"


def test_every_op_has_a_size_here_and_tests_that_exist():
    assert TINY.keys() == OPS.keys()
    folder = Path(__file__).parents[2] / "kernels"
    assert not [op for op in OPS if not (folder / f"test_{op}.py").is_file()]


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_is_the_same_op():
    """Uncompiled, and its forward pass: on a CPU it has no other."""
    for task, kind in zip(tasks("attention"), ((0, None), (4, 8), (16, None)), strict=True):
        run = attention.flex(attention.roofline.Attention(133, 3, 24, 20, *kind), compiled=False)
        got, want = (run(*task.inputs.values())[0] for run in (run, task.contenders[0].run))
        torch.testing.assert_close(got, want)


def test_picks_are_seen_and_distinct():
    for data in attention.OP.data:
        g = torch.Generator().manual_seed(0)
        picks = attention.picked_entries(57, 4, 6, data, g)[0]
        for t, row in enumerate(picks.tolist()):
            chosen = [x for x in row if x >= 0]
            assert chosen == sorted(set(chosen)) and len(chosen) == min(6, (t + 1) // 4)
            assert all(x < (t + 1) // 4 for x in chosen)
            assert data != "recency" or chosen == list(range((t + 1) // 4))[-6:]


# what must be found out ----------------------------------------------------------------------------------------------


def without_sink(q, kv, sink, compressed=None, index=None):
    mask = attention.visible(SIZES, index, q.device)
    keys = kv if compressed is None else torch.cat([kv, compressed], 1)
    scores = (torch.einsum("bthd,bld->bhtl", q, keys) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return (torch.einsum("bhtl,bld->bthd", scores.softmax(-1), keys) + 0 * sink.sum(),)


SIZES = attention.roofline.Attention(133, 3, 24, 20)


def test_attention_without_its_sink_is_wrong():
    task = tasks("attention")[0]
    row = rows_of(replace(task, contenders=[task.contenders[0], Contender("it", without_sink)]))["it"]
    assert row["status"] == "wrong" and "milliseconds" not in row


def changed(picks, change):
    picks = picks.clone()
    change(picks)
    return picks


@pytest.mark.parametrize(
    "name, change",
    [
        ("the first instead of the best", lambda x: x[:, -20:].copy_(torch.arange(8).expand(1, 20, 8))),
        ("one twice", lambda x: x[:, -20:, 0].copy_(x[:, -20:, 1])),
        ("one of the future", lambda x: x[:, :40, 0].fill_(20)),
        ("none", lambda x: x[:, -20:, 0].fill_(-1)),
    ],
)
def test_other_picks_than_the_best_are_wrong(name, change):
    task = tasks("index_topk")[0]
    reference = task.contenders[0].run
    it = Contender(name, lambda *inputs: (changed(reference(*inputs)[0], change),))
    assert rows_of(replace(task, contenders=[task.contenders[0], it]))[name]["status"] == "wrong"


def test_picks_in_any_order_and_among_equals_are_right():
    task = tasks("index_topk")[0]
    q, weights, keys = task.inputs.values()
    keys = keys[:, :1].expand_as(keys).contiguous()  # all scores of a query are equal
    sizes = index_topk.roofline.Indexer(90, 4, 16, 4, 8, 4)
    judge = {"picks": lambda x: index_topk.scores_of_picks(sizes, q, weights, keys, x)}
    last = Contender("last", lambda *inputs: (attention.picked_entries(90, 4, 8, "recency", GENERATOR).flip(-1),))
    task = replace(task, inputs={"q": q, "weights": weights, "keys": keys}, picks=judge)
    assert rows_of(replace(task, contenders=[task.contenders[0], last]))["last"]["status"] == "ok"


def test_the_selection_that_triton_is_timed_at(monkeypatch):
    pytest.importorskip("triton")
    interp_shim.install()
    task = tasks("index_topk")[1]
    assert task.name == "top-k alone" and task.contenders[1].name == "triton"
    got, want = (contender.run(*task.inputs.values())[0] for contender in task.contenders[1::-1])
    assert torch.equal(got, want)


def test_codes_have_to_be_equal():
    task = tasks("quant")[0]
    reference = task.contenders[0].run

    def one_off(x):
        codes, scales = (y.clone() for y in reference(x))
        codes.view(torch.uint8)[3, 5] ^= 1
        return codes, scales

    row = rows_of(replace(task, contenders=[task.contenders[0], Contender("it", one_off)]))["it"]
    assert row["status"] == "wrong" and "codes is off by" in row["note"]


def test_a_loss_over_ignored_targets_is_wrong():
    task = tasks("cross_entropy")[0]

    def counted(x, weight, targets):
        return cross_entropy.whole_logits(x, weight, targets.clamp_min(0))

    assert rows_of(replace(task, contenders=[task.contenders[0], Contender("it", counted)]))["it"]["status"] == "wrong"


# the house -----------------------------------------------------------------------------------------------------------


def test_where_nothing_is_learned_the_forward_pass_alone_is_measured(quick, tmp_path, capsys):
    path = run.run("newton_schulz", shape="24x16", tokens="3", repeats=1, device="cpu", out=tmp_path, tests=False)
    rows = json.loads(path.read_text("utf-8"))["rows"]
    assert {tuple(row["stages"]) for row in rows} == {("forward",)}
    assert all(row["milliseconds"].keys() == {"forward"} for row in rows if row["status"] == "ok")
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "forward + backward" not in capsys.readouterr().out


def test_all_ops_into_one_folder(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "OPS", {"hyper": "mHC", "cross_entropy": "the loss"})
    monkeypatch.setattr(run, "check", red_for("hyper"))
    assert main(["bench", "all", "--tokens", "16", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.glob("*.json")] == ["cross_entropy-cpu.json"]
    told = capsys.readouterr()
    assert "hyper is red" in told.out and "not timed, as their tests are red: hyper" in told.err


def red_for(op):
    def check(name, device):
        if name == op:
            raise checks.RedTests(f"{name} is red")
        return "3 passed"

    return check


def test_tests_run_first_and_red_ones_stop_the_clock(tmp_path, monkeypatch):
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (folder / "test_good.py").write_text("def test_it(): pass\ndef test_triton(): pass\n", "utf-8")
    (folder / "test_bad.py").write_text("def test_it(): assert 1 == 2\n", "utf-8")
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    assert checks.check("good", "cpu").startswith("1 passed in ")  # in an interpreter Triton would take minutes
    assert "2 passed" in checks.check("good", "cuda")
    with pytest.raises(checks.RedTests, match=r"bad is not timed, its tests are red: .*test_bad\.py::test_it"):
        checks.check("bad", "cpu")
    with pytest.raises(checks.RedTests, match="absent is not timed"):
        checks.check("absent", "cuda")
    monkeypatch.setattr(checks, "ROOT", tmp_path / "elsewhere")
    assert checks.check("bad", "cpu") == "not run: this installation has no tests"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout of the present kernels, in whose first commit the recombination is twice as large."""
    import shutil

    root = tmp_path / "checkout"
    shutil.copytree(base.ROOT / "kernels", root / "kernels", ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    git += ["-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null"]
    engine = root / "kernels/hyper/eager.py"
    now = engine.read_text("utf-8")
    started = now.index("def hyper_recombine")
    body = now[started:].replace(
        "    n, d = streams.shape[-2:]\n", "    n, d = streams.shape[-2:]\n    post = 2 * post\n", 1
    )
    subprocess.run([*git, "init", "-q"], check=True)
    for text in (now[:started] + body, now):
        engine.write_text(text, "utf-8")
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "kernels"], check=True)
    monkeypatch.setattr(base, "ROOT", root)
    return root


def test_two_commits_are_compared_in_one_run(checkout, quick, tmp_path, capsys):
    shape = {"shape": "24x3", "tokens": "50", "repeats": 2, "device": "cpu", "out": tmp_path, "tests": False}
    found = json.loads(run.run("hyper", base="HEAD", **shape).read_text("utf-8"))
    rows = {row["contender"]: row for row in found["rows"]}
    assert len(found["base"]) == 40 and rows["base eager"]["status"] == "ok"
    ratio = rows["eager"]["times_as_fast_as_base"]
    ms = [rows[name]["milliseconds"]["forward"]["median"] for name in ("base eager", "eager")]
    assert ratio.keys() == set(measure.STAGES) and ratio["forward"] == pytest.approx(ms[0] / ms[1])
    text = capsys.readouterr().out
    assert f"base: commit {found['base'][:8]}" in text and "eager, times as fast as the base: forward" in text
    found = json.loads(run.run("hyper", base="HEAD~1", **shape).read_text("utf-8"))
    rows = {row["contender"]: row for row in found["rows"]}
    assert rows["base eager"]["status"] == "wrong" and "times_as_fast_as_base" not in rows["eager"]


def test_a_commit_without_the_op_is_said(checkout):
    with base.kernels_at("HEAD") as (package, _):
        assert [c.why_not for c in ours.ours(setting_with(package), lambda kernels, backend: None, "no_op")] == [
            "that commit has no no_op"
        ] * 2


def setting_with(package):
    return Setting(None, 1, torch.float32, CPU, "", base=package)


def test_the_other_commits_operators_have_a_namespace_of_their_own(checkout):
    with base.kernels_at("HEAD") as (package, _):
        path = Path(package.__file__).parent / "moe_route/triton/__init__.py"
        name = package.__name__.partition(".")[0]
        assert f'"{name}::moe_route"' in path.read_text("utf-8") and "abyssal::" not in path.read_text("utf-8")
    assert not path.exists()


def test_a_base_needs_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "ROOT", tmp_path)
    with (
        pytest.raises(ValueError, match="base 'HEAD': the package does not lie in a git checkout"),
        base.kernels_at("HEAD"),
    ):
        pass


def test_clocks_are_told_or_not(monkeypatch, tmp_path):
    monkeypatch.setattr(clocks, "GOVERNOR", tmp_path / "governor")
    assert "governor" not in clocks.clocks(CPU)
    clocks.GOVERNOR.write_text("powersave\n", "utf-8")
    assert clocks.clocks(CPU)["governor"] == "powersave"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-cd"))
    answers = iter([SimpleNamespace(returncode=0, stdout="1 MHz, 2 MHz, 3 MHz, 4 W, 5 W, 6, P0\n"), OSError()])

    def nvidia_smi(command, **options):
        assert command[-1] == "--id=GPU-ab-cd"
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(clocks.subprocess, "run", nvidia_smi)
    assert clocks.clocks(torch.device("cuda"))["clocks.max.sm"] == "2 MHz"
    assert clocks.clocks(torch.device("cuda")) == {}


def test_libraries_that_are_not_installed_are_listed(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    contenders = [c for task in tasks("attention") for c in task.contenders if c.why_not == "not installed"]
    assert {c.name for c in contenders} == {"attn-gym", "transformers eager"}
    assert set(peers.versions().values()) == {"not installed"}

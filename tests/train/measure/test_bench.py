"""Benchmarks: contenders that agree are timed, others not; what the files hold; errors that name what is allowed."""

import importlib.util
import json
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import abyssal
from abyssal.train.cli import COMMANDS, main
from abyssal.train.measure.bench import OPS, measure, moe_experts, peers, report, run
from abyssal.train.measure.bench.draw import draw
from abyssal.train.measure.bench.task import Contender, Setting
from abyssal.train.measure.roofline import Peak

NO_TRITON = "needs a CUDA device" if importlib.util.find_spec("triton") else "triton is not installed"

PEAK = Peak(1e11, 1e10, "invented")
TINY = moe_experts.Shape(width=32, expert_width=16, experts=6, slots=3, tokens=(40,))


def tasks(dtype=torch.float32, data="uniform", tokens=40, shape=TINY):
    return moe_experts.tasks(Setting(shape, tokens, dtype, torch.device("cpu"), data))


def rows_of(task, dtype=torch.float32, repeats=1, **more):
    return {row["contender"]: row for row in measure.measure(task, dtype, repeats, lambda text: None, **more)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("data", moe_experts.OP.data)
def test_every_contender_agrees_with_eager(dtype, data):
    for task in tasks(dtype, data, tokens=333):
        rows = rows_of(task, dtype)
        assert rows["triton"]["status"] == "not run" and rows["triton"]["note"] == NO_TRITON
        ran = {name for name, row in rows.items() if row["status"] == "ok"}
        assert ran == rows.keys() - {"triton"}, [row["note"] for row in rows.values()]
    assert {"transformers eager", "transformers grouped_mm", "transformers batched_mm"} <= rows_of(tasks()[0]).keys()


def test_the_inputs_reach_the_clamp():
    given = tasks(tokens=500)[0].inputs
    h = torch.einsum("nd,nkfd->nkf", given["x"], given["w13"][given["experts"]])
    assert 0.001 < (h.abs() > moe_experts.LIMIT).float().mean() < 0.05


def without_clamp(x, experts, weights, w13, w2):
    g, u = torch.einsum("nd,nkfd->nkf", x, w13[experts]).chunk(2, -1)
    a = (F.silu(g) * u * weights.unsqueeze(-1)).to(x.dtype)
    return (torch.einsum("nkf,nkdf->nd", a, w2[experts]),)


def next_expert(x, experts, weights, w13, w2):
    return (moe_experts.grouped_mm(x, (experts + 1) % len(w13), weights, w13, w2),)


def unweighted_gradient(x, experts, weights, w13, w2):
    return (moe_experts.grouped_mm(x, experts, 0.98 * weights + 0.02 * weights.detach(), w13, w2) + 0 * weights.sum(),)


def not_a_number(*inputs):
    return (moe_experts.grouped_mm(*inputs) + torch.tensor([float("nan")] + [0.0] * 31, dtype=inputs[0].dtype),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run", [without_clamp, next_expert, not_a_number])
def test_a_wrong_contender_is_not_timed(run, dtype):
    task = tasks(dtype, tokens=300)[0]
    row = rows_of(replace(task, contenders=[task.contenders[0], Contender("it", run)]), dtype)["it"]
    assert row["status"] == "wrong" and "is off by" in row["note"]
    assert "milliseconds" not in row and "memory" not in row


def test_a_wrong_gradient_counts_too():
    task = tasks()[0]
    row = rows_of(replace(task, contenders=[task.contenders[0], Contender("it", unweighted_gradient)]))["it"]
    assert row["status"] == "wrong" and row["error"]["tensor"] == "dweights"


def test_a_wrong_pass_without_gradients_counts_too():
    task = tasks()[0]
    reference = task.contenders[0].run

    def other_kernel(*inputs):
        return reference(*inputs) if torch.is_grad_enabled() else next_expert(*inputs)

    row = rows_of(replace(task, contenders=[task.contenders[0], Contender("it", other_kernel)]))["it"]
    assert row["status"] == "wrong" and row["error"]["tensor"] == f"{task.outputs[0]} without gradients"


def test_what_fails_or_does_not_fit_is_said():
    def fails(*inputs):
        raise RuntimeError("no kernel for this\nand more lines")

    task = tasks()[0]
    others = [Contender("fails", fails), Contender("large", fails, scratch=2**60), Contender("absent", None, "no luck")]
    rows = rows_of(replace(task, contenders=[task.contenders[0], *others]))
    assert rows["fails"]["status"] == "failed"
    assert rows["fails"]["note"] == "RuntimeError: no kernel for this"
    assert rows["large"]["status"] == "not run" and "would need 1,073,741,824 GiB" in rows["large"]["note"]
    assert rows["absent"]["note"] == "no luck"


def test_without_memory_for_eager_nothing_is_timed(monkeypatch, tmp_path, capsys):
    def large(*arguments):
        raise torch.OutOfMemoryError("not enough")

    monkeypatch.setattr(measure, "measure", large)
    monkeypatch.setattr(measure, "measured_peak", lambda *arguments: Peak(1e11, 1e10, "invented"))
    run.run("moe_experts", shape="8x8x4x2", tokens="5", device="cpu", out=tmp_path, tests=False)
    found = json.loads((tmp_path / "moe_experts-8x8x4x2-cpu.json").read_text("utf-8"))["rows"]
    assert {row["note"] for row in found} == {"eager runs out of memory"}
    text = capsys.readouterr().out
    assert "triton                    not run: eager runs out of memory" in text
    assert "not drawn: nothing was measured" in text


def test_contenders_take_turns_until_their_time_is_up(monkeypatch):
    task, called = tasks()[0], []
    reference = task.contenders[0].run

    def named(name):
        def run(*inputs):
            called.append(name)
            return reference(*inputs)

        return run

    task = replace(task, contenders=[Contender(name, named(name)) for name in "abc"])
    rows = rows_of(task, repeats=3)
    assert "".join(called) == "a" + "aaabbbccc" + "aabbcc" + "bbccaa" + "ccaabb" + "abc"  # dout, check, turns, memory
    assert {row["turns"] for row in rows.values()} == {3}
    monkeypatch.setitem(measure.WARM_UP, "cpu", 3)
    called.clear()
    assert {row["turns"] for row in rows_of(task, repeats=3).values()} == {3}
    assert len(called) == 1 + 9 + 5 * 6 + 3
    assert {row["turns"] for row in rows_of(task, repeats=3, patience=0.0).values()} == {1}


def test_the_first_call_is_told_apart_and_costs_neither_time_nor_patience():
    task = tasks()[0]
    reference, seen = task.contenders[0].run, []

    def compiling(*inputs):
        if not seen:
            time.sleep(1.0)
        seen.append(None)
        return reference(*inputs)

    task = replace(task, contenders=[task.contenders[0], Contender("it", compiling)])
    row = rows_of(task, repeats=5, patience=0.9)["it"]
    assert row["turns"] == 5 and row["first_call"] > 1.0
    assert row["milliseconds"]["forward + backward"]["p80"] < 500
    text = report.table([row | {"shape": "s", "task": "t", "tokens": 1} | report.columns(task, row, PEAK, PEAK)])
    assert "first call, with what it compiles, s: it 1" in text


ABSENT = [f"transformers.models.deepseek_v4{inner}" for inner in ("", ".modeling_deepseek_v4")]


def broken(name):
    """A module whose import ends in an error of its own."""
    raise RuntimeError(f"{name} wants another version of something")


@pytest.mark.parametrize(
    "module, told", [(ABSENT, "ModuleNotFoundError"), (broken, "RuntimeError")], ids=["", "broken"]
)
@pytest.mark.parametrize("op", ["moe_experts", "hyper", "attention", "index_topk"])
def test_a_peer_that_cannot_be_imported_is_a_row(op, module, told, monkeypatch, tmp_path):
    """As in transformers before 5.23."""
    if callable(module):
        monkeypatch.setattr(peers, "importlib", SimpleNamespace(util=importlib.util, import_module=module))
    else:
        for name in module:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(measure, "measured_peak", lambda *arguments: PEAK)
    shape, tokens = {
        "moe_experts": ("32x16x6x3", "40"), "hyper": ("24x3", "50"), "attention": ("3x24x20x4x8x16", "33"),
        "index_topk": ("4x16x8x4x2x24x16", "90"),
    }[op]  # fmt: skip
    path = run.run(op, shape=shape, tokens=tokens, repeats=1, device="cpu", out=tmp_path, tests=False)
    found = json.loads(path.read_text("utf-8"))["rows"]
    rows = [row for row in found if row["contender"].startswith("transformers")]
    assert rows and {row["status"] for row in rows} == {"not run"}
    assert all("transformers 5" in row["note"] and told in row["note"] for row in rows), rows
    assert {row["status"] for row in found if row["contender"] == "eager"} == {"ok"}


def test_kept_memory_is_the_formula():
    task = tasks(tokens=200)[0]
    r = 200 * TINY.slots
    kept = {name: row["memory"]["kept"] for name, row in rows_of(task).items() if "memory" in row}
    assert task.kept == 4 * r * 2 * TINY.expert_width
    assert 0 <= kept["eager"] - task.kept <= 8 * (3 * r + TINY.experts)  # order, tokens, inverse, counts
    assert all(other > kept["eager"] for name, other in kept.items() if name != "eager")


def test_live_tensors_are_counted_until_they_end():
    x = torch.randn(256, requires_grad=True)
    with measure._LiveTensors([x]) as live:
        y = x.exp()  # kept for the backward pass
        z = y + 1
        assert live.bytes == 2048
        w = z.view(16, 16)
        del z
        assert live.bytes == 2048
        del w
        assert live.bytes == 1024
        x.detach().mul_(2)
        assert live.bytes == 1024 and live.peak == 2048


def test_what_is_cut_off_leaves_what_it_has_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "measured_peak", lambda *arguments: PEAK)
    turns = []

    def ends(task, *arguments):
        turns.append([c.name for c in task.contenders])
        if len(turns) == 2:
            raise KeyboardInterrupt
        return [{"contender": name, "status": "not run", "note": ""} for name in turns[0]]

    monkeypatch.setattr(measure, "measure", ends)
    given = {"shape": "32x16x6x3", "tokens": "8,40", "device": "cpu", "out": tmp_path, "tests": False, "others": False}
    with pytest.raises(KeyboardInterrupt):
        run.run("moe_experts", **given)
    found = json.loads((tmp_path / "moe_experts-32x16x6x3-cpu.json").read_text("utf-8"))
    assert [(row["tokens"], row["contender"]) for row in found["rows"]] == [(8, "eager"), (8, "triton")]
    assert turns == [["eager", "triton"]] * 2


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()) as progress:
        given = [
            "--shape",
            "32x16x6x3",
            "--tokens",
            "8,40",
            "--repeats",
            "2",
            "--device",
            "cpu",
            "--data",
            "zipf",
            "--no-tests",
        ]
        assert main(["bench", "moe_experts", *given, "--out", str(out)]) == 0
    (out / "printed").write_text(printed.getvalue(), "utf-8")
    (out / "progress").write_text(progress.getvalue(), "utf-8")
    return out / "moe_experts-32x16x6x3-cpu.json"


def test_the_json_holds_all_numbers_and_where_they_come_from(result):
    found = json.loads(result.read_text("utf-8"))
    assert (
        found["op"] == "moe_experts"
        and found["dtype"] == "float32"
        and found["data"] == "zipf"
        and found["repeats"] == 2
    )
    assert found["shapes"]["32x16x6x3"] == {
        "width": 32, "expert_width": 16, "experts": 6, "slots": 3, "tokens": [1024, 4096]
    }  # fmt: skip
    assert found["provenance"].keys() == {"time", "source", "versions", "machine", "clocks"}
    assert found["provenance"]["clocks"].keys() == {"before", "after"}
    assert found["tests"] == "not run: --no-tests" and found["base"] is None
    assert {"torch", "triton", "transformers", "python"} <= found["provenance"]["versions"].keys()
    assert found["provenance"]["machine"]["threads"] == torch.get_num_threads()
    assert found["peaks"]["datasheet"] is None and found["peaks"]["measured"]["flops"] > 1e8
    assert {(row["shape"], row["task"], row["tokens"]) for row in found["rows"]} == {
        ("32x16x6x3", "experts", n) for n in (8, 40)
    }
    for row in found["rows"]:
        assert {"contender", "status", "note", "stages", "kept_by_formula"} <= row.keys()
        assert row["stages"].keys() == set(measure.STAGES)
        if row["status"] == "ok":
            assert row["error"]["relative"] <= row["error"]["allowed"]
            assert 0 < row["memory"]["kept"] <= row["memory"]["peak"] and row["turns"] == 2
            for stage, times in row["milliseconds"].items():
                rates = row["stages"][stage]
                assert 0 < times["min"] <= times["p20"] <= times["median"] <= times["p80"]
                assert rates["teraflops"] == pytest.approx(rates["flops"] / times["median"] / 1e9)
                assert rates["share_of_limit"] == pytest.approx(rates["limit_ms"] / times["median"])
    experts = [row for row in found["rows"] if row["task"] == "experts" and row["tokens"] == 40]
    assert experts[0]["stages"]["forward + backward"]["flops"] == 18 * 40 * 3 * 32 * 16


def test_the_picture_is_drawn_from_the_json(result, tmp_path):
    assert result.with_suffix(".png").stat().st_size > 10_000
    picture = draw(result, tmp_path / "again.png")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("rate", [0, 1.2e-4, 0.00999, 0.0123, 0.123, 9.996, 99.99, 3352.4, 99_999])
def test_a_rate_fits_its_column(rate):
    value = report._value(rate)
    assert len(value) <= 6 and float(value.replace(",", "")) == pytest.approx(rate, rel=5e-3, abs=5e-5)


def test_the_table_says_what_ran(result):
    text = result.with_name("printed").read_text("utf-8")
    assert "32x16x6x3 experts  T=40   limit: forward" in text
    assert f"triton                    not run: {NO_TRITON}" in text
    assert text.count("\neager ") == 2
    assert max(map(len, text.splitlines()[5:-2])) <= 120
    assert "32x16x6x3 experts T=40 ..." in result.with_name("progress").read_text("utf-8")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--shape", "huge"], "shape 'huge': allowed are peer, wide, main, v4-flash, or WIDTHxEXPERT_WIDTHxEXPERTS"),
        (["--shape", "8x8x2x4"], "slots=4: a token goes to at most"),
        (["--dtype", "int8"], "dtype 'int8': allowed are bfloat16, float16, float32"),
        (["--device", "tpu"], "device 'tpu': allowed are cpu, cuda"),
        (["--tokens", "1k"], "tokens='1k'"),
        (["--data", "normal"], "data 'normal': allowed are uniform, zipf"),
        (["--repeats", "0"], "repeats=0: at least 1"),
        (["--base", "no-such-commit", "--no-tests"], "base 'no-such-commit': "),
    ],
)
def test_errors_name_what_is_allowed(options, message, capsys):
    assert main(["bench", "moe_experts", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("abyssal bench moe_experts: ") and message in error


def test_the_list_of_benchmarks(capsys):
    assert main(["bench", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"abyssal bench {op} " in text and f"bench {op}" in COMMANDS for op in OPS)
    assert all(f"--shape {name}" in text for op in OPS for name in run.load(op).shapes)
    assert all(f"--data {name}" in text for op in OPS for name in run.load(op).data)
    assert main(["bench", "sorting"]) == 2
    assert "op 'sorting': allowed are moe_experts" in capsys.readouterr().err


def test_the_page_holds_the_numbers_of_the_files():
    pytest.importorskip("triton")
    path = Path(abyssal.__file__).parents[1] / "tests/benchmark_page.py"
    spec = importlib.util.spec_from_file_location("benchmark_page", path)
    benchmark_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark_page)
    text = benchmark_page.PAGE.read_text("utf-8")
    assert benchmark_page.page(text) == text, "run python tests/benchmark_page.py"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_contenders_agree_on_a_gpu(dtype):
    shape = moe_experts.Shape(width=256, expert_width=128, experts=16, slots=4, tokens=(1000,))
    for task in moe_experts.tasks(Setting(shape, 1000, dtype, torch.device("cuda"), "zipf")):
        rows = rows_of(task, dtype)
        assert rows["triton"]["status"] == "ok", rows["triton"]
        assert "wrong" not in {row["status"] for row in rows.values()}, rows
        kept = rows["triton"]["memory"]["kept"]
        assert kept <= task.kept + 24 * 1000 * shape.slots + 10_000

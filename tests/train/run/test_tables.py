"""Training with the Engram tables out of the weights: the same bits wherever they live, whenever the run is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from patience import wait_for
from safetensors.torch import load_file
from torch import nn

import abyssal
from abyssal.model.tables import RowTable
from abyssal.train.optim import build_optimizer
from abyssal.train.recipe import load_recipe
from abyssal.train.run import checkpoint, metrics
from abyssal.train.run.load import load_trained
from abyssal.train.settings import OptimConfig
from abyssal.train.start import train

TABLE = "layers.1.engram.table.weight"
TOUCHED = ("optim.engram_rows='touched'", "optim.engram_lr_scale=20")
CLOCK = {"seconds", "tokens_per_second", "peak_memory_gib"}


def without_clock(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in metrics.read(folder)]


def assert_same_bits(a: Path, b: Path) -> None:
    for file in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        old, new = load_file(a / file), load_file(b / file)
        assert old.keys() == new.keys(), file
        for name, tensor in old.items():
            assert torch.equal(tensor, new[name]), f"{file}: {name}"


@pytest.fixture(scope="module")
def recipe(tiny):
    return lambda place, *more: tiny(*TOUCHED, f"train.engram_tables='{place}'", *more)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """Six steps with the table on the device, without any thread; evaluations after every second."""
    return train(recipe("resident"), tmp_path_factory.mktemp("whole") / "run", shown=False)


@pytest.mark.parametrize("place", ["host", "mapped"])
def test_the_same_bits_wherever_the_tables_live(whole, recipe, tmp_path, place, monkeypatch):
    shared, take_over, reads, read = [], RowTable.begin, [], RowTable._read

    def watch(table):
        last = table._last
        take_over(table)
        shared.append(0 if last is None else len(set(last.ids.tolist()) & set(table._held.ids.tolist())))

    monkeypatch.setattr(RowTable, "begin", watch)
    monkeypatch.setattr(RowTable, "_read", lambda *arguments: reads.append(0) or read(*arguments))
    run = train(recipe(place), tmp_path / "run", shown=False)
    assert without_clock(run.out) == without_clock(whole.out) and run.sample == whole.sample
    assert_same_bits(run.checkpoint, whole.checkpoint)
    assert len(shared) == 6 and min(shared[1:]) > 20, "steps in a row must share rows, or this shows nothing"
    assert len(reads) == 7, "each step's rows are read once"
    assert not list(run.out.glob("weight*"))


def test_the_same_bits_in_bfloat16(recipe, tmp_path):
    runs = [
        train(recipe(place, "train.dtype='bfloat16'", "train.steps=3"), tmp_path / place, shown=False)
        for place in ("resident", "host")
    ]
    assert without_clock(runs[0].out) == without_clock(runs[1].out)
    assert_same_bits(*(run.checkpoint for run in runs))


def test_only_touched_rows_have_moved(whole, tiny):
    tensors, start = (
        load_file(whole.checkpoint / "optimizer.safetensors"),
        load_file(whole.checkpoint / "model.safetensors"),
    )
    updates, moments = tensors[f"{TABLE}.updates"][:, 0], tensors[f"{TABLE}.exp_avg"]
    assert int(updates.max()) == 6 and (updates == 0).sum() > len(updates) / 2 and not moments[updates == 0].any()
    torch.manual_seed(tiny().train.seed)
    first = abyssal.model.Transformer(tiny().model).state_dict()[TABLE]
    moved = (start[TABLE] != first).any(1)
    assert not moved[updates == 0].any() and moved.sum() > 100


def test_the_first_step_is_that_of_the_dense_rule_but_for_the_update(whole, tiny, tmp_path):
    dense = train(tiny("train.steps=1", "train.eval_every=0"), tmp_path / "dense", shown=False)
    a, b = metrics.read(dense.out)[0], metrics.read(whole.out)[0]
    assert a["loss"] == b["loss"] and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(("first", "then"), [("host", "host"), ("mapped", "resident"), ("resident", "mapped")])
def test_resuming_in_the_same_place_or_another(whole, recipe, tmp_path, first, then):
    out = tmp_path / "run"
    train(recipe(first), out, stop_at=3, shown=False)
    resumed = train(recipe(then), out, resume=out, shown=False)
    assert without_clock(out) == without_clock(whole.out)
    assert_same_bits(resumed.checkpoint, whole.checkpoint)


def test_moments_are_saved_once_they_are_written(tmp_path, monkeypatch):
    write = RowTable._write
    monkeypatch.setattr(RowTable, "_write", lambda *arguments: time.sleep(0.2) or write(*arguments))
    model = nn.ModuleDict({"engram": RowTable(5, 2, "host")})
    optimizer = build_optimizer(nn.Sequential(model, nn.Linear(1, 1)), OptimConfig())
    table = model["engram"]
    table.prefetch(lambda: torch.tensor([1]))
    table.begin()
    table.rows.grad = torch.ones(1, 2)
    optimizer.step()
    table.end()
    assert checkpoint._optimizer_tensors(model, optimizer)["engram.weight.updates"].flatten().tolist() == [
        0,
        1,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("touched_first", [False, True])
def test_another_rule_cannot_go_on(tiny, tmp_path, touched_first):
    rules = ([], [*TOUCHED]) if not touched_first else ([*TOUCHED], [])
    train(tiny(*rules[0]), tmp_path / "run", stop_at=1, shown=False)
    rule = "touched" if touched_first else "all"
    with pytest.raises(ValueError, match=rf"table\.weight was trained with .*optim\.engram_rows='{rule}'"):
        train(tiny(*rules[1]), tmp_path / "run", resume=tmp_path / "run", shown=False)


def test_places_need_the_rule_that_reads_few_rows(tiny):
    for place in ("host", "mapped"):
        with pytest.raises(
            ValueError, match=rf"engram_tables='{place}': allowed with optim\.engram_rows='touched' only"
        ):
            tiny(f"train.engram_tables='{place}'")
    with pytest.raises(ValueError, match="allowed is resident, host or mapped"):
        tiny(*TOUCHED, "train.engram_tables='disk'")
    with pytest.raises(ValueError, match="allowed is all or touched"):
        tiny("optim.engram_rows='some'")
    assert load_recipe("toy").optim.engram_rows == "all"


def test_inference_reads_the_table_where_the_checkpoint_has_it(whole, recipe, tmp_path):
    mapped = train(recipe("mapped", "train.steps=2"), tmp_path / "run", shown=False)
    model, _ = load_trained(mapped.checkpoint, "cpu")
    plain, _ = load_trained(whole.checkpoint, "cpu")
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(40)[None]
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert model.layers[1].engram.table.place == "file" and not isinstance(plain.layers[1].engram.table, RowTable)


CHILD = """
import sys, time
from pathlib import Path
import torch
from abyssal.model.tables import RowTable
from abyssal.train.start import train
from abyssal.train.recipe import Recipe
import json

torch.set_num_threads(1)
folder, flag, stop = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
write, writes = RowTable._write, 0

def torn(table, held):
    global writes
    writes += 1
    if writes < stop:
        return write(table, held)
    half = len(held.ids) // 2
    for name, column in table.store.items():
        column.index_copy_(0, held.ids[:half], held.columns[name][:half])
        flag.touch()
        time.sleep(0.05)
    time.sleep(600)

RowTable._write = torn
recipe = Recipe.from_dict(json.loads(Path(sys.argv[4]).read_text()))
resume = folder if (folder / "checkpoints").exists() else None
train(recipe, folder, resume=resume, shown=False)
"""


@pytest.mark.slow("two children are killed, one after the other")
@pytest.mark.parametrize("place", ["mapped", "host"])
def test_killed_in_the_middle_of_writing_rows_back(whole, recipe, tmp_path, place):
    """Twice, with half of the rows written in some columns: the last checkpoint stands, and leads to the same end."""
    made = recipe(place, "train.checkpoint_every=1", "train.keep=2")
    (tmp_path / "recipe.json").write_text(json.dumps(made.to_dict()), "utf-8")
    out, root = tmp_path / "run", str(Path(abyssal.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    for number, writes in enumerate((3, 2)):
        flag = tmp_path / f"writing-{number}"
        arguments = [str(out), str(flag), str(writes), str(tmp_path / "recipe.json")]
        with (tmp_path / "errors").open("w", encoding="utf-8") as errors:
            child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], env=environment, stderr=errors)
        wait_for(flag.exists, child)
        time.sleep(0.02 * number)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert flag.exists(), (tmp_path / "errors").read_text("utf-8")
        assert checkpoint.find(out).name == f"step-00000{2 + number}"
    resumed = train(made, out, resume=out, shown=False)
    assert_same_bits(resumed.checkpoint, whole.checkpoint)
    assert without_clock(out) == without_clock(whole.out)
    assert not list(out.glob("weight*")) and not list(out.glob("exp_avg*"))

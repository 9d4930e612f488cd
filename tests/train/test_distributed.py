"""Several processes: two over gloo do what one does, to the order of sums; a run outlives its processes."""

import copy
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import process_jobs as jobs
import pytest
import torch
from patience import SECONDS, wait_for
from process_jobs import Job, together
from safetensors import safe_open
from torch.nn import functional as F

import abyssal
from abyssal.model import ModelConfig, Transformer, convert_pretrained, load_pretrained
from abyssal.model.kept import kept
from abyssal.train.distributed.world import World, check, own_device
from abyssal.train.recipe import Recipe
from abyssal.train.run import checkpoint, metrics
from abyssal.train.run.load import load_trained
from abyssal.train.start import train

CASES = {
    "experts": (torch.float32, None, (19, 5)),
    "experts, none here": (torch.float32, 3, (11, 4)),
    "experts, one token": (torch.float32, None, (1, 6)),
    "experts, bfloat16": (torch.bfloat16, None, (9, 9)),
}


PARTS = ("loss", "lm", "mtp", "balance", "index")
MODEL = ("model.num_hidden_layers=3", "model.compress_ratios=[0, 4, 16]")
BASE = (
    *("data.batch_size=4", "train.eval_every=0", "train.checkpoint_every=2", "train.observe_every=4"),
    *MODEL,
)
RECIPES = {
    "adamw": ("train.steps=4",),
    "muon": ("optim.rule='muon'", "train.steps=3", "train.recompute=2"),
    "stages": (
        *("optim.embedding_rule='balanced'", "optim.engram_rule='balanced'", "train.steps=3"),
        *("data.sequence_length=40",),
    ),
}
STAGES = [{"steps": 1, "attention": "warmup"}, {"steps": 2, "sequence_length": 48, "batch_size": 2}]


@pytest.fixture(scope="module")
def recipe_of(tiny, tmp_path_factory):
    """`recipe_of("adamw", "train.steps=3", ...)`: short documents, so that rows differ in what they count."""
    folder, draw = tmp_path_factory.mktemp("short"), random.Random(0)
    for i in range(80):
        (folder / f"{i}.txt").write_text(
            " ".join(draw.choices(["sum", "of", "the", "parts"], k=draw.randint(1, 12))), "utf-8"
        )

    def make(name: str, *overrides: str) -> Recipe:
        recipe = tiny(f"data.source='{folder}'", *BASE, *RECIPES[name], *overrides)
        return Recipe.from_dict({**recipe.to_dict(), "stages": STAGES}) if name == "stages" else recipe

    return make


@pytest.fixture(scope="module")
def alone(recipe_of, tmp_path_factory):
    """What one process makes of each recipe."""
    folder = tmp_path_factory.mktemp("alone")
    for name in RECIPES:
        train(recipe_of(name), folder / name, shown=False)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Where two processes leave their runs."""
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def done(recipe_of, alone, pair):
    """What two processes make of every job. With eight runs among them, the test that asks first waits for a minute."""
    names = ("dtype", "only", "tokens")
    work = [Job(name, jobs.expert_pass, dict(zip(names, case))) for name, case in CASES.items()]
    work += [Job(f"cast {n}", jobs.casts, {"expert_parallel": n, "before": False}) for n in (1, 2)]
    work += [Job("cast before", jobs.casts, {"expert_parallel": 1, "before": True})]
    work += [Job("sums", jobs.sums, {}), Job("odd share", jobs.odd_share, {}), Job("odd experts", jobs.odd_experts, {})]

    def run(name: str, recipe: str, *overrides: str, **options) -> Job:
        values = recipe_of(recipe, *overrides).to_dict()
        return Job(name, jobs.training, {"recipe": values, "out": pair / name, **options})

    work += [
        run("adamw", "adamw"),
        run("muon", "muon", "train.expert_parallel=2", "train.micro_batch=1"),
        run("stages", "stages"),
        run("resumed", "adamw", "train.expert_parallel=2", resume=pair / "adamw" / "checkpoints" / "step-000002"),
        run("taken over", "adamw", resume=alone / "adamw" / "checkpoints" / "step-000002"),
        run("spoiled", "adamw", "train.expert_parallel=2", prepare=jobs.spoiled),
        run("odd batch", "adamw", "data.batch_size=5"),
        run("touched", "adamw", "optim.engram_rows='touched'"),
    ]
    return together(work, pair / "jobs")


def assert_same_losses(found: Path, expected: Path, first: int = 1) -> None:
    """Of all steps from `first` on; what was before is the run that was resumed."""
    old, new = metrics.read(expected), metrics.read(found)
    assert [record["step"] for record in new] == [record["step"] for record in old]
    for a, b in zip(old, new):
        if a["step"] < first:
            continue
        for part in PARTS:
            assert b[part] == pytest.approx(a[part], rel=1e-5, abs=1e-6), f"step {a['step']}: {part}"
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4), f"step {a['step']}"
        assert b["tokens"] == a["tokens"]
        assert b.get("held_out") == pytest.approx(a.get("held_out"), rel=1e-5) if "held_out" in a else True


def assert_same_weights(found: Path, expected: Path) -> None:
    """But for the first layer's mHC: its streams are still equal, and its gradients not much more than rounding."""
    old, new = (load_trained(folder, device="cpu")[0].state_dict() for folder in (expected, found))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        if not name.startswith("layers.0.hc_"):
            error = (new[name] - tensor).double().norm() / tensor.double().norm().clamp_min(1e-3)
            assert error < 1e-3, f"{name}: {error}"


def expert_oracle(case: dict) -> dict[str, list[torch.Tensor]]:
    """Experts one pair at a time, in float64."""
    experts = copy.deepcopy(case["experts"]).double()
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("out", "dx", "dweights", "dshared")}
    for rank in range(2):
        x, weights, shared = (case[name][rank].double().requires_grad_() for name in ("x", "weights", "shared"))
        rows = []
        for token in range(len(x)):
            row = shared[token]
            for slot, expert in enumerate(case["chosen"][rank][token]):
                gate, up = (experts.w13[expert] @ x[token]).chunk(2)
                inner = F.silu(gate.clamp(max=case["limit"])) * up.clamp(-case["limit"], case["limit"])
                row = row + weights[token, slot] * (experts.w2[expert] @ inner)
            rows.append(row)
        out = torch.stack(rows)
        out.backward(case["dout"][rank].double())
        none = torch.zeros(())
        for name, value in (("out", out), ("dx", x.grad), ("dweights", weights.grad), ("dshared", shared.grad)):
            found[name].append(none if value is None else value.detach())
    return {**found, "dw13": [experts.w13.grad] * 2, "dw2": [experts.w2.grad] * 2}


@pytest.mark.parametrize("name", CASES)
def test_shared_out_experts_are_the_experts(done, name):
    expected = expert_oracle(jobs.expert_case(*CASES[name]))
    tolerance = 1e-5 if CASES[name][0] == torch.float32 else 3e-2
    for tensor, both in expected.items():
        for rank, value in enumerate(both):
            found = done[name][rank][tensor].double()
            error = (found - value).norm() / value.norm().clamp_min(1e-12) if found.numel() else torch.zeros(())
            assert error < tolerance, f"{tensor} of rank {rank}: {error}"


def test_a_world_adds_up_agrees_and_shares_out(done):
    for rank, found in enumerate(done["sums"]):
        assert found["norms"] == pytest.approx((found["expected"], 0.5, 0.5), rel=1e-5)
        assert found["rows"] == range(6 + 4 * rank, 10 + 4 * rank)
        assert found["total"] == [1, 2]
        assert found["agreed"] == "said by 0"
        assert found["first"] == (rank == 0)
        assert found["shape"] == (2, 2, (1, 2))


def test_what_does_not_divide_is_named(done):
    for rank in range(2):
        assert "5 rows of a step: allowed are multiples of 2" in str(done["odd share"][rank])
        assert "train.expert_parallel=3: allowed are divisors of 2" in str(done["odd experts"][rank])
        assert "parameters in bfloat16 and float32: allowed is one dtype" in str(done["cast before"][rank])


@pytest.mark.parametrize("experts", [1, 2])
def test_a_cast_of_parts_spares_what_is_kept(done, experts):
    names = kept(Transformer(ModelConfig.load("nano")))
    for found in done[f"cast {experts}"]:
        for name, dtypes in found.items():
            wanted = (torch.float32, torch.int64) if name in names else (torch.bfloat16,)
            assert dtypes[0] == dtypes[1] and dtypes[0] in wanted, name


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_are_one(done, alone, pair, name):
    assert_same_losses(pair / name, alone / name)
    assert_same_weights(pair / name, alone / name)
    assert done[name][0] == done[name][1] == pytest.approx(metrics.read(alone / name)[-1]["held_out"], rel=1e-5)


def test_the_processes_had_different_counts(recipe_of):
    """Else a mean of means would pass."""
    from abyssal.train.start import open_source

    batch = open_source(recipe_of("adamw")).batch(range(4), 48)
    counts = (batch.targets != -100).sum(1)
    assert counts[:2].sum() != counts[2:].sum()


def test_observations_are_those_of_one_process(done, alone, pair):
    for a, b in zip(metrics.read(alone / "adamw"), metrics.read(pair / "adamw")):
        for measured in ("grad_by", "update_by"):
            if measured in a:
                assert b[measured] == pytest.approx(a[measured], rel=2e-2)
        assert b["load_max"] == pytest.approx(a["load_max"], rel=0.1)


@pytest.mark.parametrize("name", ["resumed", "taken over"])
def test_a_checkpoint_goes_on_in_any_number_of_processes(done, alone, pair, name):
    assert_same_losses(pair / name, alone / "adamw")
    assert_same_weights(pair / name, alone / "adamw")


def test_one_process_goes_on_from_a_checkpoint_in_parts(done, recipe_of, alone, pair, tmp_path):
    saved = pair / "resumed" / "checkpoints" / "step-000004"
    assert len(list((saved / "model").iterdir())) == 2
    parts = [safe_open(path, "pt") for path in sorted((saved / "model").iterdir())]
    shape = [part.get_slice("layers.1.ffn.experts.w13").get_shape() for part in parts]
    assert shape == [[4, 128, 64], [4, 128, 64]]
    train(recipe_of("adamw"), tmp_path / "run", resume=pair / "adamw" / "checkpoints" / "step-000002", shown=False)
    assert_same_losses(tmp_path / "run", alone / "adamw")
    assert_same_weights(tmp_path / "run", alone / "adamw")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_of_two_processes_is_a_model(done, pair, tmp_path, name):
    whole, parts = load_trained(pair / name, device="cpu")[0], load_pretrained(pair / name)
    assert parts.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, parts.state_dict()[key]) for key, tensor in whole.state_dict().items())
    convert_pretrained(pair / name, tmp_path / "out", layout="official")
    again = load_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole.state_dict().items())
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint.find(pair / name), broken)
    sorted((broken / "model").glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match=r"n_routed_experts=8: the checkpoint has tensors for 4"):
        load_pretrained(broken)


def test_only_the_first_process_writes(done, pair):
    assert sorted(path.name for path in (pair / "adamw").iterdir()) == sorted(
        ["run.json", "metrics.jsonl", "checkpoints", "sample.txt"]
    )
    assert not list((pair / "adamw" / "checkpoints").glob(".writing*"))


def test_what_cannot_be_is_said_in_every_process(done):
    for rank in range(2):
        assert "layers.2.ffn.experts.w2 holds numbers that are not finite" in str(done["spoiled"][rank])
        assert "data.batch_size=5: allowed are multiples of 2" in str(done["odd batch"][rank])
        assert "optim.engram_rows='touched': allowed on one process" in str(done["touched"][rank])


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process to kill in Linux' /proc")
@pytest.mark.slow("two processes train until one is killed, then a run goes on")
def test_a_killed_process_ends_the_run_and_the_checkpoint_goes_on(recipe_of, alone, tmp_path):
    recipe, out = recipe_of("adamw", "train.checkpoint_every=1", "train.keep=100"), tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "abyssal.train"]
    values = recipe.to_dict()
    settings = [f"{table}.{k}={v!r}" for table in ("data", "optim", "train") for k, v in values[table].items()]
    settings = [text.replace("True", "true").replace("False", "false") for text in settings]
    settings += [*MODEL, "train.expert_parallel=2"]
    options = [part for text in settings for part in ("--set", text)]
    process = subprocess.Popen(
        [sys.executable, *torchrun, "train", "nano", "--out", str(out), *options],
        env={**os.environ, "PYTHONPATH": str(Path(abyssal.__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: checkpoint.checkpoints(out), process)
    first, second = (worker(process.pid, rank) for rank in range(2))
    os.kill(second, signal.SIGKILL)
    os.kill(first, signal.SIGTERM)  # as torchrun does at once, where the first has not yet found out by itself
    said, _ = process.communicate(timeout=SECONDS)  # less than the collective's own patience, however busy the machine
    assert process.returncode
    assert "abyssal train: another process of the run ended" in said and f"go on with --resume {out}" in said
    train(recipe, out, resume=out, shown=False)
    assert_same_losses(out, alone / "adamw")


def worker(parent: int, rank: int) -> int:
    """The process of that rank among torchrun's children."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            folder, own = status.parent, status.read_text("utf-8").rpartition(")")[2].split()
            told = (folder / "environ").read_text("utf-8").split("\0")
        except OSError:
            continue
        if int(own[1]) == parent and f"RANK={rank}" in told:
            return int(folder.name)
    raise AssertionError(f"torchrun has no child of rank {rank}")


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.batch_size=5", "data.batch_size=5: allowed are multiples of 2"),
        ("stability.lag=2", r"\[stability\]: allowed on one process"),
        ("schedule.batch_ramp_steps=3", "schedule.batch_start=1: allowed are multiples of 2"),
        ("data.batch_size=6", None),
    ],
)
def test_a_recipe_that_processes_cannot_share_is_refused(tiny, override, message):
    recipe = tiny("data.batch_size=4", override)
    check(recipe, World())
    if message is None:
        check(recipe, World(size=2))
    else:
        with pytest.raises(ValueError, match=message):
            check(recipe, World(size=2))


def test_a_stage_of_odd_batches_is_named(recipe_of):
    stages = [*STAGES, {"steps": 1, "batch_size": 3}]
    values = recipe_of("stages").to_dict()
    recipe = Recipe.from_dict({**values, "stages": stages, "train": {**values["train"], "steps": 4}})
    with pytest.raises(ValueError, match=r"stages\.2\.batch_size=3: allowed are multiples of 2"):
        check(recipe, World(size=2))


def test_experts_in_parallel_need_processes(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"train\.expert_parallel=2: allowed are divisors of 1.*torchrun"):
        train(tiny("train.expert_parallel=2"), tmp_path / "run", shown=False)


@pytest.mark.parametrize(
    ("name", "size", "own"), [("cuda:1", 1, "cuda:1"), ("cuda", 2, "cuda:3"), ("cuda", 1, None), ("cpu", 2, None)]
)
def test_streams_and_events_are_of_the_device_of_the_run(name, size, own, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device(torch.device(name), size) == torch.device(own or name)
    assert current == ([torch.device(own)] if own else [])

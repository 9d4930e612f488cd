"""Steps as CUDA graphs, emulated on the CPU: the bits of steps made one by one, whatever differs between steps."""

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from tape import Tape, emulated

from abyssal.kernels.moe_experts import reference
from abyssal.model import Transformer, transformer
from abyssal.train.data.rows import IGNORED, PADDING, Batch
from abyssal.train.distributed.world import ALONE, World
from abyssal.train.optim import build_optimizer
from abyssal.train.recipe import load_recipe
from abyssal.train.run import graph, loop, metrics
from abyssal.train.run.graph import WARM_UP, GraphStepper
from abyssal.train.run.line import Lines
from abyssal.train.run.schedule import Phase, Schedule
from abyssal.train.run.step import Stepper
from abyssal.train.start import train

STEPS = 7
SMALL = (
    "model.num_hidden_layers=3",
    "model.compress_ratios=[0,4,16]",
    "model.hidden_size=32",
    "optim.rule='muon'",
    "optim.embedding_rule='balanced'",
    "optim.warmup_steps=4",
    f"train.steps={STEPS}",
    "schedule.bias_rest_share=0.25",
    "model.router_bias_update_speed=0.05",
)


@pytest.fixture(autouse=True)
def definitions(monkeypatch):
    """The eager engines read tensors on the host, and on a CPU the ops look at what they are given, if not compiled."""
    monkeypatch.setenv("ABYSSAL_BACKEND", "reference")
    monkeypatch.setattr(reference, "moe_experts", every_expert)
    monkeypatch.setattr(transformer, "cross_entropy", every_target)
    monkeypatch.setattr(torch.nn.functional, "one_hot", one_hot)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def every_expert(x, experts, weights, w13, w2, *, limit, shared):
    """Every expert on every token: the definition without looking for those that chose it."""
    out = shared
    for e in range(len(w13)):
        out = out + reference.swiglu(x @ w13[e].mT, limit, (weights * (experts == e)).sum(-1)) @ w2[e].mT
    return out


def every_target(x, weight, targets, *, ignore_index: int):
    """The mean over those that count, without looking for them."""
    counts = targets != ignore_index
    logits = (x @ weight.mT).log_softmax(-1)
    picked = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return -torch.where(counts, picked, 0).sum() / counts.sum().clamp(min=1)


def one_hot(ids, count: int):
    """On a CPU, torch's looks at the ids."""
    return (ids[..., None] == torch.arange(count)).long()


def batch(step: int, rows: int = 3, length: int = 32) -> Batch:
    """Two documents, with padding on the right, cut elsewhere in each row and step."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(250, (rows, length), generator=generator)
    place, cut = torch.arange(length), torch.randint(4, length - 4, (rows, 1), generator=generator)
    documents = torch.where(place < cut, 0, 1)
    documents[place.expand(rows, -1) >= length - torch.arange(rows)[:, None] * 3] = PADDING
    ends = documents != documents.roll(-1, 1)
    return Batch(ids, ids.roll(-1, 1).masked_fill(ends | (documents < 0), IGNORED), documents)


def stepper(recipe) -> Stepper:
    torch.manual_seed(0)
    model = Transformer(recipe.model)
    return Stepper(model, build_optimizer(model, recipe.optim), recipe, torch.device("cpu"))


def without_clock(folder) -> list[dict]:
    clock = {"seconds", "tokens_per_second", "peak_memory_gib"}
    return [{k: v for k, v in record.items() if k not in clock} for record in metrics.read(folder)]


def steps(made, recipe, count: int = STEPS) -> list[dict]:
    """What steps found, and the weights that they left."""
    schedule, found, inner = Schedule(recipe), [], getattr(made, "stepper", made)
    for step in range(count):
        phase = schedule.phase(step)
        done = made.gradients(phase, batch(step))
        numbers = {name: x.clone() for name, x in (done.losses | {"norm": done.norm} | done.metrics).items()}
        made.update(phase)
        found.append(numbers | {"tokens": done.tokens} | copy.deepcopy(inner.model.state_dict()))
    return found


def assert_same(found: list[dict], expected: list[dict]) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True), 1):
        assert a.keys() == b.keys()
        for name in a:
            same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
            assert same, f"{name} of step {number}"


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("nano", [*SMALL, "train.micro_batch=2"])


def test_graphs_have_the_bits_of_steps_one_by_one(recipe):
    expected = steps(stepper(recipe), recipe)
    with emulated():
        made = GraphStepper(stepper(recipe))
        found = steps(made, recipe)
    assert made.captured is not None and made.warm == WARM_UP
    assert_same(found, expected)
    phases = [Schedule(recipe).phase(step) for step in range(STEPS)]
    assert len({phase.bias_speed for phase in phases[WARM_UP:]}) == 2 < len({phase.lr for phase in phases[WARM_UP:]})


def test_a_number_that_the_host_decided_at_capture_is_noticed(recipe, monkeypatch):
    expected = steps(stepper(recipe), recipe)

    def baked(self: Stepper, phase: Phase) -> None:
        self.lr, self.speed = (torch.tensor(x, dtype=torch.float64) for x in (phase.lr, phase.bias_speed))

    monkeypatch.setattr(Stepper, "set_speeds", baked)
    with emulated(), pytest.raises(AssertionError, match=f"of step {WARM_UP + 1}"):
        assert_same(steps(GraphStepper(stepper(recipe)), recipe), expected)


def test_a_new_shape_is_captured_anew(recipe):
    schedule = Schedule(recipe)
    with emulated():
        made, seen = GraphStepper(stepper(recipe)), []
        for step, length in enumerate((32, 32, 32, 32, 16, 16, 16, 16)):
            phase = dataclasses.replace(schedule.phase(step), length=length)
            made.gradients(phase, batch(step, length=length))
            seen.append(made.captured)
            made.update(phase)
    assert [one is None for one in seen] == [True] * 3 + [False] + [True] * 3 + [False]
    assert seen[3] is not seen[7]


def test_a_run_leaves_the_same_files(tiny, tmp_path, monkeypatch):
    """Looks, evaluations and late lines between replays."""
    small = tiny(*SMALL[:3], "train.steps=8", "train.observe_every=6", "train.eval_every=5", "train.sample_tokens=0")
    plain = train(small, tmp_path / "plain", shown=False)
    monkeypatch.setattr(graph, "check", lambda *_: None)
    monkeypatch.setattr(loop, "Lines", lambda write, _: Lines(write, 3))
    asked = dataclasses.replace(small, train=dataclasses.replace(small.train, graph=True))
    replays, replay = [], Tape.replay
    monkeypatch.setattr(Tape, "replay", lambda self: replays.append(self) or replay(self))
    with emulated():
        graphed = train(asked, tmp_path / "graphed", shown=False)
    assert len(replays) == 2 * (8 - WARM_UP - 1) and len(set(map(id, replays))) == 2, "step 6 is looked at"
    assert without_clock(graphed.out) == without_clock(plain.out)
    a, b = (load_file(run.checkpoint / "optimizer.safetensors") for run in (plain, graphed))
    assert all(torch.equal(a[name], b[name]) for name in a)


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("change", "device", "world", "says"),
    [
        ([], torch.device("cpu"), ALONE, "device cpu"),
        ([], CUDA, World(size=2), "2 processes"),
        (["train.recompute=2"], CUDA, ALONE, "train.recompute=2"),
        (["stability.window=8"], CUDA, ALONE, r"\[stability\]"),
        (["optim.engram_rows=touched"], CUDA, ALONE, "optim.engram_rows='touched'"),
    ],
)
def test_what_cannot_be_captured_is_refused(change, device, world, says):
    graph.check(load_recipe("nano"), CUDA, ALONE)
    with pytest.raises(ValueError, match=rf"train\.graph=true with {says}: not allowed, as "):
        graph.check(load_recipe("nano", change), device, world)


def test_a_run_on_a_cpu_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"train\.graph=true with device cpu"):
        train(tiny("train.graph=true"), tmp_path / "run", shown=False)
    assert not (tmp_path / "run").exists()

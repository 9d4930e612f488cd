"""Profiles: nothing is lost or counted twice, what belongs to whom, and a model that is as it was afterwards."""

import json
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from abyssal.kernels.watch import is_watched
from abyssal.model import ModelConfig, Transformer
from abyssal.model.accounting import account
from abyssal.model.moe import hash_table
from abyssal.train.cli import main
from abyssal.train.measure.profile import limits, trace
from abyssal.train.measure.profile.clock import Clock, typical
from abyssal.train.measure.profile.draw import COLOURS, draw
from abyssal.train.measure.profile.mechanisms import ATTENTIONS, MECHANISMS, attached, owners
from abyssal.train.measure.profile.memory import Memory
from abyssal.train.measure.profile.observe import REST, Observer
from abyssal.train.measure.profile.preset import Preset, available_memory, check_fits, cut, load_preset
from abyssal.train.measure.profile.steps import DecodeStep, TrainingStep, cycle, to_decode
from abyssal.train.measure.roofline import Work
from abyssal.train.recipe import load_recipe
from abyssal.train.run.loop import Run
from abyssal.train.settings import StageConfig
from abyssal.train.start import open_source

CPU = torch.device("cpu")
IN_TRAINING = set(MECHANISMS)


@pytest.fixture(scope="module")
def given(tiny):
    recipe = tiny()
    return [f"data.source='{recipe.data.source}'", "data.sequence_length=48", "data.batch_size=2"]


@pytest.fixture(scope="module")
def step(given):
    return TrainingStep(load_preset("nano", CPU, overrides=given), CPU, Path())


def decode_step(preset, tokens):
    """Of new weights."""
    torch.manual_seed(0)
    return DecodeStep(preset, to_decode(Transformer(preset.recipe.model), getattr(torch, preset.dtype)), tokens)


def run_attached(step, observer):
    with attached(step.model, observer):
        step.run(observer)
    return observer


# steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["optim.decay_share=1", "schedule.mtp_final_share=0.1", "schedule.bias_rest_share=1", "train.micro_batch=1"],
        "warmup",
    ],
    ids=["plain", "weights", "warmup"],
)
def test_the_training_step_is_that_of_a_training(more, tiny, tmp_path):
    """Losses, gradients and weights, with what the step's phase says of them."""
    recipe = tiny("train.steps=1", *more if more != "warmup" else [])
    if more == "warmup":
        recipe = replace(recipe, stages=(StageConfig(steps=1, attention="warmup", sequence_length=40),))
    run = Run(recipe, open_source(recipe), tmp_path / "run", None, shown=False)
    ours = TrainingStep(Preset(recipe, "float32", 40, 1, reads_text=True), CPU, Path())
    clock = Clock(CPU)
    with learnt(run) as theirs, learnt(ours) as found, attached(ours.model, clock):
        line, losses = run.step(), ours.run(clock)
    run.close()
    assert {name: line.numbers[name] for name in losses} == losses and ours.phase == run.schedule.phase(0)
    assert found.keys() == theirs.keys() and all(torch.equal(found[name], theirs[name]) for name in theirs)
    assert all(".indexer." in name for name in theirs) == ours.phase.indexer_only
    for (name, a), b in zip(run.model.state_dict().items(), ours.model.state_dict().values()):
        assert torch.equal(a, b), name


@contextmanager
def learnt(step):
    """The gradients that a step's optimizer is given."""
    found, update = {}, step.optimizer.step

    def keeping():
        found.update({name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None})
        update()

    step.optimizer.step = keeping
    yield found


@pytest.mark.parametrize("place", ["resident", "mapped"])
def test_tables_that_are_kept_apart(place, given, tmp_path):
    apart = ["optim.engram_rows=touched", f"train.engram_tables={place}"]
    step = TrainingStep(load_preset("nano", CPU, overrides=[*given, *apart]), CPU, tmp_path)
    step.run(Observer())
    nodes = Nodes()
    run_attached(step, nodes)
    leaves = [mechanism for node, mechanism in nodes.found if hasattr(node, "variable")]
    assert REST not in leaves and leaves.count("Engram") == sum(
        owner == "Engram" for owner in owners(step.model).values()
    )
    engram = step.bytes_by_owner(owners(step.model))["Engram"]
    table = 4 * sum(len(t.weight) * t.weight.shape[1] for t in step.tables.tables)
    assert all(len(t.rows) == 0 for t in step.tables.tables)  # written back
    assert engram["parameters"] > table > engram["gradients"] and engram["optimizer"] > 2 * table


def test_a_released_configuration_trains_on_random_tokens(tmp_path):
    config = ModelConfig.load("nano").to_dict() | {"bos_token_id": 0, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    preset = load_preset(str(tmp_path / "config.json"), CPU, tokens=32)
    assert not preset.reads_text and preset.tokens == 32 and preset.dtype == "float32"
    losses = TrainingStep(preset, CPU, Path()).run(Observer())
    assert losses.keys() == {"loss", "lm", "mtp", "balance", "index"}


def test_decoding_is_the_same_with_and_without_instruments(given):
    preset = load_preset("nano", CPU, overrides=given, decode_length=40)
    written = []
    for watch in (nullcontext, attached):
        decoding, observer = decode_step(preset, 12), Observer()
        tokens = []
        for _ in range(12):
            with watch(decoding.model, observer, True) if watch is attached else watch():
                assert decoding.path == "numpy"
                decoding.run(observer)
            tokens.append(decoding.token.tolist())
        written.append(tokens)
    assert written[0] == written[1]


@pytest.mark.parametrize("more", [{"decode_batch": 2}, {"dtype": "bfloat16"}])
def test_several_sequences_and_other_dtypes_decode_by_modules(more, given):
    decoding = decode_step(load_preset("nano", CPU, overrides=given, decode_length=40, **more), 4)
    assert decoding.path == "torch"
    clock = Clock(CPU)
    with attached(decoding.model, clock):
        decoding.run(clock)
    without = {"index loss", "MTP", "optimizer"}
    assert {mechanism for _, mechanism in clock.times()} == IN_TRAINING - without


def test_a_cycle_holds_whole_windows_of_every_compressor():
    assert cycle(ModelConfig.load("toy")) == 32 and cycle(ModelConfig.load("v4-flash")) == 128


# who is at work ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nano", "toy", "small"])
def test_every_parameter_has_the_owner_that_the_account_names(name):
    config = ModelConfig.load(name)
    with torch.device("meta"):
        model = Transformer(config)
    found = dict.fromkeys(MECHANISMS, 0)
    for parameter, owner in owners(model).items():
        found[owner] += parameter.numel()
    counted = account(config)
    gate_bias = config.n_routed_experts * (config.num_hidden_layers - config.num_hash_layers)
    names = {
        "embedding": "embedding",
        "projections": "attention",
        "compressor": "compressor",
        "indexer": "indexer",
        "experts": "routed experts",
        "shared expert": "shared experts",
        "norms": "norms",
        "mHC": "hyper-connections",
        "loss and head": "head",
    }
    for mechanism, entry in names.items():
        assert found[mechanism] == counted.parameters[entry], mechanism
    assert found["router"] == counted.parameters["gates"] - gate_bias
    engram = counted.parameters.get("engram tables", 0) + counted.parameters.get("engram fusion", 0)
    assert found["Engram"] == engram and found[REST] == 0
    assert sum(found.values()) == counted.trainable


class Nodes(Observer):
    """Autograd's nodes and the mechanisms that they are taken for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def watch(self, node, mechanism):
        self.found.append((node, mechanism))


PLACES = (  # the first that a node's traceback shows is what made it
    ("in _mtp_loss", "MTP"),
    ("model/engram.py", "Engram"),
    ("model/indexer.py", "indexer"),
    ("kernels/cross_entropy/", "loss and head"),
    ("kernels/index_loss/", "index loss"),
    ("model/compressor.py", "compressor"),
    ("model/hyper.py", "mHC"),
    ("kernels/attention/", "attention"),
    ("model/attention.py", "projections"),
    ("return self.w2(swiglu(", "shared expert"),
    ("return moe_experts(", "experts"),
    ("model/moe.py", "router"),
    ("model/norm.py", "norms"),
    ("nn/modules/sparse.py", "embedding"),
)


def test_nodes_belong_to_what_made_them(step):
    """The traceback that autograd's anomaly mode keeps of every node is the oracle."""
    observer = Nodes()
    with torch.autograd.detect_anomaly(check_nan=False), attached(step.model, observer):
        step.run(observer)
    made = [(node, mechanism) for node, mechanism in observer.found if not hasattr(node, "variable")]
    assert len(made) > 500
    for node, mechanism in made:
        text = "".join(node.metadata["traceback_"])
        expected = next((name for place, name in PLACES if place in text), REST)
        assert mechanism in (ATTENTIONS.values() if expected == "attention" else (expected,)), (node, text)
    assert {mechanism for _, mechanism in observer.found} == IN_TRAINING - {"optimizer"}
    owner = owners(step.model)
    leaves = [(node.variable, mechanism) for node, mechanism in observer.found if hasattr(node, "variable")]
    assert len(leaves) == len(owner) and all(owner[parameter] == mechanism for parameter, mechanism in leaves)


def visits(clock, phase):
    """How often each mechanism's turn comes in a phase."""
    return Counter(what[1] for what, _ in clock.marks if what and what[0] == phase)


def test_what_is_worked_out_again_counts_for_its_mechanism(given):
    """In the backward pass, in which a whole group is run again for its first node."""
    kept, backward = [], []
    for layers in (0, 5):
        step = TrainingStep(load_preset("nano", CPU, overrides=[*given, f"train.recompute={layers}"]), CPU, Path())
        step.run(Observer())
        kept.append(sum(kept_of(step).kept.values()))
        clock = run_attached(step, Clock(CPU))
        assert len(clock.stack) == 1
        backward.append(visits(clock, "backward"))
    assert kept[1] < 0.5 * kept[0]
    plain, again = backward
    assert again.keys() == plain.keys()
    assert all(again[name] > plain[name] for name in ("indexer", "index loss", "experts", "router", "norms"))


def test_what_a_node_of_the_mtp_block_works_out_again_is_the_mtps():
    observer = Observer()
    observer.phase("backward")
    for node, expected in (("MTP", "MTP"), ("mHC", "experts"), (REST, "experts")):
        observer._runs(node, None)
        observer.enter("experts")
        assert observer.current == expected
        observer.leave()
        assert observer.current == node


@pytest.mark.parametrize("ratio, kind", [(0, "sliding attention"), (4, "CSA attention"), (16, "HCA attention")])
def test_attention_is_of_the_layers_kind(ratio, kind, given):
    one = ["model.num_hidden_layers=1", f"model.compress_ratios=[{ratio}]", "model.engram.layers=[0]"]
    preset = load_preset("nano", CPU, overrides=[*given, *one], decode_length=40)
    clock = run_attached(TrainingStep(preset, CPU, Path()), Clock(CPU))
    assert {name for _, name in clock.times()} & set(ATTENTIONS.values()) == {kind}
    decoding = decode_step(preset, 4)
    decoding.run(Observer())
    for in_numpy in (True, False):
        with attached(decoding.model, clock, in_numpy):
            decoding.run(clock)
        assert {name for _, name in clock.times()} & set(ATTENTIONS.values()) == {kind}


def test_everything_is_put_back(step):
    with pytest.raises(RuntimeError, match="on the way"), attached(step.model, Observer()):
        assert is_watched() and step.model.layers[0].attn._forward_hooks
        raise RuntimeError("on the way")
    assert not is_watched()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in step.model.modules())


def test_scopes_within_a_mechanism_are_its_own():
    observer = Observer()
    observer.phase("forward")
    observer.enter("projections")
    observer.enter("compressor")
    assert observer.current == "compressor"
    observer.leave()
    observer.enter("indexer")
    observer.enter("compressor")
    assert observer.current == "indexer"
    observer.leave()
    observer.leave()
    assert observer.current == "projections"
    observer.leave()
    assert observer.current == REST


# time ----------------------------------------------------------------------------------------------------------------


class Stopwatch(Clock):
    """A clock beside which the phases are timed once more."""

    def __init__(self):
        super().__init__(CPU)
        self.whole, self.began = 0.0, None

    def phase(self, name):
        super().phase(name)
        now = time.perf_counter()
        self.whole += 1e3 * (now - self.began) if self.began else 0
        self.began = now if name else None


def adding_up(run, share):
    """Times whose sum is the stopwatch's up to `share`, and that; between the two a busy machine may stop us."""
    for _ in range(9):
        clock = Stopwatch()
        run(clock)
        times = clock.times()
        if abs(sum(times.values()) - clock.whole) < share * clock.whole:
            return times, clock.whole
    raise AssertionError(f"parts {sum(times.values()):.2f} ms, whole {clock.whole:.2f} ms")


def test_parts_and_rest_are_the_step(step):
    times, whole = adding_up(lambda clock: run_attached(step, clock), 0.02)
    assert {mechanism for _, mechanism in times} == IN_TRAINING
    phases = {mechanism: {phase for phase, name in times if name == mechanism} for mechanism in MECHANISMS}
    assert phases.pop("optimizer") == {"optimizer"}
    assert all(found == {"forward", "backward"} for found in phases.values()), phases
    assert times["forward", REST] + times["backward", REST] < 0.2 * whole


def test_decode_parts_are_the_step(given):
    decoding = decode_step(load_preset("nano", CPU, overrides=given, decode_length=70), 10)
    decoding.run(Observer())

    def run(clock):
        with attached(decoding.model, clock, in_numpy=True):
            decoding.run(clock)
        assert visits(clock, "decode")["norms"] == 2 * decoding.model.config.num_hidden_layers + 1

    times, _ = adding_up(run, 0.05)
    assert {name for _, name in times} == IN_TRAINING - {"index loss", "MTP", "optimizer", "embedding"}


def test_instruments_cost_little(given):
    """In the best of a few turns; a machine that others use may need a second try."""
    step = TrainingStep(load_preset("nano", CPU, overrides=[*given, "data.sequence_length=256"]), CPU, Path())
    for _ in range(4):
        plain, parts = [], []
        for _ in range(4):
            clock = Clock(CPU)
            step.run(clock)
            plain.append(sum(clock.times().values()))
            parts.append(sum(run_attached(step, clock).times().values()))
        if min(parts) < 1.1 * min(plain):
            return
    raise AssertionError(f"{min(parts):.1f} ms against {min(plain):.1f} ms")


def test_typical_turns_add_up_and_are_the_faster_ones():
    runs = [{("forward", "a"): a, ("forward", "b"): b} for a, b in ((1, 1), (3, 1), (2, 2), (100, 0), (2, 4))]
    assert typical(runs) == {("forward", "a"): 2, ("forward", "b"): pytest.approx(4 / 3)}
    assert typical(runs[:1]) == runs[0]


# memory --------------------------------------------------------------------------------------------------------------


def kept_of(step):
    known = [*step.model.parameters(), *step.model.buffers(), *vars(step.batch).values()]
    known += [x for state in step.optimizer.state.values() for x in state.values()]
    memory = Memory(known)
    with attached(step.model, memory), memory.counting():
        step.run(memory)
    return memory


def test_kept_bytes_of_the_shared_expert_and_the_experts(step):
    step.run(Observer())
    c, n = step.recipe.model, step.preset.tokens
    layers, f = c.num_hidden_layers, c.moe_intermediate_size
    memory = kept_of(step)
    assert memory.kept["shared expert"] == layers * 4 * n * 3 * f  # pre-activations and activation
    slots = n * c.num_experts_per_tok
    experts = layers * (4 * slots * 2 * f + 8 * (2 * slots + slots))  # pre-activations; order, token, inverse
    assert experts <= memory.kept["experts"] <= experts + layers * (4 * n * c.hidden_size + 1000)
    assert memory.peak > sum(memory.kept.values()) and memory.peak_at[0] == "backward"


def test_nothing_that_lives_after_the_forward_pass_is_missed(step):
    """Against autograd's own list of saved tensors."""
    memory = Memory([*step.model.parameters(), *step.model.buffers(), *vars(step.batch).values()])
    sizes = {}
    with memory.counting(), attached(step.model, memory):
        memory.phase("forward")
        out = step.model(step.batch.ids, targets=step.batch.targets, documents=step.batch.documents)
        memory.phase(None)
    waiting, seen = [out.loss.grad_fn], {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [after for after, _ in node.next_functions]
            found = [getattr(node, name) for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
            for x in torch.utils._pytree.tree_leaves(found):
                if isinstance(x, torch.Tensor):
                    sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
    known = [*step.model.parameters(), *step.model.buffers(), *vars(step.batch).values()]
    for x in known:
        sizes.pop(x.untyped_storage()._cdata, None)
    saved, kept = sum(sizes.values()), sum(memory.kept.values())
    assert saved <= kept < 1.2 * saved


def test_a_storage_belongs_to_the_first_that_saves_it():
    x = torch.randn(64, requires_grad=True)
    memory = Memory([x])
    with memory.counting():
        memory.phase("forward")
        memory.enter("norms")
        y = x.detach() * 2
        y.requires_grad_()
        z = y + 1
        memory.leave()
        memory.enter("experts")
        w = z.exp()  # saves w
        u = z * y  # saves both
        memory.leave()
        memory.enter("router")
        v = z * z
        del w
        memory.leave()
        memory.phase(None)
    assert memory.kept == {"experts": 2 * 256 + 256, "router": 256}  # y and z; u; v
    assert memory.peak == 5 * 256 and memory.now == 4 * 256
    del u, v


def test_bytes_by_owner(step):
    step.run(Observer())
    found = step.bytes_by_owner(owners(step.model))
    assert sum(row["parameters"] for row in found.values()) == 4 * step.preset.parameters
    assert found["experts"]["optimizer"] == pytest.approx(2 * found["experts"]["parameters"], rel=1e-3)


# limits --------------------------------------------------------------------------------------------------------------


class Products(Observer):
    """FLOPs of the products that a step runs, by phase and mechanism."""

    def __init__(self, counter):
        super().__init__()
        self.counter, self.before, self.flops, self.last = counter, 0, {}, None

    def changed(self):
        if self.last:
            now = self.counter.get_total_flops()
            self.flops[self.last] = self.flops.get(self.last, 0) + now - self.before
        self.before, self.last = self.counter.get_total_flops(), (self.at, self.current)


def flops_of(works):
    return {key: sum(work.flops for work in found) for key, found in works.items()}


def test_products_are_those_of_the_model(step):
    counter = FlopCounterMode(display=False)
    observer = Products(counter)
    with counter:
        run_attached(step, observer)
    works = limits.training_limits(step.recipe.model, limits.document_lengths(step.batch.documents), 4)
    formula = flops_of(works)
    for mechanism in ("projections", "shared expert", "compressor", "router"):
        for phase in ("forward", "backward"):
            assert formula[phase, mechanism] == observer.flops[phase, mechanism], (phase, mechanism)
    assert formula["forward", "experts"] == observer.flops["forward", "experts"]
    assert formula["backward", "experts"] == 2 * observer.flops["backward", "experts"]  # `addmm_` is not counted
    assert formula["forward", "Engram"] == observer.flops["forward", "Engram"]


def test_bytes_by_hand():
    """128 wide, expert width 64, 16 experts, 2 slots, 5 layers, 260 tokens; 100 tokens of 2 bytes."""
    sizes = ("hidden_size=128", "hc_mult=4", "num_hidden_layers=5", "compress_ratios=[0, 4, 32, 4, 32]")
    config = load_recipe("toy", [f"model.{size}" for size in sizes]).model
    found = limits.training_limits(config, [60, 40], 2)
    forward, backward = (found[phase, "shared expert"] for phase in ("forward", "backward"))
    weights, row = 3 * 128 * 64, 100 * 128
    assert [work.bytes for work in forward] == 5 * [2 * (2 * row + weights)]
    assert [work.bytes for work in backward] == 5 * [2 * (3 * row + 2 * weights)]
    keys = found["backward", "indexer"][0]  # its queries, of a detached input: 64 wide, 4 heads of 32
    assert keys == Work(2 * 100 * 64 * 128, 2 * (100 * (64 + 128) + 64 * 128))
    assert [work.bytes for work in found["forward", "embedding"]] == [4 * row]
    assert [work.bytes for work in found["backward", "norms"]] == 11 * [6 * row]
    decoded = limits.decode_limits(config, 3, 1000, 4)
    assert [work.bytes for work in decoded["decode", "experts"]] == 5 * [4 * 6 * weights]
    assert [work.bytes for work in decoded["decode", "HCA attention"]] == 2 * [4 * 3 * ((32 + 31) * 32 + 2 * 128)]
    assert [work.bytes for work in decoded["decode", "CSA attention"]] == 2 * [4 * 3 * ((32 + 32) * 32 + 2 * 128)]
    assert len(limits.decode_limits(config, 9, 10, 4)["decode", "experts"]) == 5
    assert limits.decode_limits(config, 9, 10, 4)["decode", "experts"][0].bytes == 4 * 16 * weights


def test_every_mechanism_has_a_limit(step):
    works = limits.training_limits(step.recipe.model, [96], 4)
    named = {mechanism for _, mechanism in works}
    assert named == IN_TRAINING - {REST}
    assert works["optimizer", "optimizer"] == [Work(0, 32 * step.preset.parameters)]
    assert {phase for phase, mechanism in works if mechanism == "MTP"} == {"forward", "backward"}


def test_a_document_is_a_sequence_of_its_own():
    config = ModelConfig.load("toy")
    apart, whole = (flops_of(limits.training_limits(config, lengths, 4)) for lengths in ([256, 256], [512]))
    assert apart["forward", "projections"] == whole["forward", "projections"]
    assert apart["forward", "HCA attention"] < whole["forward", "HCA attention"]
    documents = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 0, 0, 0, 2, 2]])
    assert limits.document_lengths(documents) == [2, 3, 4, 2]


@pytest.mark.parametrize("name", ["toy", "small", "v4-flash", "v4-pro"])
@pytest.mark.parametrize("length", [1024, 100_000])
def test_a_decoded_tokens_flops_are_the_accounts(name, length):
    config = ModelConfig.load(name)
    total = sum(flops_of(limits.decode_limits(config, 1, length, 2)).values())
    streams = 4 * config.num_hidden_layers * config.hc_mult * config.hidden_size * (config.hc_mult + 2)
    assert total - streams == pytest.approx(account(config, length).flops.total, rel=0.01)
    several = limits.decode_limits(config, 4, length, 2)
    assert sum(flops_of(several).values()) == 4 * total
    moved = {key: sum(work.bytes for work in works) for key, works in several.items()}
    alone = limits.decode_limits(config, 1, length, 2)
    assert moved["decode", "shared expert"] == sum(work.bytes for work in alone["decode", "shared expert"])


# traces --------------------------------------------------------------------------------------------------------------


def annotation(name, begin, end, thread=1):
    return {"cat": "user_annotation", "name": name, "ts": begin, "dur": end - begin, "tid": thread}


def test_kernels_belong_to_the_innermost_range_of_their_launch():
    launched_at = {1: 12, 2: 22, 3: 31, 4: 41, 5: 5, 6: 62, 7: 75, 8: 95, 9: 60}
    events = [
        annotation("phase: forward", 10, 50),
        annotation("projections", 11, 40),
        annotation("compressor", 20, 30),
        annotation("phase: backward", 60, 90),
        annotation("experts", 61, 70, thread=2),
        *(
            {"cat": "cuda_runtime", "ts": ts, "tid": 2 if ts > 60 else 1, "args": {"correlation": i}}
            for i, ts in launched_at.items()
        ),
        *({"cat": "kernel", "ts": 1000, "dur": 1000 * i, "args": {"correlation": i}} for i in launched_at),
        {"cat": "cpu_op", "ts": 5, "dur": 1},
    ]
    assert trace.kernel_times(events) == {
        ("forward", "projections"): 1 + 3 + 4,  # before, after and past the last range
        ("forward", "compressor"): 2,
        ("backward", "experts"): 6 + 7,  # in the node, and between nodes
        ("backward", "rest"): 9,  # before the phase's first
    }


# the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile(given, tmp_path_factory):
    from contextlib import redirect_stdout
    from io import StringIO

    out = tmp_path_factory.mktemp("profile")
    options = ["--repeats", "1", "--decode-length", "40", "--device", "cpu", "--out", str(out)]
    with redirect_stdout(StringIO()) as printed:
        assert main(["profile", "nano", *options, *(word for text in given for word in ("--set", text))]) == 0
    (out / "printed").write_text(printed.getvalue(), "utf-8")
    return out


def test_the_json_holds_all_numbers(profile):
    found = json.loads((profile / "profile.json").read_text("utf-8"))
    assert found["provenance"].keys() == {"time", "source", "versions", "machine"}
    assert found["preset"]["name"] == "nano" and found["preset"]["data"]["sequence_length"] == 48
    training, decode = found["training"], found["decode"]
    assert training["mechanisms"].keys() == IN_TRAINING
    for step_found in (training, decode):
        rows = step_found["mechanisms"].values()
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert sum(row["ms"] for row in rows) == pytest.approx(step_found["parts_ms"]["total"])
        assert sum(ms for phase, ms in step_found["plain_ms"].items() if phase != "total") == pytest.approx(
            step_found["plain_ms"]["total"]
        )
        for row in rows:
            assert row["ms"] == pytest.approx(sum(phase["ms"] for phase in row["phases"].values()))
            assert row["limit_ms"] == pytest.approx(sum(phase["limit_ms"] for phase in row["phases"].values()))
    assert list(training["plain_ms"]) == ["forward", "backward", "optimizer", "total"]
    memory = training["memory"]
    for kind in ("parameters", "gradients", "optimizer", "kept"):
        assert memory[kind] == sum(row[kind] for row in training["mechanisms"].values()) > 0
    assert memory["peak"] > memory["parameters"] + memory["optimizer"] + memory["kept"]
    assert decode["path"].startswith("numpy") and decode["averaged_over_tokens"] == 16 and decode["length"] == 40


def test_the_table_has_a_line_for_each_mechanism(profile):
    text = (profile / "printed").read_text("utf-8")
    lines = text.splitlines()
    for mechanism in MECHANISMS:
        assert any(line.startswith(f"{mechanism} ") for line in lines), mechanism
    assert "training step: 2 x 48 tokens" in text and "decode step: 1 x 1 token behind 40, by numpy" in text
    assert text.count("not instrumented: ") == 2 and text.count("\nsum ") == 2
    assert max(map(len, lines[3:-4])) <= 120


def test_the_picture_is_drawn_from_the_json(profile, tmp_path):
    assert COLOURS.keys() == set(MECHANISMS) and (profile / "profile.png").stat().st_size > 20_000
    picture = draw(profile / "profile.json", tmp_path / "again.png")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_traces_hold_a_range_for_each_mechanism(profile):
    events = json.loads((profile / "trace.json").read_text("utf-8"))["traceEvents"]
    names = {e["name"] for e in events if e.get("cat") == "user_annotation"}
    assert names >= IN_TRAINING - {"optimizer", REST} | {"phase: forward", "phase: backward", "phase: optimizer"}
    events = json.loads((profile / "trace-decode.json").read_text("utf-8"))["traceEvents"]
    names = {e["name"] for e in events if e.get("cat") == "user_annotation"}
    assert names >= {"phase: decode", "indexer", "mHC", "experts", "loss and head"}


@pytest.mark.parametrize("place", ["resident", "mapped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_initialised_once_on_its_device(dtype, place, given, tmp_path, monkeypatch):
    """What has trained decodes, in its dtype; building it does not pass through another device."""
    built, make = [], Transformer.__init__

    def noted(self, config):
        make(self, config)
        built.append({p.device.type for p in self.parameters()} | {b.device.type for b in self.buffers()})

    def moved(self, *arguments, **options):
        raise AssertionError("a model was moved")

    monkeypatch.setattr(Transformer, "__init__", noted)
    monkeypatch.setattr(Transformer, "to", moved)
    apart = ["optim.engram_rows=touched", f"train.engram_tables={place}"]
    preset = load_preset("nano", CPU, overrides=[*given, *apart], decode_length=20, dtype=dtype)
    step = TrainingStep(preset, CPU, tmp_path)
    step.run(Observer())
    trained = step.model.head.weight.detach().clone()
    decoding = DecodeStep(preset, to_decode(step.model, getattr(torch, dtype)), 3)
    decoding.run(Observer())
    assert built == [{"cpu"}, {"meta"}]
    weights = decoding.model.state_dict()
    assert torch.equal(weights["head.weight"], trained.to(getattr(torch, dtype)))
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    fresh = Transformer(preset.recipe.model).state_dict()
    torch.set_default_dtype(before)
    assert {name: x.dtype for name, x in weights.items()} == {name: x.dtype for name, x in fresh.items()}


def test_a_table_of_experts_is_the_same_wherever_the_model_is_built():
    with torch.device("meta"):
        there = hash_table(300, 24, 4, seed=1)
    assert torch.equal(there, hash_table(300, 24, 4, seed=1))


# presets -------------------------------------------------------------------------------------------------------------


def test_a_released_configuration_is_cut_down_at_its_width():
    whole = ModelConfig.load("v4-flash")
    config = cut(whole, layers=4, experts=8)
    assert config.compress_ratios == (*whole.compress_ratios[:4], 0) and set(config.compress_ratios) == {0, 4, 128}
    assert (config.n_routed_experts, config.num_experts_per_tok) == (8, whole.num_experts_per_tok)
    assert (config.hidden_size, config.moe_intermediate_size) == (whole.hidden_size, whole.moe_intermediate_size)
    assert cut(whole, None, 2).num_experts_per_tok == 2
    assert cut(ModelConfig.load("toy"), 1, None).engram is None
    assert cut(ModelConfig.load("toy"), 2, None).engram.layers == (1,)


def test_what_does_not_fit_is_said_in_bytes():
    preset = load_preset("v4-flash", CPU)
    with pytest.raises(ValueError, match=r"at least 4,655,076,461,856 bytes \(4,335\.4 GiB") as error:
        check_fits(preset, CPU)
    assert "--layers and --experts" in str(error.value) and 16 * preset.parameters == 4_655_076_461_856
    check_fits(load_preset("nano", CPU), CPU)
    assert 2**28 < available_memory(CPU) < 2**50


@pytest.mark.parametrize(
    "options, message",
    [
        (["giant"], "'giant' is no configuration: shipped are"),
        (["nano", "--device", "meta"], "device='meta': allowed are cpu, cuda"),
        (["nano", "--dtype", "int8"], "dtype='int8': allowed are bfloat16, float16, float32"),
        (["nano", "--tokens", "0"], "tokens=0: allowed are integers from 1"),
        (["nano", "--layers", "9"], "layers=9: the configuration has num_hidden_layers=5"),
        (["nano", "--experts", "99"], "experts=99: the configuration has n_routed_experts=8"),
        (["nano", "--decode-length", "9000"], "decode_length=9000: nano allows max_position_embeddings=8192"),
        (["nano", "--repeats", "0"], "repeats=0: at least 1"),
        (["nano", "--set", "optim.rate=1"], "unknown key 'optim.rate': known are rule, lr,"),
    ],
)
def test_errors_name_what_is_allowed(options, message, capsys):
    assert main(["profile", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("abyssal profile: ") and message in error


@pytest.mark.gpu
def test_a_profile_on_a_gpu(given, tmp_path):
    options = ["--repeats", "2", "--decode-length", "40", "--device", "cuda", "--out", str(tmp_path)]
    assert main(["profile", "nano", *options, *(word for text in given for word in ("--set", text))]) == 0
    found = json.loads((tmp_path / "profile.json").read_text("utf-8"))
    for step_found in (found["training"], found["decode"]):
        rows = step_found["mechanisms"].values()
        kernels = sum(row["kernel_ms"] for row in rows)
        assert 0 < kernels < 1.5 * step_found["parts_ms"]["total"]
        assert sum(row["ms"] for row in rows) == pytest.approx(step_found["parts_ms"]["total"])
    assert found["decode"]["path"].startswith("torch") and found["training"]["memory"]["allocator"]["peak"] > 0

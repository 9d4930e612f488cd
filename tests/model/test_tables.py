"""Tables whose rows are held by the step: gradients as of a whole table, the same bits wherever the rows live."""

import random
import threading
import time

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from abyssal.model import ModelConfig, Transformer, generate, load_pretrained, save_pretrained
from abyssal.model.tables import RowTable, Table, row_tables

PLACES = ("resident", "host", "mapped")
ROWS, WIDTH = 40, 3


def draw_look_ups(steps, seed=0):
    """Few rows and many look-ups: neighbours overlap, rows repeat, some are looked up after a long time."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, ROWS, (2, 5, 2), generator=g) for _ in range(steps)]


def table(place, tmp_path):
    torch.manual_seed(0)
    return RowTable(ROWS, WIDTH, place, tmp_path)


def run(rows, look_ups, between=lambda step: None):
    """A step subtracts 2^-10 of the gradient and counts a row's steps; returns the outputs of all steps."""
    rows.add_column("seen", (1,), torch.int32)
    rows.prefetch(lambda: look_ups[0])
    outs = []
    for step, look_up in enumerate(look_ups):
        rows.begin()
        if step + 1 < len(look_ups):
            rows.prefetch(lambda step=step: look_ups[step + 1])
        out = rows(look_up)
        out.square().sum().backward()
        with torch.no_grad():
            rows.rows.sub_(rows.rows.grad, alpha=2**-10)
            rows.columns()["seen"].add_(1)
        between(step)
        rows.end()
        outs.append(out.detach())
    rows.wait()
    return outs


def oracle(weight, look_ups):
    """On a whole table, by autograd of indexing."""
    weight, seen, outs = weight.clone(), torch.zeros(ROWS, 1, dtype=torch.int32), []
    for look_up in look_ups:
        leaf = weight.clone().requires_grad_()
        out = F.embedding(look_up, leaf).flatten(2)
        out.square().sum().backward()
        touched = look_up.unique()
        weight[touched] -= 2**-10 * leaf.grad[touched]
        seen[touched] += 1
        outs.append(out.detach())
    return weight, seen, outs


@pytest.mark.parametrize("place", PLACES)
def test_steps_are_those_of_a_whole_table(place, tmp_path):
    look_ups, rows = draw_look_ups(12), table(place, tmp_path)
    weight, seen, want = oracle(rows.weight, look_ups)
    got = run(rows, look_ups)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert torch.equal(rows.weight, weight) and torch.equal(rows.store["seen"], seen)
    assert rows.rows.shape == (0, WIDTH) and rows.rows.grad is None


@pytest.mark.parametrize("place", ["host", "mapped"])
@pytest.mark.parametrize("slow", ["reading", "writing", "both", "steps"])
def test_the_order_of_events_changes_nothing(place, slow, tmp_path, monkeypatch):
    look_ups, pause = draw_look_ups(8, seed=1), random.Random(0)
    reference = table("resident", tmp_path)
    want = run(reference, look_ups)
    read, write = RowTable._read, RowTable._write

    def slowly(function, name):
        def call(*arguments):
            if slow in (name, "both"):
                time.sleep(pause.random() / 50)
            return function(*arguments)

        return call

    monkeypatch.setattr(RowTable, "_read", slowly(read, "reading"))
    monkeypatch.setattr(RowTable, "_write", slowly(write, "writing"))
    rows = table(place, tmp_path)
    got = run(rows, look_ups, lambda step: time.sleep(0.01 if slow == "steps" else 0))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert all(torch.equal(rows.store[name], column) for name, column in reference.store.items())


def test_rows_are_read_while_the_step_runs(tmp_path):
    rows, ran = table("host", tmp_path), threading.Event()

    def look_ups():
        assert ran.wait(10), "the step waits for the reading of the next one"
        return torch.tensor([1, 2])

    rows.prefetch(lambda: torch.tensor([2, 3]))
    rows.begin()
    rows.prefetch(look_ups)
    rows(torch.tensor([[[2, 3]]])).sum().backward()
    with torch.no_grad():
        rows.rows.fill_(7.0)
    rows.end()
    ran.set()
    rows.begin()
    assert (rows(torch.tensor([[[2]]])) == 7).all() and not (rows(torch.tensor([[[1]]])) == 7).any()


def test_what_the_background_raises_is_raised_here(tmp_path, monkeypatch):
    rows = table("host", tmp_path)
    rows.prefetch(lambda: torch.tensor([ROWS]))
    with pytest.raises(IndexError):
        rows.begin()
    rows.prefetch(lambda: torch.tensor([1]))
    rows.begin()
    monkeypatch.setattr(RowTable, "_write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    rows.end()
    with pytest.raises(OSError, match="disk full"):
        rows.wait()


@pytest.fixture
def being_written(tmp_path, monkeypatch):
    """A table whose last step has set rows 1 and 2 to 7, which takes a while to be written."""
    write = RowTable._write
    monkeypatch.setattr(RowTable, "_write", lambda *arguments: time.sleep(0.2) or write(*arguments))
    rows = table("host", tmp_path)
    rows.prefetch(lambda: torch.tensor([1, 2]))
    rows.begin()
    with torch.no_grad():
        rows.rows.fill_(7.0)
    rows.end()
    return rows


def test_outside_of_a_step_all_is_written(being_written):
    assert (being_written.eval()(torch.tensor([[[1, 2]]])) == 7).all()


def test_a_state_is_what_the_last_step_left(being_written):
    assert (being_written.state_dict()["weight"][1:3] == 7).all()


def test_a_state_that_is_loaded_stays(being_written):
    being_written.load_state_dict({"weight": torch.zeros(ROWS, WIDTH)})
    being_written.wait()
    assert not being_written.weight.any()


def test_a_failed_write_ends_the_next_step(tmp_path, monkeypatch):
    rows = table("host", tmp_path)
    monkeypatch.setattr(RowTable, "_write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    for step in range(2):
        rows.prefetch(lambda: torch.tensor([1]))
        rows.begin()
        if step == 0:
            rows.end()
    with pytest.raises(OSError, match="disk full"):
        rows.end()


def test_misuse_is_named(tmp_path):
    rows = table("host", tmp_path)
    with pytest.raises(RuntimeError, match="without prefetch"):
        rows.begin()
    with pytest.raises(RuntimeError, match="no step has begun"):
        rows.end()
    with pytest.raises(RuntimeError, match="outside of a step"):
        rows(torch.tensor([[[1]]]))
    rows.prefetch(lambda: torch.tensor([1, 5]))
    rows.begin()
    for unknown in (0, 3, 7):
        with pytest.raises(IndexError, match="not prefetched"):
            rows(torch.tensor([[[1, unknown]]]))
    with pytest.raises(ValueError, match=r"place='disk': allowed are resident, host, mapped, file"):
        RowTable(2, 2, "disk")
    with pytest.raises(RuntimeError, match="read only"):
        RowTable(2, 2, "file").prefetch(lambda: torch.tensor([1]))


def test_a_mapped_table_leaves_nothing_behind(tmp_path):
    rows = table("mapped", tmp_path)
    rows.add_column("moment", (WIDTH,), torch.float32)
    assert not list(tmp_path.iterdir()) and not rows.store["moment"].any()


def test_a_full_disk_is_noticed_at_the_start(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        table("mapped", tmp_path)


def test_a_step_compiles_without_a_graph_break(tmp_path):
    rows, look_ups = table("host", tmp_path), draw_look_ups(3)
    compiled = torch.compile(lambda at: rows(at).sin().sum(), fullgraph=True, backend="aot_eager")
    for look_up in look_ups:
        rows.prefetch(lambda look_up=look_up: look_up)
        rows.begin()
        (want,) = torch.autograd.grad(rows(look_up).sin().sum(), rows.rows)
        compiled(look_up).backward()
        assert torch.equal(rows.rows.grad, want)
        rows.end()


# in a model ----------------------------------------------------------------------------------------------------------

NAME = "layers.1.engram.table"


def build(place=None, folder=None):
    torch.manual_seed(0)
    if place is None:
        return Transformer(ModelConfig.load("nano"))
    with row_tables(place, folder):
        return Transformer(ModelConfig.load("nano"))


def hold(model, ids, documents=None):
    engram = model.layers[1].engram
    engram.table.prefetch(lambda: engram.look_ups(ids, documents, engram.canonical))
    engram.table.begin()
    return engram.table


def draw(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("place", PLACES)
def test_a_model_starts_with_the_same_weights(place, tmp_path):
    plain, model = build(), build(place, tmp_path)
    assert isinstance(plain.layers[1].engram.table, Table) and isinstance(model.layers[1].engram.table, RowTable)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, model.state_dict()[name]) for name, a in plain.state_dict().items())
    assert isinstance(build().layers[1].engram.table, Table), "the context ends"


@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_those_of_a_whole_table(packed, tmp_path):
    plain, model, ids, targets = build(), build("host"), draw(2, 70), draw(2, 70, seed=1)
    documents = (torch.arange(70) // 23).expand(2, -1).clone() if packed else None
    if packed:
        documents[:, 60:] = -1
    held = hold(model, ids, documents)
    for m in (plain, model):
        m(ids, targets=targets, documents=documents).loss.backward()
    whole = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        want = whole[f"{NAME}.weight"].grad[held._held.ids] if name == f"{NAME}.rows" else whole[name].grad
        assert torch.equal(parameter.grad, want), name
    assert held.rows.grad.shape[0] < 1000 < len(held.weight)
    norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (plain, model)]
    torch.testing.assert_close(*norms)
    assert torch.equal(held.rows.grad, whole[f"{NAME}.weight"].grad[held._held.ids]) or norms[0] != norms[1]


def test_micro_batches_add_up(tmp_path):
    model, ids, targets = build("host"), draw(4, 40), draw(4, 40, seed=1)
    held = hold(model, ids)
    model(ids, targets=targets).losses["lm"].backward()
    whole, held.rows.grad = held.rows.grad.clone(), None
    for part in (slice(0, 2), slice(2, 4)):
        (model(ids[part], targets=targets[part]).losses["lm"] / 2).backward()
    torch.testing.assert_close(held.rows.grad, whole, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_does_not_double_a_row(reentrant):
    rows, look_up = RowTable(ROWS, WIDTH), draw_look_ups(1)[0]
    rows.prefetch(lambda: look_up)
    rows.begin()
    scale = torch.ones((), requires_grad=True)
    (rows(look_up) * scale).sin().sum().backward()
    once, rows.rows.grad = rows.rows.grad.clone(), None
    checkpoint(lambda s: (rows(look_up) * s).sin().sum(), scale, use_reentrant=reentrant).backward()
    assert torch.equal(rows.rows.grad, once)


def test_a_gradient_scaler_sees_the_rows():
    rows, look_up = RowTable(ROWS, WIDTH), draw_look_ups(1)[0]
    rows.prefetch(lambda: look_up)
    rows.begin()
    optimizer, scaler = torch.optim.SGD([rows.rows], lr=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = rows.rows.detach().clone()
    scaler.scale(rows(look_up).square().sum()).backward()
    scaler.step(optimizer)
    counts = torch.bincount(look_up.flatten(), minlength=ROWS)[rows._held.ids]
    torch.testing.assert_close(rows.rows.detach(), before * (1 - 2 * counts[:, None]))


@pytest.mark.parametrize("place", [*PLACES, "file"])
def test_inference_is_that_of_a_whole_table(place, tmp_path):
    plain, model = build().eval(), build(place, tmp_path).eval()
    model.load_state_dict(plain.state_dict())
    ids = draw(2, 33)
    assert torch.equal(plain(ids).logits, model(ids).logits)
    texts = [list(generate(m, ids[:1], max_new_tokens=12, temperature=0.7, seed=1)) for m in (plain, model)]
    assert [int(t) for t in texts[0]] == [int(t) for t in texts[1]]


@torch.no_grad()
@pytest.mark.parametrize("place", [*PLACES, "file"])
def test_a_folder_is_loaded_and_saved_with_whole_tables(place, tmp_path):
    plain, model, ids = build().eval(), build(place, tmp_path), draw(1, 12)
    model.load_state_dict(plain.state_dict())
    with row_tables(place, tmp_path):
        save_pretrained(model, tmp_path / "x", "official")
        assert torch.equal(load_pretrained(tmp_path / "x").eval()(ids).logits, plain(ids).logits)


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    model = build("host")
    state = model.state_dict()
    state[f"{NAME}.weight"] = torch.zeros(3, 8)
    with pytest.raises(RuntimeError, match=r"table\.weight has shape \(3, 8\)"):
        model.load_state_dict(state)
    del state[f"{NAME}.weight"]
    with pytest.raises(RuntimeError, match=r"Missing.*table\.weight"):
        model.load_state_dict(state)


def test_loading_forgets_what_was_read_before():
    rows = RowTable(4, 2, "host")
    rows.prefetch(lambda: torch.tensor([1]))
    rows.load_state_dict({"weight": torch.full((4, 2), 5.0)})
    with pytest.raises(RuntimeError, match="without prefetch"):
        rows.begin()
    assert (rows.eval()(torch.tensor([[[1]]])) == 5).all()


def test_a_resident_store_moves_with_the_weights():
    rows = RowTable(4, 2)
    rows.add_column("updates", (1,), torch.int32)
    rows.double()
    assert rows.weight.dtype == rows.rows.dtype == torch.float64 and rows.store["updates"].dtype == torch.int32


@pytest.mark.gpu
def test_on_a_device_the_bits_are_the_same_wherever_the_rows_live(tmp_path):
    ends = [trained_on_a_device(place, tmp_path) for place in PLACES]
    assert all(torch.equal(a, b) for end in ends[1:] for a, b in zip(ends[0], end))


def trained_on_a_device(place, tmp_path):
    """Eight steps of a model; its table and its logits."""
    ids, targets = [draw(2, 300, seed=i) for i in range(9)], draw(2, 300, seed=9).cuda()
    model = build(place, tmp_path).cuda()
    engram = model.layers[1].engram
    held, canonical = engram.table, engram.canonical.cpu()
    held.prefetch(lambda: engram.look_ups(ids[0], None, canonical))
    for step in range(8):
        held.begin()
        held.prefetch(lambda step=step: engram.look_ups(ids[step + 1], None, canonical))
        model(ids[step].cuda(), targets=targets).loss.backward()
        with torch.no_grad():
            held.rows.sub_(held.rows.grad.sign(), alpha=1e-2)
        held.end()
        model.zero_grad()
    held.wait()
    assert (place == "resident") == held.weight.is_cuda and held.rows.is_cuda
    return held.weight.cpu(), model.eval()(ids[0].cuda()).logits.cpu()

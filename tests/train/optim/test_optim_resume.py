"""Resuming under Muon and V4.1's rule: to the same bits, and never under another rule."""

import pytest
import torch
from safetensors.torch import load_file

from abyssal.train.run import checkpoint
from abyssal.train.start import train

MUON = ("optim.rule=muon", "optim.head_wise=true")
BALANCED = ("optim.engram_rule=balanced", "optim.embedding_rule=balanced")
TOUCHED = ("optim.engram_rows=touched", "train.engram_tables=host")
SHORT = ("train.steps=4", "train.eval_every=0", "train.sample_tokens=0", "data.held_out_rows=1")
MAP, TABLE = "layers.2.attn.wq_b.weight", "layers.1.engram.table.weight"


def assert_same_bits(a, b) -> None:
    for file in ("model.safetensors", "optimizer.safetensors"):
        old, new = load_file(a / file), load_file(b / file)
        assert old.keys() == new.keys(), file
        for name, tensor in old.items():
            assert torch.equal(tensor, new[name]), f"{file}: {name}"


@pytest.mark.parametrize("rules", [MUON, (*MUON, *BALANCED, *TOUCHED), (*BALANCED, "train.dtype=bfloat16")])
def test_a_resumed_run_has_the_bits_of_one_that_went_through(tiny, tmp_path, rules):
    whole = train(tiny(*SHORT, *rules), tmp_path / "whole", shown=False)
    out = tmp_path / "parts"
    train(tiny(*SHORT, *rules), out, stop_at=2, shown=False)
    resumed = train(tiny(*SHORT, *rules), out, resume=out, shown=False)
    assert_same_bits(resumed.checkpoint, whole.checkpoint)
    kept: dict[str, set[str]] = {}
    for key in load_file(whole.checkpoint / "optimizer.safetensors"):
        name, _, moment = key.rpartition(".")
        kept.setdefault(name, set()).add(moment)
    adam, balanced = {"exp_avg", "exp_avg_sq", "step"}, BALANCED[0] in rules
    assert kept[MAP] == ({"momentum"} if MUON[0] in rules else adam) and kept["norm.weight"] == adam
    assert kept[TABLE] == kept["embed.weight"] == ({"exp_avg"} if balanced else adam)


CHANGES = [
    ((), MUON, r"(fn|weight|w13|w2) was trained with optim\.rule='adamw'"),
    (MUON, (), r"(fn|weight|w13|w2) was trained with optim\.rule='muon'"),
    ((), BALANCED[:1], r"table\.weight was trained with optim\.engram_rule='adam' and optim\.engram_rows='all'"),
    (BALANCED[:1], (), r"table\.weight was trained with optim\.engram_rule='balanced'"),
    (BALANCED[:1], TOUCHED, r"table\.weight was trained with optim\.engram_rule='balanced'"),
    (TOUCHED, (*TOUCHED, *BALANCED[:1]), r"optim\.engram_rule='adam' and optim\.engram_rows='touched'"),
    ((), BALANCED[1:], r"(embed|head)\.weight was trained with optim\.embedding_rule='adamw'"),
    (BALANCED[1:], (), r"(embed|head)\.weight was trained with optim\.embedding_rule='balanced'"),
]


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory):
    """A run of one step under each of the first rules."""
    folders = {}
    for first in {first for first, _, _ in CHANGES}:
        folders[first] = tmp_path_factory.mktemp("run") / "run"
        train(tiny(*SHORT, *first), folders[first], stop_at=1, shown=False)
    return folders


@pytest.mark.parametrize("first, then, said", CHANGES)
def test_another_rule_is_refused_before_anything_is_loaded(tiny, begun, monkeypatch, first, then, said):
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=said):
        train(tiny(*SHORT, *then), begun[first], resume=begun[first], shown=False)


def test_the_balanced_momentum_of_a_table_goes_on_wherever_the_table_lives(tiny, tmp_path):
    out = tmp_path / "run"
    train(tiny(*SHORT, *BALANCED), out, stop_at=2, shown=False)
    on = train(tiny(*SHORT, *BALANCED, *TOUCHED), out, resume=out, stop_at=3, shown=False)
    first, then = (load_file(folder / "optimizer.safetensors") for folder in checkpoint.checkpoints(out))
    key = f"{TABLE}.exp_avg"
    still = (first[key] == then[key]).all(1)
    assert first[key].any() and still.any() and not still.all(), "rows that the third step does not look up stand still"
    assert on.progress.step == 3


def test_a_tensor_of_no_parameter_is_named(tiny, tmp_path):
    from safetensors.torch import save_file

    out = train(tiny(*SHORT), tmp_path / "run", stop_at=1, shown=False).checkpoint
    tensors = load_file(out / "optimizer.safetensors")
    save_file({**tensors, "layers.9.gone.momentum": torch.ones(1)}, out / "optimizer.safetensors")
    with pytest.raises(ValueError, match=r"'layers\.9\.gone' of \['momentum'\] is no parameter of the model"):
        train(tiny(*SHORT), tmp_path / "run", resume=tmp_path / "run", shown=False)

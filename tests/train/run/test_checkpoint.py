"""Checkpoints: nothing but safetensors and JSON, whole or absent, and back to the last bit."""

import json
import os

import pytest
import torch
from torch import nn

from abyssal.train.optim import build_optimizer
from abyssal.train.run import checkpoint
from abyssal.train.run.checkpoint import Progress
from abyssal.train.settings import OptimConfig


class Small(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.linear = nn.Linear(width, 2)
        self.unused = nn.Parameter(torch.ones(1))
        self.register_buffer("bias", torch.arange(4.0))


def trained(seed: int = 0) -> tuple[Small, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Small()
    optimizer = build_optimizer(model, OptimConfig())
    for _ in range(3):
        model.linear(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.bias += 1
    return model, optimizer


@pytest.fixture
def recipe(tiny):
    return tiny()


def save(folder, recipe, step: int, keep: int = 2, seed: int = 0):
    return checkpoint.save(folder, *trained(seed), recipe, Progress(step, 10 * step, 0.5), keep)


def test_everything_comes_back_bit_for_bit(tmp_path, recipe):
    model, optimizer = trained()
    folder = checkpoint.save(tmp_path, model, optimizer, recipe, Progress(7, 70, 1.25), keep=2)
    expected = torch.rand(5)
    other, fresh = Small(), None
    fresh = build_optimizer(other, OptimConfig())
    checkpoint.restore(folder, other, fresh)
    assert torch.equal(torch.rand(5), expected), "random state"
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    for (name, old), new in zip(model.named_parameters(), other.parameters()):
        assert optimizer.state[old].keys() == fresh.state[new].keys(), name
        for moment, tensor in optimizer.state[old].items():
            assert torch.equal(fresh.state[new][moment], tensor), f"{name}.{moment}"
    assert checkpoint.read_state(folder) == (recipe, Progress(7, 70, 1.25))


def test_no_pickle(tmp_path, recipe):
    folder = save(tmp_path, recipe, 1)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    for path in folder.glob("*.safetensors"):
        header = path.read_bytes()
        json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])


def test_killed_between_write_and_rename_leaves_the_old_one_whole(tmp_path, recipe, monkeypatch):
    first = save(tmp_path, recipe, 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, recipe, 6, seed=1)
    assert checkpoint.checkpoints(tmp_path) == [first]
    assert checkpoint.find(tmp_path) == first
    checkpoint.load_model(first, Small())
    assert list((tmp_path / checkpoint.FOLDER).glob(".writing-*"))
    second = save(tmp_path, recipe, 6, seed=1)
    assert checkpoint.checkpoints(tmp_path) == [first, second]
    assert not list((tmp_path / checkpoint.FOLDER).glob(".writing-*"))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "random.safetensors", checkpoint.STATE])
def test_killed_while_writing_a_file(tmp_path, recipe, monkeypatch, file):
    first = save(tmp_path, recipe, 3)
    flush = checkpoint.flush

    def dies(path):
        if path.name == file:
            path.write_bytes(path.read_bytes()[:10])
            raise KeyboardInterrupt
        flush(path)

    monkeypatch.setattr(checkpoint, "flush", dies)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, recipe, 6)
    assert checkpoint.find(tmp_path) == first


def test_the_newest_are_kept_in_numerical_order(tmp_path, recipe):
    for step in (1, 2, 999_999, 1_000_000):
        save(tmp_path, recipe, step, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    assert checkpoint.find(tmp_path).name == "step-1000000"


def test_find_takes_a_checkpoint_or_a_run_and_names_what_is_neither(tmp_path, recipe):
    folder = save(tmp_path, recipe, 4)
    assert checkpoint.find(str(folder)) == folder
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        checkpoint.find(tmp_path / "nothing")


def test_another_model_is_refused_with_names(tmp_path, recipe):
    folder = save(tmp_path, recipe, 4)
    with pytest.raises(ValueError, match=r"linear\.weight"):
        checkpoint.load_model(folder, Small(width=5))

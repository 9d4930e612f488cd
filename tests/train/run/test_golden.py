"""The losses of first steps, part by part, as they were when they were written down: no change of form may shift them.

    python tests/train/run/test_golden.py       writes them anew, for a change that is meant to change what is computed

Real recipes in float64, where processors and BLAS kernels agree far beyond the six digits that are compared; two
documents to a row, from the licence, which is the same bytes on every machine.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from abyssal.model import Transformer
from abyssal.train.data.rows import IGNORED, Batch
from abyssal.train.optim import build_optimizer
from abyssal.train.recipe import Recipe, load_recipe
from abyssal.train.run.schedule import Schedule
from abyssal.train.run.step import Stepper

FILE = Path(__file__).with_name("golden.json")
TEXT = Path(__file__).parents[3] / "LICENSE"
STEPS = {"nano": 20, "toy": 5}


def batch(rows: int, length: int, step: int) -> Batch:
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    starts = [(step * rows + row) * 997 % (len(text) - length) for row in range(rows)]
    ids = torch.stack([text[start : start + length] for start in starts])
    targets = torch.stack([text[start + 1 : start + length + 1] for start in starts])
    documents = (torch.arange(length) > length * 2 // 3).long().expand(rows, -1).clone()
    targets[:, length * 2 // 3] = IGNORED
    return Batch(ids, targets, documents)


def model_of(recipe: Recipe) -> Transformer:
    """In float64, with normal weights from numpy: torch's depend in their last bit on what the processor can do."""
    torch.manual_seed(recipe.train.seed)
    model, random = Transformer(recipe.model).double(), np.random.default_rng(recipe.train.seed)
    for parameter in model.parameters():
        std = float(f"{float(parameter.detach().std()):.2g}") if parameter.numel() > 1 else 0.0
        if std:
            parameter.data = torch.from_numpy(random.normal(0, std, parameter.shape))
    return model


def losses(name: str) -> list[dict[str, float]]:
    recipe = load_recipe(name)
    model = model_of(recipe)
    stepper = Stepper(model, build_optimizer(model, recipe.optim), recipe, torch.device("cpu"))
    schedule, found = Schedule(recipe), []
    for step in range(STEPS[name]):
        phase = schedule.phase(step)
        outcome = stepper.gradients(phase, batch(recipe.data.batch_size, phase.length, step))
        stepper.update(phase)
        found.append({name: float(x) for name, x in (outcome.losses | {"norm": outcome.norm}).items()})
    return found


@pytest.mark.parametrize("name", STEPS)
def test_losses_are_what_they_were(name):
    golden = json.loads(FILE.read_text())[name]
    found = losses(name)
    assert [list(step) for step in found] == [list(step) for step in golden]
    for number, (step, was) in enumerate(zip(found, golden), 1):
        for part, value in was.items():
            assert step[part] == pytest.approx(value, rel=1e-6, abs=1e-6), f"{part} of step {number}"


if __name__ == "__main__":
    written = {name: losses(name) for name in STEPS}
    FILE.write_text(json.dumps(written, indent=1) + "\n")
    sys.stdout.write(f"{FILE}: {', '.join(f'{len(steps)} steps of {name}' for name, steps in written.items())}\n")

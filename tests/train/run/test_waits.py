"""What a training step asks of a GPU, counted on meta tensors: no wait, and the launches beside the passes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

CHILD = """
import json, sys
from unittest.mock import MagicMock
import counting
import torch
from abyssal.model import Transformer
from abyssal.train.data.rows import Batch
from abyssal.train.optim import build_optimizer
from abyssal.train.recipe import load_recipe
from abyssal.train.run import metrics
from abyssal.train.run.line import Line
from abyssal.train.run.schedule import Schedule
from abyssal.train.run.step import Stepper

torch.cuda.Event = MagicMock
sys.modules["torch.optim.adam"]._device_dtype_check_for_fused = lambda *_, **__: None
if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_adamw_.tensor_lr", "Meta"):
    fused = torch.library.Library("aten", "IMPL", "Meta")
    fused.impl("_fused_adamw_.tensor_lr", lambda *_, **__: None)


def made(*settings):
    recipe = load_recipe(settings[0], settings[1:])
    with torch.device("meta"):
        model = Transformer(recipe.model)
    optimizer = build_optimizer(model, recipe.optim)
    return Stepper(model, optimizer, recipe, torch.device("meta")), Schedule(recipe).phase(10)


with counting.gpu() as counted:
    found = {}
    stepper, phase = made("nano", "train.micro_batch=2")
    ids = torch.arange(3 * 64).view(3, 64) % 250
    for _ in range(2):  # what is made once is there in the second step
        counted.clear()
        done = stepper.gradients(phase, Batch(ids, ids, torch.zeros_like(ids)))
        stepper.update(phase)
        Line({**done.losses, "grad_norm": done.norm, **metrics.model_record(done.metrics)})
    found["waits"] = [where for _, where in counted.waits]
    found["copies"] = counted.aten["copy between host and device"]
    for rule in ("adamw", "muon"):
        stepper, phase = made("small", f"optim.rule={rule}")
        for _ in range(2):
            for parameter in stepper.model.parameters():
                parameter.grad = torch.empty_like(parameter)
            for block in (*stepper.model.layers, *stepper.model.mtp):
                block.ffn.gate.counts = block.ffn.gate.weight.new_empty(len(block.ffn.gate.weight))
            counted.clear()
            stepper.accumulate(phase, [])
            stepper.update(phase)
        found[rule] = counted.aten.total()
        assert not counted.waits, counted.waits
    found["muon's parameters"] = len(stepper.optimizer.optimizers[1].param_groups[0]["params"])
    json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def counted():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_step_waits_for_nothing(counted):
    assert counted["waits"] == []
    assert counted["copies"] >= 2 * 3 + 1, "ids, targets and documents of each pass go there, one line comes back"


def test_optimizer_and_clipping_are_launched_at_once(counted):
    """A foreach counts once here: on a GPU it is a launch for some hundred tensors."""
    assert counted["adamw"] <= 45
    assert counted["muon"] <= 130 + counted["muon's parameters"]

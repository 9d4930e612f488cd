"""What a GPU is asked to do in a pass and for a token, counted without one (`counting`): budgets that hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"


def counted(*arguments: str) -> dict:
    """In a process of its own, where Triton is no interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SUPPORT / "counting.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def launches(part: dict) -> int:
    return part["triton"] + part["aten"]


@pytest.mark.parametrize(
    ("name", "rows", "length", "forward", "backward"), [("small", 8, 2048, 1310, 1794), ("nano", 2, 100, 660, 908)]
)
def test_a_training_pass_waits_for_nothing_and_keeps_to_its_launches(name, rows, length, forward, backward):
    found = counted("train", name, str(rows), str(length))
    for part in ("forward", "backward", "router bias"):
        assert found[part]["waits"] == {}
    assert launches(found["forward"]) <= forward
    assert launches(found["backward"]) <= backward
    assert launches(found["router bias"]) <= 8
    assert found["new specialisations"] == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_a_token_waits_for_nothing_and_keeps_to_its_launches(batch):
    found = counted("decode", "small", str(batch), "100", "70")
    assert found["most waits of a token"] == 0 and found["captured"]["waits"] == {}
    assert launches(found["token"]) <= 540
    assert launches(found["captured"]) <= 780
    assert found["new specialisations"] <= 5


@pytest.mark.parametrize(("name", "token"), [("v3", 100), ("v3.2", 125)])
def test_v3_waits_for_nothing_either(name, token):
    """Two layers; rows of unequal lengths take a copy more each."""
    found = counted("lineage", name, "2", "600")
    assert all(part["triton"] > 0 and part["waits"] == {} for part in found.values())
    assert launches(found["token"]) <= token and launches(found["token of uneven rows"]) <= token + 8

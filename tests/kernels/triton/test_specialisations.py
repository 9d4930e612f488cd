"""Each op compiles few kernels over all lengths of a text: a first text of every length would wait for its own."""

import json
import os
import subprocess
import sys

import aot
import lengths
import pytest

# kernels over all of `lengths.LENGTHS`: of the forward and the backward pass, for the options that lengths.py names
MOST = {
    "attention": 27,
    "index_topk": 6,
    "index_loss": 13,
    "cross_entropy": 3,
    "engram": 10,
    "exact_linear": 2,
    "hyper": 16,
    "moe_experts": 15,
    "moe_route": 13,
    "norm_rope": 8,
    "pool": 12,
    "quant": 7,
}


@pytest.fixture(scope="module")
def found():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(aot.SUPPORT / "lengths.py")]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow("all ops at 150 lengths")
@pytest.mark.parametrize("op", lengths.OPS)
def test_kernels_of_an_op_over_all_lengths(op, found):
    assert sum(found[op].values()) <= MOST[op], found[op]

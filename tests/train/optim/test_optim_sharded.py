"""Muon and the balanced rule on parameters that two processes share: the steps of one process."""

import subprocess
import sys
from pathlib import Path

import patience
import pytest

ROOT = Path(__file__).parents[3]

CHILD = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from abyssal.train.optim.balanced import Balanced
from abyssal.train.optim import Muon
from abyssal.train.optim import muon as module

torch.set_num_threads(1)
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
gathered = []
plain = module.full
module.full = lambda x: gathered.append(tuple(x.shape)) or plain(x)
cases = [  # shape, rows, how it is shared
    ((5, 8, 6), (4, 4), Shard(0)),  # experts, three here and two there: nothing need be gathered
    ((4, 8, 6), (8,), Shard(1)),
    ((6, 4), (6,), Shard(0)),
    ((7, 9), (2, 2, 3), Shard(0)),  # four rows here and three there, matrices across the cut
    ((4, 6), (4,), Replicate()),
    ((3, 5, 4), (5,), Replicate()),
]
torch.manual_seed(0)
starts = [torch.randn(shape) for shape, _, _ in cases]
rows = [r for _, r, _ in cases]
whole = [nn.Parameter(x.clone()) for x in starts]
parts = [nn.Parameter(distribute_tensor(x.clone(), mesh, [how])) for x, (_, _, how) in zip(starts, cases)]
table = nn.Parameter(torch.randn(9, 4))
shared = nn.Parameter(distribute_tensor(table.detach().clone(), mesh, [Shard(0)]))
optimizers = [Muon(p, rows, lr=0.1) for p in (whole, parts)]
optimizers += [Balanced([p], lr=0.1) for p in (table, shared)]
for step in range(3):
    for p, q in (*zip(whole, parts), (table, shared)):
        p.grad = torch.randn(p.shape) * 10.0 ** step
        q.grad = distribute_tensor(p.grad, mesh, q.placements)
    gathered.clear()
    for optimizer in optimizers:
        optimizer.step()
    assert sorted(gathered) == [(4, 6), (4, 8, 6), (6, 4), (7, 9)], gathered
for p, q, (shape, _, how), x in zip(whole, parts, cases, starts):
    assert tuple(q.shape) == shape and q.placements == (how,)
    assert torch.equal(p, q.full_tensor()) and not torch.equal(p, x), (shape, how)
    momentum = optimizers[1].state[q]["momentum"]
    assert momentum.placements == (how,) and torch.equal(momentum.full_tensor(), optimizers[0].state[p]["momentum"])
torch.testing.assert_close(shared.full_tensor(), table.detach(), rtol=1e-5, atol=1e-6)
print("same", flush=True)
dist.destroy_process_group()
os._exit(0)  # gloo's threads outlive their group, and abort where they let go of a tensor while Python ends
"""


@pytest.mark.slow("two processes that load torch")
def test_two_processes_make_the_steps_of_one(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", CHILD]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=patience.SECONDS)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, output in zip(children, outputs):
        assert child.returncode == 0 and "same" in output, output

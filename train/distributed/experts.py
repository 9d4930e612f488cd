"""Expert parallelism: a process has E / p of a layer's experts, and tokens travel to the experts that they chose.

    pairs (token, slot), sorted by expert        counts[e] of them go to expert e, on process e // (E / p)
    all-to-all                                   rows x[token] and weights there
    moe_experts                                  the local experts, on whatever came: none is dropped, none padded
    all-to-all                                   the rows back, to the place that they came from
    y[token] = sum over its slots + shared       in the order of the slots

The backward pass runs the same way back: an expert's gradient is the sum over the tokens of all processes that share
the experts out. A token that chose two experts of one process is sent there twice.

n tokens · k slots · r rows received · E experts · p processes · d width
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F

from ...kernels import Routing, moe_experts, moe_permutation
from ...model.moe import Experts
from ...model.quantization import rounded_weight


class ParallelExperts(Experts):
    """`Experts` of which this process has its share: w13 and w2 are distributed tensors, cut along the experts.

    Raises:
        ValueError: the number of experts does not divide by that of the processes.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        count = len(experts.w13)
        if count % mesh.size():
            raise ValueError(f"train.expert_parallel={mesh.size()}: allowed are divisors of n_routed_experts={count}")
        self.limit, self.std, self.format, self.count, self.mesh = (
            *(experts.limit, experts.std, experts.format),
            *(count, mesh),
        )
        self.w13, self.w2 = (nn.Parameter(_cut(weight, mesh)) for weight in (experts.w13, experts.w2))

    def forward(self, x: Tensor, routing: Routing, shared: Tensor) -> Tensor:
        """As `Experts.forward`, of this process' tokens, by the experts of all."""
        local13, local2 = self.w13.to_local(), self.w2.to_local()  # type: ignore[operator]
        w13, w2 = rounded_weight(local13, self.format, parts=2), rounded_weight(local2, self.format)
        journey = Journey(routing.experts, self.count, self.mesh)
        rows, weights = journey.there(x, routing.weights)
        done = moe_experts(rows, journey.experts, weights, w13, w2, limit=self.limit)
        return journey.back(done, shared)


class Journey:
    """Where the pairs of a pass go and come from; `experts` int64 [r, 1]: the local ones that received rows chose."""

    def __init__(self, experts: Tensor, count: int, mesh: DeviceMesh) -> None:
        self.group, self.slots = mesh.get_group(), experts.shape[1]
        self.order, counts, self.inverse = moe_permutation(experts, count)
        leaving = counts.view(mesh.size(), -1)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=self.group)
        self.sent, self.received = leaving.sum(1).tolist(), arriving.sum(1).tolist()
        local = torch.arange(leaving.shape[1], device=experts.device).repeat(mesh.size())
        self.experts = local.repeat_interleave(arriving.flatten()).unsqueeze(1)

    def there(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [r, d] and weights [r, 1] for the local experts, of every process' x [n, d] and weights [n, k]."""
        rows = F.embedding(self.order // self.slots, x)
        return self._travel(rows), self._travel(weights.flatten()[self.order].unsqueeze(1))

    def back(self, rows: Tensor, shared: Tensor) -> Tensor:
        """Each token's sum over its slots [n, d], in float32 and in their order, and `shared`."""
        home = _exchange(rows, self.sent, self.received, self.group)
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = F.embedding_bag(self.inverse, home.to(wide), mode="sum")
        return (total + shared).to(rows.dtype)

    def _travel(self, rows: Tensor) -> Tensor:
        return _exchange(rows, self.received, self.sent, self.group)


def _exchange(rows: Tensor, arriving: list[int], leaving: list[int], group: dist.ProcessGroup) -> Tensor:
    return wait_tensor(all_to_all_single_autograd(rows.contiguous(), arriving, leaving, group))


def _cut(weight: Tensor, mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)

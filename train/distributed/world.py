"""The processes of a run, as `torchrun` starts them, or the one process that there is.

    mesh   [data, expert]      rank = data · expert_parallel + expert;    every rank reads rows of its own

Dense parameters are shared out over all processes, the experts of a layer over the `expert` axis and each of these
parts over the `data` axis. One process is a world as well: sums over it and decisions in it change nothing, so that
training has one path.
"""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

if TYPE_CHECKING:
    from ..recipe import Recipe

Value = TypeVar("Value")

LOST = re.compile(r"closed by peer|reset by peer|refused|broken pipe|timed? ?out|NCCL|gloo", re.IGNORECASE)


class ProcessLost(ConnectionError):
    """Another process of the run has ended, or has not answered in time."""


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`; `every` is the mesh of all, `grid` that of [data, expert]; None for one process."""

    rank: int = 0
    size: int = 1
    every: DeviceMesh | None = None
    grid: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and lines for people."""
        return self.rank == 0

    @property
    def expert_parallel(self) -> int:
        return self.grid["expert"].size() if self.grid is not None else 1

    def share(self, rows: range) -> range:
        """The rows of this process: consecutive ones, as many as every other has.

        Raises:
            ValueError: their number does not divide by that of the processes.
        """
        each, rest = divmod(len(rows), self.size)
        if rest:
            raise ValueError(f"{len(rows)} rows of a step: allowed are multiples of {self.size}, the processes")
        return rows[self.rank * each : (self.rank + 1) * each]

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in a new tensor; the same bits in each."""
        if self.size == 1:
            return values
        values = values.detach().clone()
        dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        return self.total(values) / self.size if self.size > 1 else values

    def agree(self, value: Value) -> Value:
        """What rank 0 says."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def heard(self, value: Value | None) -> Value | None:
        """What the first of those processes says that have something to say."""
        if self.size == 1:
            return value
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return next((said for said in values if said is not None), None)

    def barrier(self) -> None:
        """Returns once every process is here."""
        self.heard(None)


ALONE = World()


class Nowhere:
    """Stands for a file or a screen in a process that does not write: whatever it is told, nothing happens."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def first_process() -> bool:
    """Whether this is the process that writes, also where there is no world yet, or no longer."""
    return os.environ.get("RANK", "0") == "0"


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is a device. Raises ValueError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"train.device={name!r}: allowed are auto, cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"train.device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def own_device(device: torch.device, size: int) -> torch.device:
    """The CUDA device of this process, the current one from now on: streams and events are those of the current one.

    Of several processes on a machine each has its own, where one of no number was asked for.
    """
    if device.type == "cuda" and size > 1 and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def check(recipe: "Recipe", world: World) -> None:
    """Raises ValueError for what a run of several processes cannot do, or cannot share out evenly."""
    if world.size == 1:
        return
    for table in ("grpo", "distil", "stability"):
        if getattr(recipe, table) is not None:
            raise ValueError(f"[{table}]: allowed on one process; this run has {world.size}")
    rows = {"data.batch_size": recipe.data.batch_size}
    rows |= {f"stages.{number}.batch_size": stage.batch_size for number, stage in enumerate(recipe.stages)}
    if recipe.schedule.batch_ramp_steps:
        rows["schedule.batch_start"] = recipe.schedule.batch_start
    for name, count in rows.items():
        if count % world.size:
            raise ValueError(f"{name}={count}: allowed are multiples of {world.size}, the number of processes")


@contextmanager
def processes(device: torch.device, expert_parallel: int = 1, timeout: float = 600.0) -> Iterator[World]:
    """The world of this process, from torchrun's environment or from a process group that is there already.

    Args:
        device: of the model; decides how processes talk (gloo on a CPU, NCCL on CUDA).
        expert_parallel: processes that share out the experts of a layer.
        timeout: seconds after which a process that does not answer counts as lost.

    Raises:
        ValueError: the number of processes does not divide by `expert_parallel`.
        ProcessLost: within the context, another process ended or did not answer, or torchrun ends this one.
    """
    ours = not dist.is_initialized()
    size = int(os.environ.get("WORLD_SIZE", "1")) if ours else dist.get_world_size()
    device = own_device(device, size)
    if expert_parallel < 1 or size % expert_parallel:
        started = "" if size > 1 else "; start several with torchrun --nproc-per-node N -m abyssal.train train ..."
        raise ValueError(
            f"train.expert_parallel={expert_parallel}: allowed are divisors of {size}, the number of processes{started}"
        )
    if size == 1:
        yield ALONE
        return
    wait = timedelta(seconds=timeout)
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=wait)
        before = signal.signal(signal.SIGTERM, _ended)
    try:
        yield _world(device, size, expert_parallel, wait)
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        raise ProcessLost(f"another process of the run ended or did not answer for {timeout:g} s") from error
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)
            dist.destroy_process_group()


def _ended(*_: Any) -> None:
    """torchrun, a tenth of a second after one of its processes has died, ends the others, which may not know yet."""
    raise ProcessLost("another process of the run ended, or the run was told to end (SIGTERM)")


def _world(device: torch.device, size: int, expert_parallel: int, wait: timedelta) -> World:
    every = init_device_mesh(device.type, (size,), mesh_dim_names=("every",))
    shape = (size // expert_parallel, expert_parallel)
    grid = init_device_mesh(device.type, shape, mesh_dim_names=("data", "expert"))
    for mesh in (every, grid["data"], grid["expert"]):
        dist.distributed_c10d._set_pg_timeout(wait, mesh.get_group())
    return World(dist.get_rank(), size, every, grid)

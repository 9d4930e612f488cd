"""What every Triton launch needs to know: the architecture it compiles for, and the device its tensors live on."""

import torch
import triton
from torch import Tensor


def architecture() -> str:
    """The family that the current device belongs to, of those that kernels keep a table of blocks for.

    `sm_80` (A100), `sm_89` (sm_86 and sm_120 too: 99 KiB of shared memory), `sm_90` (Hopper: wgmma, TMA), `sm_100`
    (Blackwell: tensor memory), `hip` (AMD CDNA). The interpreter goes by the first. Older ones: `kernels/backend.py`.
    """
    if triton.knobs.runtime.interpret:
        return "sm_80"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "hip"
    return {80: "sm_80", 90: "sm_90", 100: "sm_100", 103: "sm_100"}.get(target.arch, "sm_89")


def on_device(x: Tensor) -> torch.cuda.device_of:
    """A context in which kernels run on the device of `x`; nothing changes for a CPU tensor."""
    return torch.cuda.device_of(x)


def registers(warps: int, programs: int = 1) -> dict[str, int]:
    """Options of a launch whose threads may take all registers that so many programs at once leave to each.

    Of the 65,536 of a multiprocessor, 255 at most. NVIDIA's assembler makes its own guess of how many programs are to
    fit, and now and then puts a few bytes on the stack for the sake of one more.
    """
    most = min(65536 // (32 * warps * programs), 255)
    return {"num_warps": warps} | ({} if architecture() == "hip" else {"maxnreg": most})


def in_rows(x: Tensor) -> Tensor:
    """x [b, n, d] whose rows lie one behind the other, and whole rows between sequences: a slice [:, :n] of a cache is
    not copied. From a sequence to the next it is x.stride(0) // d rows.
    """
    (b, _, d), (step, *within) = x.shape, x.stride()
    return x if within == [d, 1] and (b == 1 or step % d == 0) else x.contiguous()


def next_power(n: int, least: int = 1) -> int:
    """The power of two that `n` fits in, as Triton's blocks need."""
    return max(triton.next_power_of_2(n), least)

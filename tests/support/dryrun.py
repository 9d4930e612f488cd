"""A GPU that is not there: host code runs on CPU tensors, each launch is specialised and compiled, none is executed.

    with gpu("sm_90") as (launches, kernels):
        moe_experts_forward(...)          # the code that a GPU would run; it must not look at a tensor's device
    assert all(k["spilled"] == 0 for k in kernels)

A kernel over the architecture's shared memory raises OutOfResources, as on the card. TRITON_INTERPRET must be unset.
"""

import contextlib
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import compiler

SHARED = {  # bytes per program
    "sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536
}  # fmt: skip
_numbers = itertools.count(1000)  # compiled kernels are cached by device: each context is a device of its own


def _target(name: str) -> GPUTarget:
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


def _tool(name: str, *options: str, binary: bytes) -> str:
    """Output of one of the disassemblers that triton carries."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def resources(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel takes: registers, bytes of spilled ones, shared bytes, matrix and copy instructions.

    `hgmma` counts Hopper's matrix instructions in the machine code, the others are counted in PTX: `async` the
    asynchronous copies of single addresses (LDGSTS), `tma` those of tiles.
    """
    row = {"kernel": kernel.metadata.name, "warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
    if "cubin" not in kernel.asm:
        assembly = kernel.asm["amdgcn"]
        number = {key: int(n) for key, n in re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
        mma, atomics = (len(re.findall(p, assembly)) for p in (r"\bv_mfma", r"\batomic_(?:add|fadd)_f"))
        spilled = 4 * number["vgpr_spill_count"]
        return {**row, "registers": number["vgpr_count"], "spilled": spilled, "mma": mma, "float atomics": atomics}
    ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
    found = dict(re.findall(r"\b(REG|STACK):(\d+)", _tool("cuobjdump", "-res-usage", binary=cubin)))
    counted = {
        "mma": r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)",
        "async": r"\bcp\.async\.c[ag]\.shared\.global",
        "tma": r"\bcp\.async\.bulk\.tensor",
        "float atomics": r"\b(?:atom|red)\.[\w.]*\.b?f(?:16|32|64)",
    }
    row |= {"registers": int(found["REG"]), "spilled": int(found["STACK"])}
    row |= {name: len(re.findall(pattern, ptx)) for name, pattern in counted.items()}
    if "wgmma" in ptx:
        row["hgmma"] = len(re.findall(r"\bHGMMA\b", _tool("nvdisasm", "-c", "-ndf", binary=cubin)))
    return row


class _Utils:
    """What triton asks of a driver when it loads a kernel."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.name], "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024


class _Driver(DriverBase):
    def __init__(self, name: str, launches: list[dict[str, Any]]) -> None:
        self.target, self.utils, self.device = _target(name), _Utils(name), next(_numbers)

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.name = metadata.name

            def __call__(self, x: int, y: int, z: int, *arguments: Any) -> None:
                launches.append({"kernel": self.name, "grid": (x, y, z)})

        self.launcher_cls = Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "void*"

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing runs here: there is nothing to time")


@contextlib.contextmanager
def gpu(name: str) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """The launches of the code inside, and the resources of the kernels compiled for it, as they come."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter's functions cannot be compiled"
    launches: list[dict[str, Any]] = []
    kernels: list[dict[str, Any]] = []
    load = compiler.CompiledKernel._init_handles

    def load_and_note(self):
        fresh = self.module is None
        load(self)
        if fresh:
            kernels.append(resources(self))

    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(name, launches))
    compiler.CompiledKernel._init_handles = load_and_note
    try:
        yield launches, kernels
    finally:
        compiler.CompiledKernel._init_handles = load
        triton.runtime.driver._active = previous

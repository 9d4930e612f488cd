"""Work, what a device reaches at most, and the least time that follows: max(flops / peak flops, bytes / peak bytes)."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one op, or of several that run one after the other."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def elementwise(values: int, read: int, write: int) -> Work:
    """Each value read and written once, in that many bytes."""
    return Work(0, values * (read + write))


class Peak(NamedTuple):
    """What a device reaches at most, per second, in one dtype, and who says so."""

    flops: float
    bytes: float
    source: str

    def seconds(self, work: Work) -> float:
        """The roofline limit: no implementation takes less time."""
        return max(work.flops / self.flops, work.bytes / self.bytes)

    def bound(self, work: Work) -> str:
        """What the limit comes from, "compute" or "memory"."""
        return "compute" if work.flops / self.flops > work.bytes / self.bytes else "memory"


class Chip(NamedTuple):
    """A GPU by its maker's datasheet, at boost clocks, without sparsity; T = 1e12, G = 1e9.

    half: TFLOP/s in bf16, and as many in fp16, added up in fp32; single: in fp32 without tensor cores; GB/s; GB.
    """

    half: float
    single: float
    bandwidth: float
    memory: float
    names: tuple[str, ...]  # that CUDA gives it


GPUS = {
    "a10": Chip(125, 31.2, 600, 24, ("NVIDIA A10",)),  # A10 datasheet, 2021
    "a100": Chip(312, 19.5, 2039, 80, ("NVIDIA A100-SXM4-80GB",)),  # A100 datasheet, 2021
    "a100-40gb": Chip(312, 19.5, 1555, 40, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),  # A100 datasheet, 2020
    "a100-pcie": Chip(312, 19.5, 1935, 80, ("NVIDIA A100 80GB PCIe",)),  # A100 datasheet, 2021
    "b200": Chip(2250, 75, 7700, 180, ("NVIDIA B200",)),  # HGX B200 datasheet, an eighth
    "b300": Chip(2250, 75, 7700, 270, ("NVIDIA B300",)),  # HGX B300 datasheet, an eighth
    "h100": Chip(989, 66.9, 3350, 80, ("NVIDIA H100 80GB HBM3",)),  # H100 datasheet: SXM
    "h100-pcie": Chip(756, 51.2, 2039, 80, ("NVIDIA H100 PCIe",)),  # H100 datasheet: PCIe
    "h200": Chip(989, 66.9, 4800, 141, ("NVIDIA H200",)),  # H200 datasheet: SXM
    "h800": Chip(989, 66.9, 3350, 80, ("NVIDIA H800",)),  # an H100 with slower links
    "l4": Chip(121, 30.3, 300, 24, ("NVIDIA L4",)),  # L4 datasheet
    "l40s": Chip(362, 91.6, 864, 48, ("NVIDIA L40S",)),  # L40S datasheet
    "mi300x": Chip(1307, 163.4, 5300, 192, ("AMD Instinct MI300X",)),  # MI300X data sheet
    "rtx3090": Chip(71, 35.6, 936, 24, ("NVIDIA GeForce RTX 3090",)),  # Ampere GA102 whitepaper
    "rtx4090": Chip(165, 82.6, 1008, 24, ("NVIDIA GeForce RTX 4090",)),  # Ada whitepaper
    "rtx5090": Chip(209.5, 104.8, 1792, 32, ("NVIDIA GeForce RTX 5090",)),  # RTX Blackwell whitepaper
}
DTYPES = ("bfloat16", "float16", "float32")
# a large bf16 product and a copy, measured on an H100 SXM: what implementations are usually compared with
H100_ACHIEVED = Peak(798e12, 3.0e12, "a large bf16 product and a copy on an H100 SXM")


def datasheet(device: str, dtype: str) -> Peak | None:
    """Peaks of a device, by the name CUDA gives it, from its maker's datasheet (dense, at boost clocks).

    None for a device or dtype that is not in the table: measure it.
    """
    chip = next((chip for chip in GPUS.values() if device in chip.names), None)
    if chip is None or dtype not in DTYPES:
        return None
    teraflops = chip.single if dtype == "float32" else chip.half
    return Peak(1e12 * teraflops, 1e9 * chip.bandwidth, "datasheet")

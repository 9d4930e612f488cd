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


# by the name CUDA gives: dense TFLOP/s in bf16, fp16 (fp32 accumulation) and fp32 (no tensor cores), and GB/s
_DATASHEETS = {
    "NVIDIA A100-PCIE-40GB": (312, 312, 19.5, 1555),
    "NVIDIA A100-SXM4-40GB": (312, 312, 19.5, 1555),
    "NVIDIA A100 80GB PCIe": (312, 312, 19.5, 1935),
    "NVIDIA A100-SXM4-80GB": (312, 312, 19.5, 2039),
    "NVIDIA L40S": (362, 362, 91.6, 864),
    "NVIDIA GeForce RTX 4090": (165, 165, 82.6, 1008),
    "NVIDIA H100 PCIe": (756, 756, 51.2, 2039),
    "NVIDIA H100 80GB HBM3": (989, 989, 66.9, 3350),
    "NVIDIA H800": (989, 989, 66.9, 3350),
    "NVIDIA H200": (989, 989, 66.9, 4800),
    "NVIDIA B200": (2250, 2250, 75, 7700),
}
DTYPES = ("bfloat16", "float16", "float32")
# a large bf16 product and a copy, measured on an H100 SXM: what implementations are usually compared with
H100_ACHIEVED = Peak(798e12, 3.0e12, "a large bf16 product and a copy on an H100 SXM")


def datasheet(device: str, dtype: str) -> Peak | None:
    """Peaks of a device, by the name CUDA gives it, from its maker's datasheet (dense, at boost clocks).

    None for a device or dtype that is not in the table: measure it.
    """
    if device not in _DATASHEETS or dtype not in DTYPES:
        return None
    *teraflops, gigabytes = _DATASHEETS[device]
    return Peak(1e12 * teraflops[DTYPES.index(dtype)], 1e9 * gigabytes, "datasheet")

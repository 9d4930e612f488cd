"""At what clocks a machine runs just now: times are worth nothing beside a clock that was throttled."""

import re
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

QUERY = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "pstate")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def clocks(device: torch.device) -> dict[str, str]:
    """Name to value with unit; empty where nothing tells."""
    return _gpu(device) if device.type == "cuda" else _cpu()


def _gpu(device: torch.device) -> dict[str, str]:
    """As nvidia-smi tells, of the device that CUDA gives this number."""
    told = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", f"--id=GPU-{told}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(QUERY, values)) if done.returncode == 0 and len(values) == len(QUERY) else {}


def _cpu() -> dict[str, str]:
    """Governor and present frequency, where Linux tells them."""
    found = {}
    with suppress(OSError):
        found["governor"] = GOVERNOR.read_text(encoding="utf-8").strip()
    try:
        told = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        told = []
    return found | ({"frequency": f"{max(map(float, told)):.0f} MHz"} if told else {})

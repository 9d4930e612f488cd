"""Is it right: the machine, a small model against the definitions, and every test that wants a GPU."""

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from runner import ROOT, Context

LIMITS = {False: (1e-4, 1e-3), True: (2e-2, 0.1)}  # under autocast or not: of a loss, of the whole gradient


def machine(at: Context) -> None:
    """What is here: device, driver, clocks, versions, commit, cores, memory."""
    import torch

    from abyssal.train.measure.bench.clocks import clocks
    from abyssal.train.measure.bench.peers import versions
    from abyssal.train.measure.profile.preset import available_memory
    from abyssal.train.measure.roofline import datasheet
    from abyssal.train.run import provenance

    device = torch.device(at.device)
    at.tell(
        machine=provenance.machine(device),
        versions=provenance.versions() | versions(),
        source=provenance.source(),
        clocks=clocks(device),
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        cores=os.cpu_count(),
        available_gib=round(available_memory(torch.device("cpu")) / 2**30, 1),
        python=platform.python_build()[0],
        datasheet=datasheet(provenance.machine(device)["name"], "bfloat16"),
        compiler=shutil.which(os.environ.get("CC", "gcc")) is not None,
    )
    if not at.small:
        found = torch.cuda.get_device_properties(0)
        at.tell(
            capability=list(torch.cuda.get_device_capability()),
            memory_gib=round(found.total_memory / 2**30, 1),
            multiprocessors=found.multi_processor_count,
            cuda=torch.version.cuda,
            driver=_driver(),
        )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def smoke(at: Context) -> None:
    """`nano` by its engines against its definitions, with and without autocast."""
    import torch

    from abyssal.model import ModelConfig, Transformer

    torch.manual_seed(0)
    with torch.device(at.device):
        model = Transformer(ModelConfig.load("nano"))
        ids = torch.randint(0, 256, (1, 40) if at.small else (2, 300))
    for item in at.items(["float32", "autocast"]):
        autocast = item == "autocast"
        want, got = (_learnt(model, ids, backend, autocast) for backend in ("reference", "auto"))
        differences = {name: (got[1][name] - g).norm() for name, g in want[1].items()}
        norms = {name: g.norm() for name, g in want[1].items()}
        whole = (_norm(differences) / _norm(norms)).item()
        worst = max(((differences[name] / norms[name].clamp_min(1e-12)).item(), name) for name in norms)
        losses = {name: (got[0][name].item(), value.item()) for name, value in want[0].items()}
        apart = max(abs(a - b) / max(abs(b), 1e-6) for a, b in losses.values())
        right = apart <= LIMITS[autocast][0] and whole <= LIMITS[autocast][1]
        at.tell(item=item, right=right, losses=losses, apart=apart, gradient=whole, worst_gradient=worst)


def _norm(norms: dict[str, Any]) -> Any:
    import torch

    return torch.stack(list(norms.values())).norm()


def _learnt(model: Any, ids: Any, backend: str, autocast: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Losses and gradients."""
    import torch

    os.environ["ABYSSAL_BACKEND"] = backend
    model.zero_grad()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        out = model(ids, targets=ids.roll(-1, 1))
    out.loss.backward()
    gradients = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), **{name: x.detach() for name, x in out.losses.items()}}, gradients


def tests(at: Context) -> None:
    """Every test that wants a GPU, side by side, each with a limit."""
    import importlib.util

    from abyssal.train.measure.bench import workers

    if not importlib.util.find_spec("pytest"):
        at.tell(report="not run: pytest is not installed", counts={})
        return
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    arguments = ["-m", "gpu"]
    if at.small:
        marked, arguments = [ROOT / "tests/kernels/test_topk.py"], ["-k", "not triton and bfloat16"]
    report = workers.run(
        marked,
        at.out / "tests",
        root=ROOT,
        arguments=arguments,
        workers=1 if at.small else max(1, min(14, (os.cpu_count() or 2) - 2)),
        limit=min(120.0, at.left / 2),
        seconds=at.left - 3,
        environment={"OMP_NUM_THREADS": "1"},
    )
    red = [{**result, "text": result["text"][-500:]} for result in report.of("failed", "died", "cut")]
    counts = {"passed": len(report.of("passed")), "not_begun": len(report.of("not begun"))}
    at.tell(report=str(report), red=red, **counts, **({"error": report.error} if report.error else {}))
    if not at.small:
        _slowest(at, report.results)


def _slowest(at: Context, results: list[dict[str, Any]]) -> None:
    longest = sorted(results, key=lambda result: -result["seconds"])[:20]
    at.tell(slowest=[[result["seconds"], Path(result["id"]).name] for result in longest])

"""How fast: what has to be compiled, and every op beside the limits of the hardware."""

import importlib.util
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

from runner import ROOT, Context

# op: shape and tokens on a GPU, and on a CPU
MICRO = {
    "attention": (("v4-flash", "4096"), ("2x16x8x4x4x8", "64")),
    "moe_experts": (("main", "8192"), ("32x16x6x3", "40")),
    "hyper": (("v4-flash", "8192"), ("24x3", "50")),
    "exact_linear": (("v4-flash,router", "4096"), ("24x5", "70")),
    "cross_entropy": (("v4-flash", "4096"), ("24x100", "64")),
    "index_topk": (("v4-flash", "4096,16384"), ("2x16x8x4x2x16x8", "64")),
    "index_loss": (("v4-flash", "4096"), ("2x16x8x4x2x16x8", "64")),
    "newton_schulz": (("v4-flash", "16"), ("40x24", "3")),
    "norm_rope": (("v4-flash", "8192"), ("3x16x6", "64")),
    "pool": (("v4-flash", "8192"), ("16x4x32", "64")),
    "moe_route": (("main", "8192"), ("32x16x6x3", "40")),
    "engram": (("toy", "8192"), ("40x3x2x2x8x500", "64")),
    "quant": (("v4-flash", "8192"), ("256x64", "30")),
}


def micro(at: Context) -> None:
    """Every op, forward and backward, beside eager's results and the limits, with the clocks."""
    from abyssal.train.measure.bench.run import run

    for op in at.items(list(MICRO)):
        shape, tokens = MICRO[op][at.small]
        given: dict[str, Any] = {"repeats": 1, "patience": 0.1} if at.small else {"repeats": 20, "patience": 2.0}
        began = time.time()
        try:
            path = run(
                op, shape=shape, tokens=tokens, device=at.device, out=at.out / "benchmarks", tests=False, others=False,
                drawn=False, **given,
            )  # fmt: skip
        except Exception as error:  # the next op runs all the same
            at.tell(op=op, error=f"{type(error).__name__}: {error}"[:500])
            if "CUDA error" in str(error):
                raise
            continue
        at.tell(op=op, file=path.name, seconds=time.time() - began)


# compiling ahead -----------------------------------------------------------------------------------------------------

TESTS = 950  # specialisations of the tests that want a GPU, which their workers compile: 890 counted on meta tensors,
# where 49 of 285 tests stop early


def compile(at: Context) -> None:
    """What `small` and the benchmarks launch, compiled on all cores before anything runs."""
    target = os.environ["FIRST_CONTACT_TARGET"]
    if not importlib.util.find_spec("triton"):
        at.tell(note="not run: triton is not installed")
        return
    cores = os.cpu_count() or 1
    before, began = entries(), time.time()
    with standing_in(target) as counted:
        for item in at.items(["norm_rope"] if at.small else ["train", "decode", *MICRO]):
            try:
                _launch(item)
            except Exception as error:
                at.tell(item=item, error=f"{type(error).__name__}: {error}"[:500])
        at.tell(specialisations=len(counted.calls), launching_seconds=time.time() - began)
        with multiprocessing.get_context("fork").Pool(cores, initializer=_remember, initargs=(counted.calls,)) as pool:
            began, done, spent = time.time(), 0, 0.0
            for name, seconds, error in pool.imap_unordered(_compiled, range(len(counted.calls))):
                done, spent = done + 1, spent + seconds
                if error:
                    at.tell(kernel=name, error=error)
                if done % 20 == 0 or done == len(counted.calls):
                    row = {"compiled": done, "cpu_seconds": round(spent, 1), "seconds": round(time.time() - began, 1)}
                    at.tell(target=target, **row, new_entries=len(entries() - before), folder=cache())


def cache() -> str:
    return os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton/cache")


def entries() -> set[str]:
    """Compiled kernels and launchers, by their keys."""
    folder = Path(cache())
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def standing_in(target: str) -> Any:
    """Meta tensors stand for CUDA ones (tests/support/counting.py); what would be compiled is noted."""
    sys.path[:0] = [str(ROOT / "tests/support")]
    import counting
    from triton.runtime.jit import JITFunction

    global _do_compile
    _do_compile = JITFunction._do_compile
    return counting.gpu(target)


_do_compile: Any = None
_calls: list[Any] = []


def _remember(calls: list[Any]) -> None:
    _calls[:] = calls


def _compiled(number: int) -> tuple[str, float, str]:
    """Name, seconds of a core with its children's, error."""
    began, call, error = sum(os.times()[:4]), _calls[number], ""
    try:
        _do_compile(*call)
    except Exception as found:
        error = f"{type(found).__name__}: {found}"[:300]
    return call[0].__name__, sum(os.times()[:4]) - began, error


def _launch(item: str) -> None:
    """Launches as on a GPU, of which nothing is executed."""
    if item == "train":
        _train_step("small", 8, 2048)
    elif item == "decode":
        for batch in (1, 8):
            _decode_steps("small", batch, 1024, 8)
    else:
        _bench(item)


def _train_step(name: str, rows: int, length: int) -> None:
    import torch

    from abyssal.model import ModelConfig, Transformer

    with torch.device("meta"):
        model = Transformer(ModelConfig.load(name)).train()
        ids = torch.zeros(rows, length, dtype=torch.int64)
    with torch.autocast("meta", torch.bfloat16):
        out = model(ids, targets=ids, documents=ids)
    out.loss.backward()


def _decode_steps(name: str, batch: int, prompt: int, new: int) -> None:
    import torch

    from abyssal.model import ModelConfig, Transformer

    with torch.device("meta"):
        model = Transformer(ModelConfig.load(name)).to(torch.bfloat16).eval()
        cache = model.new_cache(batch, prompt + new)
        ids = torch.zeros(batch, prompt, dtype=torch.int64)
    with torch.no_grad():
        model(ids, cache=cache, logits_to_keep=1)
        for _ in range(new):
            _ = model(ids[:, :1], cache=cache).logits


def _bench(op: str) -> None:
    """Triton's contender in each of the op's tasks, forward and as a training step."""
    import torch
    from torch.overrides import TorchFunctionMode

    from abyssal.train.measure.bench import run
    from abyssal.train.measure.bench.task import Setting

    class Drawn(TorchFunctionMode):
        """Nothing is drawn on a device that holds no numbers."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = {name: value for name, value in (kwargs or {}).items() if name != "generator"}
            return func(*args, **kwargs)

    class Nowhere(torch.Generator):
        device = meta = torch.device("meta")

    class There(Setting):
        def generator(self) -> Any:
            return Nowhere()

    shape, tokens = MICRO[op][0]
    module = run.load(op)
    for n in map(int, tokens.split(",")):
        with Drawn():
            tasks = module.tasks(There(module.shapes[shape], n, torch.bfloat16, Nowhere.meta, next(iter(module.data))))
        for task in tasks:
            triton = next(c.run for c in task.contenders if c.name == "triton")
            if triton is None:
                continue
            with torch.no_grad():
                triton(*task.inputs.values())
            if task.learned:
                given = [x.detach().requires_grad_(name in task.learned) for name, x in task.inputs.items()]
                out = triton(*given)[0]
                torch.autograd.grad(out, [x for x in given if x.requires_grad], torch.empty_like(out))

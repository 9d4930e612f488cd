"""How far a training pass under bfloat16 autocast is from float32's, on a CPU: losses, and the angle of each gradient.

    python tests/support/half.py small 1 256        one row of our own source; every tensor below 0.999, and how many
    python tests/support/half.py small 1 256 20     the same after 20 steps in float32

A choice that rounding turns (an expert, an entry) changes whole rows of a gradient: not an error of a product, but
another function. `same_choices` makes the second pass choose as the first did; both are told.

Third, what nothing can be better than: float32 throughout, where mHC alone reads streams that were rounded to bfloat16.
Streams that hardly differ give its last collapse a gradient that is the small difference of large numbers.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from abyssal.model import ModelConfig, Transformer  # noqa: E402
from abyssal.model.hyper import HyperConnection, HyperHead  # noqa: E402
from abyssal.model.routing import record_picks, record_routing, replay_picks, replay_routing  # noqa: E402


class Compared(NamedTuple):
    """Of float32 and bfloat16: losses, and the cosine of each parameter's gradients."""

    losses: dict[str, tuple[float, float]]
    cosines: dict[str, float]


def compare(
    model: Transformer, ids: Tensor, targets: Tensor, same_choices: bool, streams_alone: bool = False
) -> Compared:
    """A pass in each dtype over ids [b, t]; with `streams_alone` nothing else is in bfloat16."""
    with record_routing(model) as routes, record_picks(model) as picks:
        losses, want = _pass(model, ids, targets, enabled=False)
    experts, entries = ({n: taken[0] for n, taken in found.items() if same_choices} for found in (routes, picks))
    with replay_routing(model, experts), replay_picks(model, entries), _rounded(model, streams_alone):
        others, got = _pass(model, ids, targets, enabled=not streams_alone)
    cosines = {name: torch.cosine_similarity(want[name], got[name], 0).item() for name in want}
    return Compared({name: (losses[name], others[name]) for name in losses}, cosines)


def _pass(
    model: Transformer, ids: Tensor, targets: Tensor, enabled: bool
) -> tuple[dict[str, float], dict[str, Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        out = model(ids, targets=targets)
    out.loss.backward()
    grads = {n: p.grad.flatten().double() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.item(), **{name: x.item() for name, x in out.losses.items()}}, grads


@contextmanager
def _rounded(model: Transformer, enabled: bool):
    """What mHC reads is rounded, its gradient and the streams that go on are not."""
    passing: dict[torch.nn.Module, Tensor] = {}

    def rounded(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        passing[module] = streams = args[0]
        return (streams + (streams.bfloat16().float() - streams).detach(), *args[1:])

    def passed(module: torch.nn.Module, _: tuple[Tensor, ...], output: Any) -> Any:
        streams = passing.pop(module)
        return (output[0], output[1]._replace(streams=streams)) if isinstance(module, HyperConnection) else output

    readers = [module for module in model.modules() if isinstance(module, (HyperConnection, HyperHead))] * enabled
    hooks = [module.register_forward_pre_hook(rounded) for module in readers]
    hooks += [module.register_forward_hook(passed) for module in readers]
    yield
    for hook in hooks:
        hook.remove()


def _trained(model: Transformer, batches: Tensor) -> None:
    """A step of AdamW for each of batches [steps, b, t + 1], warmed up over ten."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, batch in enumerate(batches, 1):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, step / 10)
        optimizer.zero_grad()
        model(batch[:, :-1].contiguous(), targets=batch[:, 1:].contiguous()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.update_router_bias()


def main(name: str, rows: int, length: int, steps: int = 0) -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig.load(name)).train()
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "train").glob("**/*.py")))
    batches = torch.tensor(list(text[: (steps + 1) * rows * (length + 1)])).view(steps + 1, rows, -1)
    _trained(model, batches[:steps])
    data = batches[steps]
    for same, streams_alone in ((False, False), (True, False), (True, True)):
        found = compare(model, data[:, :-1].contiguous(), data[:, 1:].contiguous(), same, streams_alone)
        near = sum(cosine > 0.999 for cosine in found.cosines.values())
        what = "streams alone rounded" if streams_alone else f"choices of float32: {same}"
        print(f"{what}; losses {found.losses}; {near} of {len(found.cosines)} above 0.999")
        for cosine, tensor in sorted((cosine, tensor) for tensor, cosine in found.cosines.items() if cosine <= 0.999):
            print(f"  {cosine:.5f} {tensor}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

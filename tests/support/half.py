"""How far a training pass under bfloat16 autocast is from float32's, on a CPU: losses, and the angle of each gradient.

    python tests/support/half.py small 1 256        rows of Python's own source; every tensor below 0.999, and how many

A choice that rounding turns (an expert, an entry) changes whole rows of a gradient: not an error of a product, but
another function. `same_choices` makes the second pass choose as the first did; both are told.
"""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from abyssal.model import ModelConfig, Transformer  # noqa: E402
from abyssal.model.routing import record_routing, replay_routing  # noqa: E402

attention_module = importlib.import_module("abyssal.model.attention")


class Compared(NamedTuple):
    """Of float32 and bfloat16: losses, and the cosine of each parameter's gradients."""

    losses: dict[str, tuple[float, float]]
    cosines: dict[str, float]


def compare(model: Transformer, ids: Tensor, targets: Tensor, same_choices: bool) -> Compared:
    """A pass in each dtype over ids [b, t]."""
    picks: list[Tensor] = []
    with record_routing(model) as routes, _picks(picks, replay=False):
        losses, want = _pass(model, ids, targets, enabled=False)
    chosen = {layer: taken[0] for layer, taken in routes.items()} if same_choices else {}
    with replay_routing(model, chosen), _picks(picks, replay=same_choices):
        others, got = _pass(model, ids, targets, enabled=True)
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
def _picks(kept: list[Tensor], replay: bool):
    """Keeps what index_topk gives, or gives what was kept."""
    real, left = attention_module.index_topk, iter(list(kept))

    def topk(*args: Tensor, **kwargs: Tensor) -> Tensor:
        if replay:
            return next(left)
        kept.append(real(*args, **kwargs))
        return kept[-1]

    with patch.object(attention_module, "index_topk", topk):
        yield


def main(name: str, rows: int, length: int) -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig.load(name)).train()
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "train").glob("**/*.py")))
    data = torch.tensor(list(text[: rows * (length + 1)])).view(rows, -1)
    for same in (False, True):
        found = compare(model, data[:, :-1].contiguous(), data[:, 1:].contiguous(), same)
        near = sum(cosine > 0.999 for cosine in found.cosines.values())
        print(f"choices of float32: {same}; losses {found.losses}; {near} of {len(found.cosines)} above 0.999")
        for cosine, tensor in sorted((cosine, tensor) for tensor, cosine in found.cosines.items() if cosine <= 0.999):
            print(f"  {cosine:.5f} {tensor}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

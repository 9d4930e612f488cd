"""What of the router is compiled ahead of time: see aot.py."""

from collections.abc import Callable

import torch


def route(e: int, k: int) -> None:
    """Router forward and backward, the expert order, and the balance with its gradient."""
    from abyssal.kernels.moe_route.triton import launch

    scores, ids, weights = launch.route(torch.empty(4096, e), torch.empty(e), None, k, 1.5)
    launch.route_backward(scores, weights, scores, ids, 1.5, torch.float32)
    for real in (None, torch.ones(4096, dtype=torch.bool)):
        launch.permutation(ids, e, real)
        real = None if real is None else real[None]
        loss, _, slopes, share = launch.balance(scores[None], ids[None], real)
        launch.balance_backward(loss, scores[None], real, slopes, share)


MAIN = ["sm_80", "sm_90", "sm_100"]
PRODUCTS: set[str] = set()
CASES: dict[str, tuple[list[str], Callable[[], None]]] = {
    "route, E=128 K=8": (MAIN, lambda: route(128, 8)),
    "route, E=256 K=6": ([*MAIN, "sm_89", "sm_120", "gfx942"], lambda: route(256, 6)),
    "route, E=384 K=6": (["sm_90"], lambda: route(384, 6)),
}

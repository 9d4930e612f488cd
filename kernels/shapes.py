"""What a tensor's shape must be, said by name."""

from torch import Tensor


def check_shape(name: str, x: Tensor, *sizes: int | str) -> None:
    """Raises ValueError where x has another shape; a word stands for any size."""
    if x.ndim != len(sizes) or any(not isinstance(n, str) and own != n for own, n in zip(x.shape, sizes)):
        raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be [{', '.join(map(str, sizes))}]")


def check_bounds(b: int, t: int, **bounds: Tensor | None) -> None:
    """Raises ValueError where one is not [b|1, t]."""
    for name, x in bounds.items():
        if x is not None and (x.ndim != 2 or x.shape[0] not in (1, b) or x.shape[1] != t):
            raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be [{b} or 1, {t}]")

"""Abyssal: the DeepSeek-V4 architecture, readable and measurable. The packages lie in model/, kernels/, train/ and
configs/.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

_here = _Path(__file__).resolve().parent
if not (_here / "model").is_dir():  # a checkout: the packages lie beside this folder; in a wheel they lie inside it
    __path__.append(str(_here.parent))

from . import moved as _moved  # noqa: E402

_moved.install()

"""Operations on tensors: one folder per op, with its public function, its PyTorch reference and (where there is one)
its Triton twin.
"""

if (
    __name__ == "kernels"
):  # the repository root is on sys.path: hand over to PyPI's `kernels`, which transformers probes for
    import importlib.machinery as _machinery
    import importlib.util as _util
    import os as _os
    import sys as _sys

    _root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
    _spec = _machinery.PathFinder.find_spec("kernels", [p for p in _sys.path if _os.path.abspath(p or ".") != _root])
    if _spec is None or _spec.loader is None:
        __file__ = None  # type: ignore[assignment]  # an empty namespace package, as far as transformers can tell
    else:
        _sys.modules["kernels"] = _module = _util.module_from_spec(_spec)
        _spec.loader.exec_module(_module)

"""Operations on tensors, one folder per op: the public function, its definition, its engines."""

# With the repository root on sys.path this file is found as `kernels`, the name of PyPI's package, which transformers
# probes for: then hand over to that one, or look like an empty namespace package.
if __name__ == "kernels":
    import importlib.machinery as _machinery
    import importlib.util as _util
    import os as _os
    import sys as _sys

    _root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
    _spec = _machinery.PathFinder.find_spec("kernels", [p for p in _sys.path if _os.path.abspath(p or ".") != _root])
    if _spec is None or _spec.loader is None:
        __file__ = None  # type: ignore[assignment]
    else:
        _sys.modules["kernels"] = _module = _util.module_from_spec(_spec)
        _spec.loader.exec_module(_module)
else:
    from .attention import attention
    from .cross_entropy import cross_entropy
    from .engram import (
        compress_vocabulary,
        engram_gate,
        engram_gather,
        engram_hash,
        engram_multipliers,
        engram_primes,
    )
    from .exact_linear import exact_linear
    from .hyper import (
        Coefficients,
        hyper_branch,
        hyper_coefficients,
        hyper_collapse,
        hyper_head_weights,
        hyper_read,
        hyper_recombine,
    )
    from .index_loss import index_loss
    from .index_topk import index_topk
    from .moe_experts import moe_experts, swiglu
    from .moe_route import Balance, Permutation, Routing, balance_loss, moe_balance, moe_permutation, moe_route
    from .newton_schulz import newton_schulz, newton_schulz_many
    from .norm_rope import norm_rope, rms_norm, rope, rope_frequencies, rope_rotation
    from .pool import pool
    from .quant import dequantize, e2m1_to_e4m3, fake_quant, hadamard, quantize
    from .topk import stable_topk

    __all__ = [
        "Balance",
        "Coefficients",
        "Permutation",
        "Routing",
        "attention",
        "balance_loss",
        "compress_vocabulary",
        "cross_entropy",
        "dequantize",
        "e2m1_to_e4m3",
        "engram_gate",
        "engram_gather",
        "engram_hash",
        "engram_multipliers",
        "engram_primes",
        "exact_linear",
        "fake_quant",
        "hadamard",
        "hyper_branch",
        "hyper_coefficients",
        "hyper_collapse",
        "hyper_head_weights",
        "hyper_read",
        "hyper_recombine",
        "index_loss",
        "index_topk",
        "moe_balance",
        "moe_experts",
        "moe_permutation",
        "moe_route",
        "newton_schulz",
        "newton_schulz_many",
        "norm_rope",
        "pool",
        "quantize",
        "rms_norm",
        "rope",
        "rope_frequencies",
        "rope_rotation",
        "stable_topk",
        "swiglu",
    ]

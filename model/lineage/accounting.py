"""What V3 and V3.2 cost, in the terms of `model.accounting`: parameters, FLOPs per token, cache bytes.

    parameters   MLA  d q + q + q H (n + r) + d (c + r) + c + c H (n + v) + H v d
                 DSA  q H_I c_I + d c_I + 2 c_I + d H_I
    FLOPs        2 A + index + core;  core = 2 H (2 c + r) keys, absorbed;  index = 2 H_I c_I context
    cache        per token and layer 2 (c + r) bytes in V3, (c + 4 c / 128 + 2 r) + (c_I + 4) in V3.2, as released

Sources: V3 2.1, V3.2 2.1, spec A.2 and D.

d hidden · H heads of n + r and values of v · q query rank · c latent · H_I index heads of c_I · E experts of width w
"""

from ..accounting import Account, Cache, Flops
from .config import LineageConfig


def account(config: LineageConfig, context: int = 0) -> Account:
    """Parameters, FLOPs per token and cache bytes at a context. Raises ValueError if it is negative."""
    if context < 0:
        raise ValueError(f"context={context}: allowed are token counts >= 0")
    parameters = _parameters(config)
    moe_layers = config.num_hidden_layers - config.dense_layers
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = moe_layers * (config.n_routed_experts - config.num_experts_per_tok) * expert
    activated = sum(parameters.values()) - idle - parameters["embedding"]
    layers, values = config.num_hidden_layers, {"float64": 8, "float32": 4}.get(config.torch_dtype, 2)
    plain = layers * values * (config.kv_lora_rank + config.qk_rope_head_dim + (config.index_head_dim or 0))
    return Account(
        context=context,
        parameters={name: size for name, size in parameters.items() if size},
        mtp={},
        buffers={"gate bias": moe_layers * config.n_routed_experts},
        activated=activated,
        mtp_activated=0,
        flops=flops(config, activated, context),
        cache=Cache(context, per_token=layers * _released_bytes(config), windows=0, state=0),
        plain_cache=Cache(context, per_token=plain, windows=0, state=0),
    )


def flops(c: LineageConfig, activated: int, context: int) -> Flops:
    """Of one token that sees `context` tokens, decoded: latent attention absorbed."""
    index = 0
    keys = context
    if c.sparse:
        index = 2 * (c.index_n_heads or 0) * (c.index_head_dim or 0) * context * c.num_hidden_layers
        keys = min(c.index_topk or 0, context)
    core = 2 * c.num_attention_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim) * keys * c.num_hidden_layers
    return Flops(2 * activated, index, core, fp8=2 * activated + index + 2 * core)


def _parameters(c: LineageConfig) -> dict[str, int]:
    d, h, layers = c.hidden_size, c.num_attention_heads, c.num_hidden_layers
    n, r, v, rank, latent = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.q_lora_rank, c.kv_lora_rank
    attention = d * rank + rank + rank * h * (n + r) + d * (latent + r) + latent + latent * h * (n + v) + h * v * d
    heads, width = c.index_n_heads or 0, c.index_head_dim or 0
    dense = c.dense_layers
    expert = 3 * d * c.moe_intermediate_size
    return {
        "embedding": c.vocab_size * d,
        "head": c.vocab_size * d,
        "norms": (2 * layers + 1) * d,
        "attention": layers * attention,
        "indexer": layers * (rank * heads * width + d * width + 2 * width + d * heads),
        "dense layers": dense * 3 * d * c.intermediate_size,
        "routed experts": (layers - dense) * c.n_routed_experts * expert,
        "shared experts": (layers - dense) * c.n_shared_experts * expert,
        "gates": (layers - dense) * c.n_routed_experts * (d + 1),
    }


def _released_bytes(c: LineageConfig) -> int:
    """Of a token in a layer: bfloat16 in V3; in V3.2 E4M3, a float32 scale per 128, and bfloat16 rotary channels."""
    if not c.sparse:
        return 2 * (c.kv_lora_rank + c.qk_rope_head_dim)
    latent = c.kv_lora_rank + 4 * -(-c.kv_lora_rank // 128) + 2 * c.qk_rope_head_dim
    width = c.index_head_dim or 0
    return latent + width + 4 * -(-width // 128)

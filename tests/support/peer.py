"""transformers' DeepSeek-V4 as the peer: models of any small shape, with every parameter drawn, not only the
matrices.
"""

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

KINDS = {0: "sliding_attention", "csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}
PEER_LAYERS = (0, 0, "csa", "hca", "csa", "hca")


def peer_config(layers=PEER_LAYERS, m=4, heavy=32, yarn=None, **changes) -> DeepseekV4Config:
    """The peer shape of the design notes; `layers` lists 0, "csa" or "hca", `yarn` = (factor, original length)."""
    shape = {
        "vocab_size": 512,
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_attention_heads": 4,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 64,
        "num_experts_per_tok": 4,
        "n_routed_experts": 16,
        "num_hash_layers": 2,
        "sliding_window": 32,
        "o_groups": 2,
        "o_lora_rank": 32,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 32,
        **changes,
    }
    if yarn is not None:
        shape["rope_parameters"] = {
            "rope_type": "yarn", "factor": yarn[0], "original_max_position_embeddings": yarn[1],
            "beta_fast": 32, "beta_slow": 1,
        }  # fmt: skip
    return DeepseekV4Config(
        **shape,
        num_hidden_layers=len(layers),
        layer_types=[KINDS[kind] for kind in layers],
        compress_rates={KINDS["csa"]: m, KINDS["hca"]: heavy},
        experts_implementation="grouped_mm",
        attn_implementation="eager",
    )


def make_peer(config: DeepseekV4Config, seed: int = 0) -> DeepseekV4ForCausalLM:
    """A peer whose norms, sinks, biases, position biases, mHC constants and hash tables are random too."""
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "tid2eid" in name:
                rows = torch.rand(config.vocab_size, config.n_routed_experts).argsort(-1)
                tensor.copy_(rows[:, : config.num_experts_per_tok])
            elif "inv_freq" in name:
                continue
            elif tensor.ndim == 1 or "position_bias" in name:
                tensor.add_(0.3 * torch.randn_like(tensor))
            elif "fn" not in name:
                tensor.mul_(2.0)
    return model

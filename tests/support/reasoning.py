"""Overrides that make a run of the reasoning recipes one of seconds; the indexer has two entries and may pick one."""

TINY = [
    *("model.hidden_size=32", "model.num_attention_heads=2", "model.head_dim=16", "model.qk_rope_head_dim=8"),
    *("model.q_lora_rank=16", "model.o_lora_rank=8", "model.moe_intermediate_size=16", "model.n_routed_experts=8"),
    *("model.num_hidden_layers=2", "model.compress_ratios=[0,4]", "model.sliding_window=8"),
    *("model.index_n_heads=2", "model.index_head_dim=16", "model.index_topk=1", "model.hc_mult=2"),
    "model.router_bias_update_speed=0.5",
    "model.balance_loss_weight=1",
    *("reason.tasks=['addition-1','sorting-2']", "reason.max_new_tokens=6", "reason.exam_problems=2"),
    *("train.steps=4", "train.eval_every=2", "train.checkpoint_every=0", "train.device=cpu"),
]

"""The same weights in transformers' DeepseekV4ForCausalLM and here: logits and every gradient, through
`load_pretrained`.
"""

import pytest
import torch
from oracle import assert_same

pytest.importorskip("transformers")

from peer import make_peer, peer_config

from abyssal.model import load_pretrained

# index heads >= 16: no exact-zero ties, whose order transformers leaves open
INDEX = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 6}
SMALL = {
    "vocab_size": 97, "hidden_size": 48, "moe_intermediate_size": 24, "head_dim": 24, "qk_rope_head_dim": 8,
    "q_lora_rank": 20, "num_experts_per_tok": 3, "n_routed_experts": 8, "sliding_window": 16, "o_lora_rank": 12,
    "num_hash_layers": 1, **INDEX,
}  # fmt: skip
CASES = {
    "all-kinds": (dict(layers=(0, "csa", "hca", "csa"), heavy=32, **SMALL), (77, 1, 2, 3)),
    "4-128-long": (dict(layers=("hca", "csa", "hca"), heavy=128, **SMALL), (700, 127, 128, 129, 257)),
    "yarn": (dict(layers=(0, "csa", "hca"), yarn=(16, 64), **SMALL), (333,)),
    "all-hashed": (dict(layers=(0, "csa"), **{**SMALL, "num_hash_layers": 2}), (65,)),
    "no-hash-two-streams": (dict(layers=("csa", "hca"), hc_mult=2, **{**SMALL, "num_hash_layers": 0}), (131,)),
    "clamps-reached": (dict(layers=(0, "csa", "hca"), swiglu_limit=0.05, **SMALL), (90,)),
    "one-group-six-heads": (dict(layers=("hca", "csa"), **{**SMALL, "num_attention_heads": 6, "o_groups": 1}), (51,)),
    "every-expert": (dict(layers=("csa",), **{**SMALL, "num_experts_per_tok": 8}), (41,)),
    "peer-shape": (dict(**{**INDEX, "index_topk": 32}), (401,)),
}


@pytest.fixture(scope="module", params=CASES, ids=CASES)
def pair(request, tmp_path_factory):
    """The peer, our model with its weights, and the lengths to try. Odd cases are saved in transformers' other
    layout.
    """
    options, lengths = CASES[request.param]
    peer = make_peer(peer_config(**options))
    folder = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(folder, save_original_format=list(CASES).index(request.param) % 2 == 0)
    return peer, load_pretrained(folder), lengths


def test_logits(pair):
    peer, ours, lengths = pair
    for t in lengths:
        ids = torch.randint(0, peer.config.vocab_size, (2, t), generator=torch.Generator().manual_seed(t))
        with torch.no_grad():
            difference = (ours(ids).logits - peer(ids, use_cache=False).logits).abs().max()
        assert difference <= 5e-5, f"t={t}: {difference:.1e}"


def test_gradients(pair, tmp_path):
    """Compared as checkpoints: the peer's gradients are written with its names and read back through our loader."""
    peer, ours, lengths = pair
    ids = torch.randint(0, peer.config.vocab_size, (2, lengths[0]), generator=torch.Generator().manual_seed(7))
    weight = torch.randn(2, lengths[0], peer.config.vocab_size, generator=torch.Generator().manual_seed(8))
    (peer(ids, use_cache=False).logits * weight).sum().backward()
    ours.zero_grad()
    (ours(ids).logits * weight).sum().backward()
    with torch.no_grad():
        reached = {n for n, p in peer.named_parameters() if p.grad is not None}
        assert all(".indexer." in n for n, _ in peer.named_parameters() if n not in reached)
        kept = {n: p.detach().clone() for n, p in peer.named_parameters()}
        for p in peer.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        peer.save_pretrained(tmp_path)
        for n, p in peer.named_parameters():
            p.copy_(kept[n])
            p.grad = None
    want = dict(load_pretrained(tmp_path).named_parameters())
    assert all(p.grad is None for name, p in ours.named_parameters() if ".indexer." in name)
    for name, gradients in by_tensor({n: p.grad for n, p in ours.named_parameters() if ".indexer." not in n}).items():
        assert_same(name, torch.cat(gradients), torch.cat(by_tensor(want)[name]), 1e-4)


def by_tensor(tensors: dict) -> dict[str, list]:
    """Flat tensors by name; a handful of scalars (mHC scales), whose gradients are sums that nearly cancel, joins its
    module's.
    """
    groups = {}
    for name, x in tensors.items():
        module = name.rpartition(".")[0]
        key = name if x.numel() > 4 or f"{module}.fn" not in tensors else f"{module}.fn"
        groups.setdefault(key, []).append(x.flatten())
    return groups

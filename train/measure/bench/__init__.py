"""Benchmarks: `abyssal bench [OP]`. One file of this folder per op; what they share:

task      what an op offers to be measured: inputs, contenders, the work that has to be done
ours      our own contenders, also those of another commit
peers     contenders from other libraries, where they are installed
base      the kernels of another commit
checks    the op's tests, before it is timed
measure   correctness first, then times in turn, then memory
clocks    at what clocks the machine runs
report    the table, the JSON, and what they say about machine and versions
draw      the picture, from that JSON alone

A new op is a file with a `task.Op` named OP, and a line in OPS.
"""

OPS = {
    "moe_experts": "Routed experts, against torch's and transformers'",
    "moe_route": "The choice of experts and their order, against torch's",
    "attention": "Sliding, sparse and heavily compressed attention, against torch's, attn-gym's and transformers'",
    "index_topk": "Index scores with top-k, and top-k alone, against torch's and other libraries'",
    "index_loss": "The loss that teaches the indexer, against torch's",
    "pool": "The compressor's pooling, against torch's",
    "norm_rope": "Norm and rotation of queries, keys and entries, against torch's",
    "exact_linear": "The router's and compressors' linear layers in float32, against torch's",
    "hyper": "An mHC site, forward and backward, against transformers'",
    "engram": "Engram's hash, its look-up and its gate, against torch's",
    "cross_entropy": "The language model's head with its loss, against torch's",
    "newton_schulz": "Muon's orthogonalisation, against torch's",
    "quant": "The released number formats and the Hadamard rotation, against torch's",
}
ALIASES = {  # earlier names, of several ops each
    "moe": ("moe_experts", "moe_route"),
    "indexer": ("index_topk", "index_loss"),
    "compressor": ("pool", "norm_rope"),
    "loss": ("cross_entropy",),
}

"""Benchmarks: `abyssal bench OP`. One file of this folder per op; what they share:

task      what an op offers to be measured: inputs, contenders, the work that has to be done
measure   correctness first, then times in turn, then memory
report    the table, the JSON, and what they say about machine and versions
draw      the picture, from that JSON alone
peers     contenders from other libraries, where they are installed

A new op is a file with a `task.Op` named OP, and a line in OPS.
"""

OPS = {"moe": "Routed experts and their routing, against torch's and transformers'"}

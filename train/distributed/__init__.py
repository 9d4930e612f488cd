"""Training on several processes: torch's own FSDP2, distributed tensors, all-to-all and distributed checkpoints.

world       the processes: who is who, sums over all, what rank 0 decides
shard       parameters, gradients and moments in equal parts; the norm of a gradient in parts
experts     each process has some of the experts, and tokens travel to them
checkpoint  every process writes its part; any number of processes reads them

    torchrun --nproc-per-node 2 -m abyssal.train train nano --set train.expert_parallel=2
"""

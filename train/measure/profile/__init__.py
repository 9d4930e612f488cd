"""`abyssal profile`: where a training step and a decode step spend their time and memory, mechanism by mechanism.

mechanisms  the names, and which module and which function belongs to which
observe     follows the mechanism at work: in the forward pass by hooks, in the backward pass by autograd's nodes
clock       time from one change of mechanism to the next: the parts add up to the step
memory      what each mechanism keeps for the backward pass
trace       the same ranges in a chrome trace, and the time of the GPU's kernels in each
limits      what each mechanism has to compute and to move
steps       the two steps, as training and generation run them
run         from the options to the files;  report, draw: the tables and the picture
"""

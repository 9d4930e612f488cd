"""Training: data, loop, checkpoints, metrics, plots and the command line."""

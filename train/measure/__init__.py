"""What things cost: ops against peers, steps by mechanism, long contexts, and the limits of the hardware."""

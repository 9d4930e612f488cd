"""Studies of reasoning: chains of runs with seeds, one examination for all, paired differences and verdicts."""

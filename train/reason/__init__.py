"""Reasoning at toy scale: visible working learnt from examples (SFT), then sharpened by verifiable rewards (GRPO)."""

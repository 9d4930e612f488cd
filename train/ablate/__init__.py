"""Ablations: named experiments of a baseline and one change, with seeds, spread and a computed verdict."""

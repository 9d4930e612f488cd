"""A training run: steps, what they leave behind, what is watched, how it goes on after a stop."""

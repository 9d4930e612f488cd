"""Recipes (TOML: model, data, optim, train) and the released model configurations (JSON), as data."""

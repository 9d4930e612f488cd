"""Small models in which every mechanism moves the logits, as training would make it."""

import torch

from abyssal.model import ModelConfig, Transformer


def lively(name: str = "nano", seed: int = 0, **changes) -> Transformer:
    """A shipped configuration with changes; norms, sinks, biases and constants drawn too, matrices doubled.

    No token ends a text, unless the changes say so.
    """
    torch.manual_seed(seed)
    shipped = {**ModelConfig.load(name).to_dict(), "eos_token_id": None}
    model = Transformer(ModelConfig.from_dict({**shipped, **changes})).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 or parameter_name.endswith(("ape", "conv")):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif not parameter_name.endswith("fn"):
                parameter.mul_(2)
    return model


def draw_ids(*shape: int, seed: int = 0, top: int = 260) -> torch.Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed))

"""A model together with the tokenizer that it was trained with: what can be talked to."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .tokenizers import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from ..model import Transformer

CONTEXT = 32_768  # tokens of a conversation, unless the model has fewer or the user asks for another number


@dataclass(frozen=True)
class Voice:
    """A model with its tokenizer, and the most tokens that a conversation may have."""

    model: "Transformer"
    tokenizer: Tokenizer
    name: str
    context: int

    def check_chat(self) -> None:
        """Raises ValueError if the model's vocabulary has no room for the chat format's special tokens."""
        vocabulary, needed = self.model.config.vocab_size, max(self.tokenizer.special.values()) + 1
        if vocabulary < needed:
            raise ValueError(
                f"{self.name}: its vocabulary of {vocabulary} has no room for the chat format's special tokens; "
                f"train with model.vocab_size={self.tokenizer.vocab_size}"
            )


def open_voice(
    path: Path, tokenizer: str | None = None, context: int | None = None, device: str = "auto", name: str | None = None
) -> Voice:
    """The model of a run, of a checkpoint, or of a folder with config.json and safetensors, ready to speak.

    Args:
        tokenizer: "bytes" or a path; None = the run's, or the folder's tokenizer.json.
        context: tokens of a conversation; None = as many as the model has positions, at most `CONTEXT`.
        name: None = the folder's.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that says which tokenizer to take.
        ValueError: a context or a device that the model cannot have, a tokenizer that does not fit it.
    """
    from ..model import load_pretrained
    from . import checkpoint
    from .loop import choose_device, load_trained

    if (path / "config.json").is_file():
        if tokenizer is None and not (path / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{str(path)!r} has no tokenizer.json: say which tokenizer to take (--tokenizer)")
        model = load_pretrained(path, device=choose_device(device)).eval()
        return _voice(model, tokenizer or str(path), name or path.resolve().name, context)
    model, recipe = load_trained(path, device)
    folder = checkpoint.find(path).resolve()
    own = "bytes" if recipe.data.tokenizer == "bytes" else str(folder)
    return _voice(model, tokenizer or own, name or folder.parents[1].name, context)


def random_voice(
    preset: str, context: int | None = None, device: str = "auto", name: str | None = None, seed: int = 0
) -> Voice:
    """A shipped configuration with random weights and tokens of bytes: it writes nonsense, in the right form."""
    import torch

    from ..model import ModelConfig, Transformer
    from .loop import choose_device

    tokens = load_tokenizer("bytes")
    special = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
    shipped = ModelConfig.load(preset).to_dict()
    config = ModelConfig.from_dict({**shipped, **special, "vocab_size": tokens.vocab_size})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(config).to(choose_device(device)).eval()
    return _voice(model, "bytes", name or f"{preset}-random", context)


def _voice(model: "Transformer", tokenizer: str, name: str, context: int | None) -> Voice:
    longest = model.config.max_position_embeddings
    if context is not None and not 2 <= context <= longest:
        raise ValueError(f"context={context}: allowed are 2 to the model's max_position_embeddings={longest}")
    tokens = load_tokenizer(tokenizer)
    if tokens.bos >= model.config.vocab_size:
        raise ValueError(
            f"tokenizer={tokenizer!r}: it has {tokens.bos} tokens of text, the model a vocabulary of only "
            f"{model.config.vocab_size}"
        )
    return Voice(model, tokens, name, context or min(longest, CONTEXT))

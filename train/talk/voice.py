"""A model together with the tokenizer that it was trained with: what can be talked to."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.conversations import lacking
from ..data.tokenizers import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from ...model import Transformer
    from ..recipe import Recipe

CONTEXT = 32_768  # tokens of a conversation, unless the model has fewer or the user asks for another number


@dataclass(frozen=True)
class Voice:
    """A model with its tokenizer, and the most tokens that a conversation may have.

    `untaught`: it is of a run that saw texts and no conversations.
    """

    model: "Transformer"
    tokenizer: Tokenizer
    name: str
    context: int
    untaught: bool = False

    def check_chat(self) -> None:
        """Raises ValueError if the tokenizer lacks special tokens of the chat format, or the vocabulary has no room."""
        missing = lacking(self.tokenizer)
        if missing:
            raise ValueError(f"{self.name}: {missing}: it can go on with text")
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
        tokenizer: as for `load_tokenizer`; None = the run's, or the folder's.
        context: tokens of a conversation; None = as many as the model has positions, at most `CONTEXT`.
        name: None = the folder's.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a context or a device that the model cannot have, a tokenizer that does not fit it, or nothing that
            says how its tokens are spelt.
    """
    from ..run.load import open_model

    loaded = open_model(path, device, tokenizer)
    return _voice(loaded.model, loaded.spelling(), name or loaded.name, context, loaded.recipe)


def random_voice(
    preset: str, context: int | None = None, device: str = "auto", name: str | None = None, seed: int = 0
) -> Voice:
    """A shipped configuration with random weights and tokens of bytes: it writes nonsense, in the right form."""
    import torch

    from ...model import ModelConfig, Transformer
    from ..distributed.world import choose_device

    tokens = load_tokenizer("bytes")
    special = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
    shipped = ModelConfig.load(preset).to_dict()
    config = ModelConfig.from_dict({**shipped, **special, "vocab_size": tokens.vocab_size})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(config).to(choose_device(device)).eval()
    return _voice(model, tokens, name or f"{preset}-random", context)


def _voice(
    model: "Transformer", tokenizer: Tokenizer, name: str, context: int | None, recipe: "Recipe | None" = None
) -> Voice:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"name={name!r}: allowed are names in UTF-8") from None
    longest, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if context is not None and not 2 <= context <= longest:
        raise ValueError(f"context={context}: allowed are 2 to the model's max_position_embeddings={longest}")
    if max(tokenizer.least, tokenizer.eos + 1) > vocabulary:
        raise ValueError(
            f"tokenizer={tokenizer.name!r} has {len(tokenizer.pieces)} tokens of text and eos {tokenizer.eos}: {name} "
            f"has a vocabulary of {vocabulary}"
        )
    untaught = recipe is not None and not (recipe.reason or recipe.chat)
    return Voice(model, tokenizer, name, context or min(longest, CONTEXT), untaught)

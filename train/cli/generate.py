"""`abyssal generate`: text from a trained model."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from .options import Command, checkpoint_argument, flag, tokenizer_argument


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint_argument(parser)
    tokenizer_argument(parser)
    flag(parser, "--prompt", str, "", "text to continue", "'', the start of a document")
    flag(parser, "--max-new-tokens", int, 256, "tokens to write")
    flag(parser, "--temperature", float, 0.8, "divides the logits; 0 = always the likeliest")
    flag(parser, "--top-p", float, 0.95, "keep the likeliest tokens up to this probability; 1 = all")
    flag(parser, "--top-k", int, 0, "keep that many likeliest tokens; 0 = all")
    flag(parser, "--min-p", float, 0.0, "drop tokens below this share of the likeliest one's probability; 0 = none")
    flag(parser, "--seed", int, 0, "of the sampling")
    text = "end once this text is written; repeatable (str; default: the end of the document)"
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help=text)
    text = "guess a token ahead with the MTP module: the same distribution (default: off)"
    parser.add_argument("--speculative", action="store_true", help=text)
    text = "one CUDA graph for all tokens after the first: fewer launches (default: off; needs a GPU)"
    parser.add_argument("--graph", action="store_true", help=text)
    flag(parser, "--storage", str, "exact", "of the cache: exact, or released = FP8 entries and FP4 index keys")


def _generate(options: argparse.Namespace) -> None:
    import torch

    from ...model import generate
    from ...model.generation.generate import Generation
    from ..run.load import open_model
    from ..talk.terminal.visible import shown

    if "" in options.stop:
        raise ValueError("stop='': at least one character is needed")
    loaded = open_model(options.checkpoint, tokenizer=options.tokenizer)
    model, tokenizer = loaded.model, loaded.spelling()
    end = [] if model.config.eos_token_id is None else [model.config.eos_token_id]
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(options.prompt)]], device=next(model.parameters()).device)
    tokens = cast(
        Generation,
        generate(
            model,
            ids,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            seed=options.seed,
            stop=end,
            speculative=options.speculative,
            storage=options.storage,
            graph=options.graph,
            stream=True,
        ),
    )
    print(shown(options.prompt, sys.stdout), end="", flush=True)
    for text in _until(options.stop, tokenizer.decode_stream(map(int, tokens), continues=bool(options.prompt))):
        print(shown(text, sys.stdout), end="", flush=True)
    print()
    print(tokens.stats, file=sys.stderr)


def _until(stops: Sequence[str], pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text, up to where it first ends with one of `stops`, in whatever pieces that comes."""
    written = ""
    for piece in pieces:
        before, written = len(written), written + piece
        found = [(written.find(stop, max(0, before - len(stop) + 1)), stop) for stop in stops]
        ends = [place + len(stop) for place, stop in found if place >= 0]
        if ends:
            yield written[before : min(ends)]
            return
        yield piece


COMMANDS = {
    "generate": Command(
        _generate,
        _generate_arguments,
        "Write text with a trained model",
        "abyssal generate runs/toy-20260101-120000 --prompt 'import ' --max-new-tokens 200",
    )
}

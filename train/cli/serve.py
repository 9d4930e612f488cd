"""`abyssal serve`: a model behind an OpenAI-compatible address."""

import argparse

from .options import Command, flag
from .voices import voice, voice_arguments


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    voice_arguments(parser)
    flag(parser, "--name", str, None, "the model's id for clients", "the run's folder, or PRESET-random")
    flag(parser, "--host", str, "127.0.0.1", "address; any but this machine's own is open to others, without keys")
    flag(parser, "--port", int, 8000, "0 = a free one")
    flag(parser, "--queue", int, 64, "requests that may wait; more are turned away (429)")
    flag(parser, "--timeout", float, 300.0, "seconds for a request, waiting included")
    flag(parser, "--max-new-tokens", int, 1024, "tokens of an answer where the request names no number")
    flag(parser, "--max-body", float, 4.0, "MiB of a request")
    text = "think before answering where the request does not say (default: off)"
    parser.add_argument("--thinking", action="store_true", help=text)


def _serve(options: argparse.Namespace) -> None:
    try:
        import llguidance  # noqa: F401

        from ..talk.serve.app import Limits
        from ..talk.serve.run import is_local, serve
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"abyssal serve needs {error.name}: pip install 'abyssal[serve]'") from None
    limits = Limits(
        queue=options.queue,
        timeout=options.timeout,
        max_new_tokens=options.max_new_tokens,
        max_body=options.max_body * 2**20,
        thinking=options.thinking,
        local_only=is_local(options.host),
    )
    serve(voice(options, options.name), options.host, options.port, limits)


COMMANDS = {
    "serve": Command(
        _serve,
        _serve_arguments,
        "Serve a model at an OpenAI-compatible address",
        "abyssal serve runs/reason-20260101-120000 --port 8000",
    )
}

"""The command line: `abyssal train | generate | eval | plot | info | ...`; also `python -m abyssal.train`."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from .bench import OPS

EXAMPLES = {
    "train": "abyssal train toy --set optim.lr=1e-3 --set train.steps=200",
    "generate": "abyssal generate runs/toy-20260101-120000 --prompt 'import ' --max-new-tokens 200",
    "eval": "abyssal eval runs/toy-20260101-120000 --rows 0",
    "eval needle": "abyssal eval needle runs/toy-20260101-120000 --lengths 256,1024,4096 --trials 16",
    "eval speculative": "abyssal eval speculative runs/toy-20260101-120000 --prompts 16 --tokens 125",
    "plot": "abyssal plot runs/toy-20260101-120000",
    "info": "abyssal info v4-pro --context 1M --gpu h100 --price 2.35 --mfu 0.4",
    "convert": "abyssal convert checkpoint converted --layout official --weights fp4",
    "profile": "abyssal profile toy --decode-length 4096 --out runs/profile-toy",
    "bench": "abyssal bench --base HEAD~1",
    **{f"bench {op}": f"abyssal bench {op} --tokens 1024,4096 --out runs/bench" for op in OPS},
}

# what a user can cause: bad names, values and files, a missing optional library, a diverging run
EXPECTED = (ValueError, TypeError, FileNotFoundError, FileExistsError, ModuleNotFoundError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; errors of the user's making end in one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if " ".join(words[:2]) in COMMANDS:
        words[:2] = [" ".join(words[:2])]
    options = build_parser().parse_args(words)
    try:
        options.run(options)
    except EXPECTED as error:
        if options.traceback:
            raise
        print(f"abyssal {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nabyssal {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="abyssal", description="Train, inspect and sample DeepSeek-V4 models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, arguments, help_text) in COMMANDS.items():
        command = commands.add_parser(
            name, help=help_text, description=f"{help_text}.", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.set_defaults(run=run)
        arguments(command)
        command.add_argument("--traceback", action="store_true", help="show where an error comes from (default: off)")
    return parser


class _Parser(argparse.ArgumentParser):
    """Adds an example to a command's help, and to train's the recipe keys (which it reads from the recipe's tables)."""

    def format_help(self) -> str:
        name = self.prog.partition(" ")[2]
        if name in EXAMPLES:
            self.epilog = (f"{_recipe_keys()}\n\n" if name == "train" else "") + f"example:\n  {EXAMPLES[name]}"
        return super().format_help()


def _flag(parser: argparse.ArgumentParser, name: str, kind: type, default: Any, meaning: str, shown: str = "") -> None:
    """An option whose help ends with its type and default."""
    text = f"{meaning} ({kind.__name__.lower()}; default: {shown or default})"
    parser.add_argument(name, type=kind, default=default, metavar=name.strip("-").replace("-", "_").upper(), help=text)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="shipped name or .toml file (str; optional with --resume)"
    )
    _flag(parser, "--out", Path, None, "folder of the run", "runs/NAME-DATE-TIME, or the resumed run's")
    _flag(parser, "--resume", Path, None, "run or checkpoint to go on with", "start anew")
    text = "a recipe key as TABLE.KEY=VALUE, TOML value; repeatable (str; default: as in the recipe)"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def _train(options: argparse.Namespace) -> None:
    from . import checkpoint
    from .loop import train

    recipe, out = _recipe_and_folder(options)
    try:
        summary = train(recipe, out, options.resume)
    except KeyboardInterrupt:
        if checkpoint.checkpoints(out):
            print(f"\ngo on later with: abyssal train --resume {out}", file=sys.stderr)
        raise
    curves = _try_plot(out)
    print(_describe(summary, curves))


def _recipe_and_folder(options: argparse.Namespace) -> tuple[Any, Path]:
    """The recipe asked for (a resumed run's own unless one is named), and where the run goes."""
    from . import checkpoint
    from .recipe import Recipe, apply, load_recipe

    if options.resume is None:
        if options.recipe is None:
            raise ValueError("RECIPE is missing: give a shipped name, a .toml file, or --resume DIR")
        recipe = load_recipe(options.recipe, options.set)
        return recipe, options.out or Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = checkpoint.find(options.resume)
    out = options.out or folder.parents[1]
    if options.recipe:
        return load_recipe(options.recipe, options.set), out
    stored = checkpoint.read_state(folder)[0]
    return Recipe.from_dict(apply(stored.to_dict(), options.set)), out


def _try_plot(out: Path) -> str:
    from .plot import plot

    try:
        return str(plot(out))
    except ModuleNotFoundError as error:
        return f"not drawn: {error.name} is not installed (pip install matplotlib, then: abyssal plot {out})"


def _describe(summary: Any, curves: str) -> str:
    steps, tokens, seconds = summary.progress.step, summary.progress.tokens, summary.progress.seconds
    gap = summary.trigram - summary.held_out
    compared = f"the model is {abs(gap):.4f} {'better' if gap > 0 else 'worse'}"
    speed = f"{tokens / seconds:,.0f} tokens/s"
    lines = [
        "",
        f"held-out bits per byte   {summary.held_out:.4f}",
        f"trigram, same bytes      {summary.trigram:.4f}   ({compared})",
        f"trained                  {steps} steps, {tokens:,} bytes in {seconds:.0f} s, {speed}",
        f"curves                   {curves}",
        f"checkpoint               {summary.checkpoint}",
        f"all files                {summary.out}",
    ]
    if summary.sample:
        lines += ["", "sample:", summary.sample]
    return "\n".join(lines)


def _checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    text = "checkpoint folder, or folder of a run: its newest (path)"
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=text)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _checkpoint_argument(parser)
    _flag(parser, "--prompt", str, "", "text to continue", "'', the start of a document")
    _flag(parser, "--max-new-tokens", int, 256, "bytes to write")
    _flag(parser, "--temperature", float, 0.8, "divides the logits; 0 = always the likeliest")
    _flag(parser, "--top-p", float, 0.95, "keep the likeliest tokens up to this probability; 1 = all")
    _flag(parser, "--top-k", int, 0, "keep that many likeliest tokens; 0 = all")
    _flag(parser, "--min-p", float, 0.0, "drop tokens below this share of the likeliest one's probability; 0 = none")
    _flag(parser, "--seed", int, 0, "of the sampling")
    text = "end once this text is written; repeatable (str; default: the end of the document)"
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help=text)
    text = "guess a token ahead with the MTP module: the same distribution (default: off)"
    parser.add_argument("--speculative", action="store_true", help=text)
    _flag(parser, "--storage", str, "exact", "of the cache: exact, or released = FP8 entries and FP4 index keys")


def _generate(options: argparse.Namespace) -> None:
    import torch

    from ..model import generate
    from ..model.generate import Generation
    from .loop import load_trained
    from .tokens import decode_stream, encode

    if "" in options.stop:
        raise ValueError("stop='': at least one character is needed")
    model, _ = load_trained(options.checkpoint)
    end = [] if model.config.eos_token_id is None else [model.config.eos_token_id]
    ids = torch.tensor([encode(options.prompt)], device=next(model.parameters()).device)
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
            stop=[*end, *(list(text.encode()) for text in options.stop)],
            speculative=options.speculative,
            storage=options.storage,
            stream=True,
        ),
    )
    print(options.prompt, end="", flush=True)
    for text in decode_stream(map(int, tokens)):
        print(text, end="", flush=True)
    print()
    print(tokens.stats, file=sys.stderr)


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    _checkpoint_argument(parser)
    _flag(parser, "--rows", int, None, "held-out rows to read; 0 = all", "as in the recipe")
    _flag(parser, "--source", str, None, "'stdlib', a folder or a text file", "as in the recipe")


def _eval(options: argparse.Namespace) -> None:
    from dataclasses import replace

    import torch

    from . import evaluate
    from .corpus import load_corpus
    from .data import held_out
    from .loop import load_trained

    model, recipe = load_trained(options.checkpoint)
    data = replace(recipe.data, source=options.source or recipe.data.source)
    data = replace(data, held_out_rows=data.held_out_rows if options.rows is None else options.rows)
    corpus = load_corpus(data.source, data.held_out_fraction)
    rows = held_out(corpus, data.sequence_length, data.held_out_rows)
    bits = evaluate.bits_per_byte(model, rows, data.batch_size, getattr(torch, recipe.train.dtype))
    print(f"corpus {data.source}: {corpus}")
    print(f"held-out bytes           {len(rows.target_positions()):,} in {len(rows.rows)} of {rows.stream.rows} rows")
    print(f"held-out bits per byte   {bits:.4f}")
    print(f"trigram, same bytes      {evaluate.trigram_bits_per_byte(corpus, rows):.4f}")


def _needle_arguments(parser: argparse.ArgumentParser) -> None:
    _checkpoint_argument(parser)
    _flag(parser, "--lengths", str, "256,512,1024,2048,4096", "tokens of the prompts")
    _flag(parser, "--depths", str, "0,0.25,0.5,0.75,1", "where the facts stand: 0 = start, 1 = before the question")
    _flag(parser, "--trials", int, 8, "facts for each length and depth")
    _flag(parser, "--batch", int, 8, "facts asked for side by side")
    _flag(parser, "--seed", int, 0, "of the facts and the text around them")
    _flag(parser, "--out", Path, None, "folder for needle.json and needle.png", "that of the run")


def _needle(options: argparse.Namespace) -> None:
    from .needle import run

    chosen = {name: getattr(options, name) for name in ("lengths", "depths", "trials", "batch", "seed", "out")}
    run(options.checkpoint, **chosen)


def _speculative_arguments(parser: argparse.ArgumentParser) -> None:
    _checkpoint_argument(parser)
    _flag(parser, "--prompts", int, 16, "held-out documents to go on from")
    _flag(parser, "--tokens", int, 125, "tokens to write after each")
    _flag(parser, "--prompt-bytes", int, 200, "bytes of a document to read first")


def _speculative(options: argparse.Namespace) -> None:
    from .speculation import run

    compared = run(options.checkpoint, options.prompts, options.tokens, options.prompt_bytes)
    print(compared)
    if compared.differs is not None:
        raise FloatingPointError("speculative decoding wrote other tokens than plain decoding")


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="DIR", help="folder of a run, with its metrics.jsonl (path)")
    _flag(parser, "--out", Path, None, "picture to write", "DIR/curves.png")


def _plot(options: argparse.Namespace) -> None:
    from .plot import plot

    print(plot(options.run_folder, options.out))


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    text = "shipped name (also v3, v3.2), .toml or .json file, or a folder with config.json (str)"
    parser.add_argument("name", metavar="NAME", help=text)
    _flag(parser, "--context", str, "0", "tokens before the current one, for FLOPs and cache, such as 4096, 128K or 1M")
    _flag(parser, "--gpu", str, None, "estimate training and serving: a100, h800, h100, h200 or b200", "no estimate")
    _flag(parser, "--price", float, 2.0, "dollars of a GPU-hour")
    _flag(parser, "--mfu", float, 0.4, "share of the dense BF16 peak that is reached")
    _flag(parser, "--tokens", float, 15e12, "tokens of training")
    _flag(parser, "--length", str, "4K", "tokens of a training sequence")
    _flag(parser, "--plot", Path, None, "picture of cost over context to write", "none")


def _info(options: argparse.Namespace) -> None:
    from . import cost

    context, length, folder = cost.count(options.context), cost.count(options.length), Path(options.name)
    if folder.is_dir() and list(folder.glob("*.safetensors*")):
        import torch

        from ..model.interchange.describe import describe
        from .bench.measure import free_memory

        print(describe(folder, free_memory(torch.device("cpu"))) + "\n")
    print(cost.accounts(cost.load(options.name), context).table())
    if context:
        print("\n" + cost.comparison(options.name, context))
    gpu = cost.Gpu(options.gpu or "h100", options.mfu, options.price)
    if options.gpu:
        print("\n" + cost.estimate(options.name, max(context, 1), gpu, options.tokens, length))
    if options.gpu and options.name == "v3":
        print("\n" + cost.v3_table())
    if options.plot:
        print(f"\n{cost.draw(options.plot, options.name, gpu)}")


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder with config.json and safetensors (path)")
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder to write (path)")
    _flag(parser, "--layout", str, "huggingface", "tensor names: huggingface (transformers') or official (DeepSeek's)")
    _flag(parser, "--weights", str, "exact", "exact; or in the official layout fp8, or fp4 (experts FP4, others FP8)")
    _flag(parser, "--dtype", str, None, "bfloat16, float16 or float32 of what is not quantised", "as stored")
    _flag(parser, "--max-shard-size", float, 5e9, "bytes of a file")


def _convert(options: argparse.Namespace) -> None:
    import torch

    from ..model import convert_pretrained
    from ..model.interchange.describe import describe

    if options.dtype not in (None, "bfloat16", "float16", "float32"):
        raise ValueError(f"dtype={options.dtype!r}: allowed are bfloat16, float16, float32")
    dtype = options.dtype and getattr(torch, options.dtype)
    limit = int(options.max_shard_size)
    convert_pretrained(options.source, options.target, options.layout, dtype, limit, weights=options.weights)
    print(describe(options.target))


def _bench_all_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="?", metavar="OP", help="what to measure (str; default: all)")
    text = "print what can be measured, and at which shapes, instead of measuring it (default: off)"
    parser.add_argument("--list", action="store_true", help=text)
    _bench_common_arguments(parser, "all")


def _bench_all(options: argparse.Namespace) -> None:
    from .bench import OPS
    from .bench.run import load, run_all

    if options.op not in (None, "all"):
        load(options.op)
    if not options.list:
        run_all(**_bench_common(options))
        return
    for name in [options.op] if options.op in OPS else OPS:
        op = load(name)
        print(f"abyssal bench {name}   {OPS[name]}")
        for options_of, kind in ((op.shapes, "shape"), (op.data, "data")):
            print(*(f"  --{kind} {choice:<10} {meaning}" for choice, meaning in options_of.items()), sep="\n")


def _bench_common_arguments(parser: argparse.ArgumentParser, op: str) -> None:
    _flag(parser, "--tokens", str, None, "numbers of tokens, with commas", "the shape's")
    _flag(parser, "--dtype", str, None, "bfloat16, float16 or float32", "bfloat16 on a GPU, float32 on a CPU")
    _flag(parser, "--device", str, None, "cpu, cuda, cuda:1, ...", "a GPU if there is one")
    _flag(parser, "--repeats", int, None, "turns of each contender that count", "100 on a GPU, 7 on a CPU")
    _flag(parser, "--base", str, None, "a commit whose kernels run beside the present ones", "none")
    text = "do not run the op's tests before it is timed (default: they run, and a red op is not timed)"
    parser.add_argument("--no-tests", dest="tests", action="store_false", help=text)
    _flag(parser, "--out", Path, None, "folder for the JSON and the PNG", f"runs/bench-{op.upper()}-DATE-TIME")


def _bench_common(options: argparse.Namespace) -> dict[str, Any]:
    names = ("tokens", "dtype", "device", "repeats", "base", "tests", "out")
    return {name: getattr(options, name) for name in names}


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    _flag(parser, "--shape", str, None, "names or sizes of shapes, with commas", "the op's for the device")
    _flag(parser, "--data", str, None, "how inputs are drawn, see abyssal bench --list", "the op's first")
    _bench_common_arguments(parser, "OP")


def _bench(options: argparse.Namespace) -> None:
    from .bench.run import run

    op = options.command.removeprefix("bench ")
    run(op, shape=options.shape, data=options.data, **_bench_common(options))


def _profile_arguments(parser: argparse.ArgumentParser) -> None:
    text = "shipped recipe or released configuration, or a .toml or .json file (str)"
    parser.add_argument("preset", metavar="PRESET", help=text)
    _flag(parser, "--tokens", int, None, "tokens of a row of the training step", "the recipe's; else 4096")
    _flag(parser, "--batch", int, None, "rows of the training step", "the recipe's; else 1")
    _flag(parser, "--device", str, None, "cpu, cuda, cuda:1, ...", "a GPU if there is one")
    _flag(parser, "--dtype", str, None, "bfloat16, float16 or float32", "the recipe's; else bfloat16 on a GPU")
    _flag(parser, "--decode-length", int, None, "tokens behind which one is decoded", "1024")
    _flag(parser, "--decode-batch", int, 1, "sequences that are decoded together")
    _flag(parser, "--repeats", int, None, "turns of each step, with and without instruments", "20 on a GPU, 7 on a CPU")
    _flag(parser, "--layers", int, None, "cut the configuration down to its first layers", "all")
    _flag(parser, "--experts", int, None, "cut the configuration down to that many routed experts", "all")
    text = "a recipe key as TABLE.KEY=VALUE, TOML value; repeatable (str; default: as in the preset)"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    _flag(parser, "--out", Path, None, "folder for the JSON, the PNG and the traces", "runs/profile-PRESET-DATE-TIME")


def _profile(options: argparse.Namespace) -> None:
    from .profile.run import run

    names = ("tokens", "batch", "dtype", "decode_length", "decode_batch", "layers", "experts")
    chosen = {name: getattr(options, name) for name in ("device", "repeats", "out", *names)}
    run(options.preset, overrides=options.set, **chosen)


def _recipe_keys() -> str:
    """Every recipe key that --set takes, with its type, default and meaning."""
    from .recipe import TABLES

    lines = ["recipe keys (model.* are those of the released config.json, see abyssal info):"]
    for table, kind in TABLES.items():
        for f in fields(kind):
            default = list(f.default) if isinstance(f.default, tuple) else f.default
            kind_name = getattr(f.type, "__name__", str(f.type)).replace("tuple", "list")
            lines.append(f"  {f'{table}.{f.name}':<26} {kind_name:<6} {f.metadata['meaning']} (default: {default!r})")
    return "\n".join(lines)


COMMANDS = {
    "train": (_train, _train_arguments, "Train a recipe on text, with checkpoints, metrics, curves and a sample"),
    "generate": (_generate, _generate_arguments, "Write text with a trained model"),
    "eval": (_eval, _eval_arguments, "Held-out bits per byte of a trained model, beside a trigram model's"),
    "eval needle": (
        _needle,
        _needle_arguments,
        "Facts hidden in long text: what a trained model finds, and how far back",
    ),
    "eval speculative": (
        _speculative,
        _speculative_arguments,
        "Speculative against plain decoding: the same tokens, drafts accepted, speed",
    ),
    "plot": (_plot, _plot_arguments, "Draw a run's curves from its metrics.jsonl"),
    "info": (
        _info,
        _info_arguments,
        "Parameters, FLOPs, cache and cost of a configuration, or what a checkpoint holds",
    ),
    "convert": (_convert, _convert_arguments, "Write a checkpoint anew in another layout or number format"),
    "profile": (
        _profile,
        _profile_arguments,
        "Time and memory of a training step and a decode step by mechanism, beside their limits",
    ),
    "bench": (_bench_all, _bench_all_arguments, "Time and memory of every op, against other implementations"),
    **{f"bench {op}": (_bench, _bench_arguments, text) for op, text in OPS.items()},
}

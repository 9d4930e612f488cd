"""`abyssal plot | info | convert`: runs, configurations and checkpoints, looked at and written anew."""

import argparse
from pathlib import Path
from typing import Any

from .options import Command, flag, trust_argument


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    text = "folder of a run, with its metrics.jsonl; of several, to see them in one picture (path)"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=text)
    flag(parser, "--out", Path, None, "picture to write", "RUN/curves.png; of several compare.png")
    text = "what the curves of several runs lie over: step, tokens or time (str; default: step)"
    parser.add_argument("--by", choices=("step", "tokens", "time"), default="step", help=text)


def _plot(options: argparse.Namespace) -> None:
    from ..plots import compare
    from ..plots.curves import plot
    from ..plots.mechanisms import plot_mechanisms

    if len(options.runs) > 1:
        runs = compare.read(options.runs)
        print(compare.table(runs))
        print(f"\n{compare.draw(runs, options.out or compare.FILE, options.by)}")
        return
    (run,) = options.runs
    if options.by != "step":
        raise ValueError(f"--by {options.by}: allowed with two or more runs")
    print(plot(run, options.out))
    mechanisms = plot_mechanisms(run, options.out and _beside(options.out))
    if mechanisms:
        print(mechanisms)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}-mechanisms{path.suffix}")


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    text = "shipped name (also v3, v3.2), .toml or .json file, run, checkpoint, or folder with config.json (str)"
    parser.add_argument("name", metavar="NAME", help=text)
    trust_argument(parser)
    flag(parser, "--context", str, "0", "tokens before the current one, for FLOPs and cache, such as 4096, 128K or 1M")
    flag(parser, "--gpu", str, None, "estimate training and serving: a100, h100, rtx4090, mi300x, ...", "no estimate")
    flag(parser, "--price", float, 2.0, "dollars of a GPU-hour")
    flag(parser, "--mfu", float, 0.4, "share of the dense BF16 peak that is reached; toys reach far less")
    flag(parser, "--tokens", float, None, "tokens of training", "the recipe's; else 15e12")
    flag(parser, "--length", str, None, "tokens of a training sequence", "the recipe's; else 4K")
    flag(parser, "--plot", Path, None, "picture of cost over context to write", "none")
    text = "print what the steps of a recipe do instead: stages, lengths, rows, learning rates, tokens (default: off)"
    parser.add_argument("--schedule", action="store_true", help=text)
    text = "how every parameter learns and why, with optim.rule as in the recipe, or adamw or muon (str; default: off)"
    parser.add_argument("--rules", nargs="?", const="recipe", metavar="RULE", help=text)


def _info(options: argparse.Namespace) -> None:
    if options.schedule:
        from ..recipe import load_recipe
        from ..run.schedule import plan

        print(plan(load_recipe(options.name)))
        return
    from ...model.config import shipped
    from ...model.folders import description, model_folder
    from ..measure import cost

    context, folder = cost.count(options.context), Path(options.name)
    length = None if options.length is None else cost.count(options.length)
    is_folder = folder.is_dir() and options.name not in shipped()
    changed = description(model_folder(folder)).get("prepared") if is_folder else None
    if changed:
        print(f"its model was changed by {changed}; what follows is its configuration's, without that\n")
    elif is_folder and list(model_folder(folder).glob("**/*.safetensors*")):
        import torch

        from ...model.interchange.describe import describe
        from ..measure.bench.measure import free_memory

        print(describe(folder, free_memory(torch.device("cpu"))) + "\n")
    print(cost.accounts(cost.load(options.name), context).table())
    if context:
        print("\n" + cost.comparison(options.name, context))
    gpu = cost.Gpu(options.gpu or "h100", options.mfu, options.price)
    if options.gpu:
        print("\n" + cost.estimate(options.name, max(context, 1), gpu, options.tokens, length))
    if options.rules:
        print("\n" + _rules(options.name, options.rules))
    if options.gpu and options.name == "v3":
        print("\n" + cost.v3_table())
    if options.plot:
        print(f"\n{cost.draw(options.plot, options.name, gpu)}")


def _rules(name: str, rule: str) -> str:
    """The table of rules of a configuration, without the memory of its weights."""
    import torch

    from ...model import ModelConfig, Transformer
    from ...model.config import read_recipe
    from ..measure import cost
    from ..optim.rules import rule_lines, rule_table
    from ..settings import OptimConfig

    config = cost.load(name)
    if not isinstance(config, ModelConfig):
        raise ValueError(f"--rules: {name!r} is no model that is trained here: allowed are V4's")
    keys = read_recipe(name).get("optim", {})
    optim = OptimConfig(**(keys if rule == "recipe" else {**keys, "rule": rule}))
    with torch.device("meta"):
        return rule_table(rule_lines(Transformer(config), optim))


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path, help="run, checkpoint, or folder of weights (path)")
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder to write (path)")
    text = (
        "tensor names: huggingface (transformers' own, or where that lacks something ours), official (DeepSeek's), or"
    )
    flag(parser, "--layout", str, "huggingface", f"{text} abyssal (ours, which transformers reads with abyssal.hf)")
    flag(parser, "--weights", str, "exact", "exact; or in the official layout fp8, or fp4 (experts FP4, others FP8)")
    flag(parser, "--dtype", str, None, "bfloat16, float16 or float32 of what is not quantised", "as stored")
    flag(parser, "--max-shard-size", float, 5e9, "bytes of a file")


def _convert(options: argparse.Namespace) -> None:
    import torch

    if options.dtype not in (None, "bfloat16", "float16", "float32"):
        raise ValueError(f"dtype={options.dtype!r}: allowed are bfloat16, float16, float32")
    dtype = options.dtype and getattr(torch, options.dtype)
    how = {"layout": options.layout, "dtype": dtype, "max_shard_size": options.max_shard_size}
    print(exported(options.source, options.target, **how, weights=options.weights))


def exported(source: Path, target: Path, **how: Any) -> str:
    """Writes a checkpoint anew, with its model card if it is a run's; the folder that came of it as lines of text."""
    from ...model import convert_pretrained
    from ...model.interchange import located
    from ...model.interchange.describe import describe
    from ..measure import card

    source = located(source)
    convert_pretrained(source, target, **how)
    return f"{describe(target)}\n{'model card':<22}{card.write(source, target)}"


COMMANDS = {
    "plot": Command(
        _plot,
        _plot_arguments,
        "Draw a run's curves from its metrics.jsonl, or several runs in one picture",
        "abyssal plot runs/lr-1e-3 runs/lr-3e-3 --by tokens",
    ),
    "info": Command(
        _info,
        _info_arguments,
        "Parameters, FLOPs, cache and cost of a configuration, or what a checkpoint holds",
        "abyssal info v4-pro --context 1M --gpu h100 --price 2.35 --mfu 0.4",
    ),
    "convert": Command(
        _convert,
        _convert_arguments,
        "Write a checkpoint anew in another layout or number format, a run's with its model card",
        "abyssal convert runs/toy-20260101-120000 exported",
    ),
}

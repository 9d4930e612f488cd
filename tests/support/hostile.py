"""A configuration with each of its keys replaced by hostile values: it is taken, or refused by a message that names it.

    python tests/support/hostile.py

prints, per configuration, how many were tried, taken and refused, and every answer of another kind.
"""

import copy
import json
import time
from importlib import resources

from abyssal.model import ModelConfig
from abyssal.model.dialect import to_huggingface
from abyssal.model.lineage import LineageConfig

VALUES = (
    *(None, True, False, 0, -1, 1, 10**9, 10**30, 10**5000, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "a\nb", "x" * 100_000, [], {}, [1], [[[]]], [None] * 3, ["x"] * 5, {"x": {"y": 1}}, {1: 2}, b"x"),
)
SLOW = 1.0  # seconds


def configurations():
    """Name, class and table of one of each kind."""
    lineage = resources.files("abyssal.configs.lineage")
    nano = ModelConfig.load("nano").to_dict()
    plain = {key: value for key, value in nano.items() if key != "engram"}
    flash = ModelConfig.load("v4-flash").to_dict()
    yield "nano", ModelConfig, {**nano, "quantization_aware": {"experts": "fp8"}}
    yield "nano, in transformers' keys", ModelConfig, to_huggingface(plain)
    yield "v4-flash", ModelConfig, flash
    yield "v4-flash, in transformers' keys", ModelConfig, to_huggingface(flash)
    for name in ("v3", "v3.2"):
        data = json.loads(lineage.joinpath(f"{name}.json").read_text("utf-8"))
        yield name, LineageConfig, data
        rotary = {"rope_theta": data.pop("rope_theta"), "rope_type": "yarn", **data.pop("rope_scaling")}
        yield f"{name}, in transformers' keys", LineageConfig, {**data, "rope_parameters": rotary}


def paths(table):
    """Of every key, and of those of the tables in it."""
    for key, value in table.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in paths(value))


def answers(kind, data):
    """Each path, value and what is wrong with the answer ("" where nothing is), and whether it was taken."""
    for path in paths(data):
        for value in VALUES:
            changed = copy.deepcopy(data)
            table = changed
            for key in path[:-1]:
                table = table[key]
            table[path[-1]] = value
            begin, wrong, taken = time.perf_counter(), "", True
            try:
                kind.from_dict(changed)
            except (TypeError, ValueError) as error:
                text, taken = str(error), False
                named = path[-1] in text and "\n" not in text and len(text) < 3000
                wrong = "" if named else f"{type(error).__name__}: {text[:200]}"
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            if time.perf_counter() - begin > SLOW:
                wrong += " slow"
            yield path, value, wrong, taken


def main() -> None:
    for name, kind, data in configurations():
        found = list(answers(kind, data))
        print(f"{name}: {len(found)} tried, {sum(taken for *_, taken in found)} taken")
        for path, value, wrong, _ in found:
            if wrong:
                print(f"  {'.'.join(path)}={type(value).__name__}: {wrong}")


if __name__ == "__main__":
    main()

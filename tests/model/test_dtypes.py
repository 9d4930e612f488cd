"""Dtypes at the kernels' door are those of ARCHITECTURE's table: under autocast, and of a model in bfloat16.

The table names every floating argument of every op that a pass calls, as `op.argument`.
"""

import importlib
import inspect
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from lively import draw_ids

from abyssal import kernels
from abyssal.model import ModelConfig, Transformer

ROOT = Path(__file__).parents[2]
NAMES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "complex64": torch.complex64}
OPS = [path.parent.name for path in sorted((ROOT / "kernels").glob("*/reference.py"))]
CUT = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "qk_rope_head_dim": 8}
CUT |= {"q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 16}
CUT |= {"vocab_size": 300, "n_routed_experts": 6, "moe_intermediate_size": 16}


def promised() -> dict[str, str]:
    """`op.argument` to its dtype, or "as kept" of a parameter that goes in as the model keeps it."""
    table = (ROOT / "ARCHITECTURE.md").read_text("utf-8").partition("<!-- dtypes -->")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    return {place: row[1] for row in rows for place in re.findall(r"`(\w+\.\w+)`", row[2])}


@pytest.fixture
def door(monkeypatch):
    """`op.argument`: the dtypes that engines were given."""
    seen = defaultdict(set)

    def watch(op, found):
        class Told:
            def __getattr__(self, name):
                run = getattr(found, name)

                def told(*args, **kwargs):
                    for argument, value in inspect.signature(run).bind(*args, **kwargs).arguments.items():
                        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
                            seen[f"{name}.{argument}"].add(value.dtype)
                    return run(*args, **kwargs)

                return told

        return Told()

    for op in OPS:
        module = importlib.import_module(f"abyssal.kernels.{op}")
        real = module.implementation
        monkeypatch.setattr(module, "implementation", lambda name, *rest, real=real: watch(name, real(name, *rest)))
    return seen


def small() -> Transformer:
    """`small`, all kinds of layers with Engram, fewer and narrower."""
    torch.manual_seed(0)
    config = ModelConfig.load("small").to_dict()
    kinds = [config["compress_ratios"].index(ratio) for ratio in (0, 4, 128)]
    kinds = sorted([*kinds, config["compress_ratios"].index(4)])
    changes = {
        "compress_ratios": [config["compress_ratios"][i] for i in kinds],
        "layer_types": [config["layer_types"][i] for i in kinds] if config.get("layer_types") else None,
        "num_hash_layers": 1,
        "engram": ModelConfig.load("nano").to_dict()["engram"],
    }
    return Transformer(ModelConfig.from_dict({**config, **CUT, **{k: v for k, v in changes.items() if v}}))


def test_the_table_is_read():
    assert len(promised()) > 30 and set(promised().values()) == {"bfloat16", "float32", "complex64", "as kept"}


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_every_tensor_crosses_the_door_as_promised(door, how):
    model, ids = small().train(), draw_ids(2, 150, top=290)
    if how == "bfloat16":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        model(ids, targets=ids, documents=torch.zeros_like(ids)).loss.backward()
    kept = {torch.float32} if how == "autocast" else {torch.float32, torch.bfloat16}
    table = promised()
    assert door.keys() == table.keys()
    for place, dtypes in door.items():
        wanted = kept if table[place] == "as kept" else {NAMES[table[place]]}
        assert dtypes <= wanted, (place, dtypes, table[place])


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@torch.no_grad()
def test_so_do_those_of_passes_with_a_cache(door, how):
    model, ids = small().eval(), draw_ids(2, 40, top=290)
    if how == "bfloat16":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        cache = model.new_cache(2, 50)
        logits = [model(ids[:, :30], cache=cache).logits, model(ids[:, 30:31], cache=cache).logits]
    assert all(x.dtype == torch.float32 for x in logits)
    table = promised()
    for place, dtypes in door.items():
        wanted = {torch.float32, torch.bfloat16} if table[place] == "as kept" else {NAMES[table[place]]}
        assert dtypes <= wanted, (place, dtypes, table[place])


@torch.no_grad()
def test_a_model_in_float64_stays_in_it(door):
    model, ids = small().double().eval(), draw_ids(2, 160, top=290)
    cache = model.new_cache(2, 170)
    whole = model(ids).logits
    parts = [model(part, cache=cache).logits for part in ids.split([140, 1, 19], 1)]
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-12 * float(whole.abs().max()))
    assert {place for place, dtypes in door.items() if dtypes != {torch.float64}} == {
        "norm_rope.rotation",
        "rope.rotation",
    }


def test_ops_are_all_that_there_are():
    assert set(OPS) == {path.parent.name for path in Path(kernels.__file__).parent.glob("*/eager.py")}

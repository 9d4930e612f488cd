"""Checkpoint interchange: names, shapes and keys against transformers itself, round trips, and every refusal."""

import errno
import json
import os
import random
import re
import resource
import time
from dataclasses import replace

import pytest
import saves
import torch
from model_tensors import model_tensors
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from abyssal.model import disk, interchange
from abyssal.model.config import EngramConfig, ModelConfig, RopeScaling
from abyssal.model.dialect import from_huggingface, to_huggingface
from abyssal.model.interchange import Stored, convert_pretrained, load_pretrained, save_pretrained
from abyssal.model.interchange import place as placing
from abyssal.model.interchange.names import sources
from abyssal.model.kinds import HEAVY, SLIDING, SPARSE
from abyssal.model.transformer import Transformer

LAYOUTS = ("official", "huggingface", "abyssal")


def tiny(**changes) -> ModelConfig:
    values = {
        **{"vocab_size": 53, "hidden_size": 24, "num_hidden_layers": 4, "sliding_window": 8, "num_hash_layers": 1},
        **{"compress_ratios": [0, 4, 8, 4], "layer_types": [SLIDING, SPARSE, HEAVY, SPARSE], "index_topk": 3},
        **{"num_attention_heads": 4, "head_dim": 12, "qk_rope_head_dim": 4, "q_lora_rank": 10, "o_groups": 2},
        **{"o_lora_rank": 6, "index_n_heads": 3, "index_head_dim": 8, "n_routed_experts": 5, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 7, "routed_scaling_factor": 1.5, "torch_dtype": "float32"},
    }
    return ModelConfig.from_dict({**values, **changes})


def made_up(config: ModelConfig, rows: dict[int, int] | None = None) -> dict[str, torch.Tensor]:
    """A model's state without the model: every tensor filled with numbers of its own."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in model_tensors(config, rows).items():
        if name.endswith(("tid2eid", "canonical")):
            state[name] = torch.randint(0, 5, shape, generator=generator)
        else:
            state[name] = torch.randn(shape, generator=generator)
    return state


def write(folder, config, layout, state=None, limit=10**9):
    state = made_up(config) if state is None else state
    kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    interchange._save(
        folder, interchange.families.V4, config, kinds, lambda name, index: state[name][index], (layout, "exact", limit)
    )
    return folder


def read(folder, config, dtype=None):
    stored = Stored(folder)
    assert replace(stored.config, torch_dtype=config.torch_dtype) == config
    return {name: stored.tensor(name, dtype) for name in stored.shapes}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("limit", [10**9, 4096])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_reads_back_bit_for_bit(tmp_path, layout, limit):
    config = tiny()
    folder = write(tmp_path / "new", config, layout, limit=limit)
    assert (folder / "model.safetensors.index.json").exists() == (limit == 4096)
    assert_equal(read(folder, config), made_up(config))
    assert ModelConfig.load(folder / "config.json") == config


@pytest.mark.parametrize("changes", [{"n_shared_experts": 2}, {"hc_mult": 1}, {"num_nextn_predict_layers": 0}], ids=str)
def test_official_layout_holds_any_configuration(tmp_path, changes):
    config = tiny(**changes)
    assert_equal(read(write(tmp_path / "x", config, "official"), config), made_up(config))


def test_official_layout_holds_engram(tmp_path):
    config = replace(tiny(), engram=EngramConfig(layers=(1,), head_dim=4, vocab_size=11, heads=2))
    state = made_up(config, {1: len(Transformer(config).layers[1].engram.table.weight)})
    assert_equal(read(write(tmp_path / "x", config, "official", state), config), state)
    for layout in ("huggingface", "abyssal"):  # what transformers' own class cannot hold has our names
        folder = write(tmp_path / layout, config, layout, state)
        assert json.loads((folder / "config.json").read_text("utf-8"))["model_type"] == "abyssal"
        assert Stored(folder).layout == "abyssal"
        assert_equal(read(folder, config), state)


def test_official_names():
    config = tiny(num_hidden_layers=1, compress_ratios=[4], layer_types=[SPARSE], num_hash_layers=0, n_routed_experts=2)
    names = {source for name in model_tensors(config) for source in sources(name, config, "official")}
    weights = """attn_norm ffn_norm attn.wq_a attn.q_norm attn.wq_b attn.wkv attn.kv_norm attn.wo_a attn.wo_b ffn.gate
        ffn.experts.0.w1 ffn.experts.0.w2 ffn.experts.0.w3 ffn.experts.1.w1 ffn.experts.1.w2 ffn.experts.1.w3
        ffn.shared_experts.w1 ffn.shared_experts.w2 ffn.shared_experts.w3"""
    sparse = """attn.compressor.wkv attn.compressor.wgate attn.compressor.norm attn.indexer.wq_b
        attn.indexer.weights_proj attn.indexer.compressor.wkv attn.indexer.compressor.wgate
        attn.indexer.compressor.norm"""
    hyper = {f"hc_{site}_{part}" for site in ("attn", "ffn") for part in ("fn", "base", "scale")}
    block = {*named(weights), "attn.attn_sink", "ffn.gate.bias", *hyper}
    layer = {*block, *named(sparse), "attn.compressor.ape", "attn.indexer.compressor.ape"}
    head = {f"hc_head_{part}" for part in ("fn", "base", "scale")}
    mtp = {*block, *named("enorm hnorm norm e_proj h_proj"), *head}
    ends = {*named("embed head norm"), *head}
    assert names == ends | {f"layers.0.{name}" for name in layer} | {f"mtp.0.{name}" for name in mtp}


def named(words):
    return {f"{word}.weight" for word in words.split()}


def test_stacked_matrices_go_where_they_belong():
    config = tiny()
    width = config.moe_intermediate_size
    experts = sources("layers.1.ffn.experts.w13", config, "official")
    assert experts["layers.1.ffn.experts.4.w1.weight"] == (4, slice(0, width))
    assert experts["layers.1.ffn.experts.4.w3.weight"] == (4, slice(width, 2 * width))
    assert sources("layers.1.ffn.experts.w13", config, "huggingface") == {"model.layers.1.mlp.experts.gate_up_proj": ()}
    shared = sources("layers.0.ffn.shared_experts.w13.weight", replace(config, n_shared_experts=2), "official")
    assert shared["layers.0.ffn.shared_experts.w3.weight"] == (slice(2 * width, 4 * width),)


def test_every_element_has_exactly_one_source():
    config = tiny()
    for layout in ("official", "hybrid", "huggingface"):
        seen = set()
        for name, shape in model_tensors(config).items():
            count = torch.zeros(shape)
            for source, index in sources(name, config, layout).items():
                assert source not in seen, source
                seen.add(source)
                count[index] += 1
            assert bool((count == 1).all()), name


def test_dtype_spares_what_is_float32_by_convention(tmp_path):
    config = tiny()
    folder = write(tmp_path / "x", config, "official")
    spared = r"norm\.weight$|\.fn$|\.base$|\.scale$|attn_sink$|ape$|gate\.bias$"
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        for name, tensor in read(folder, config, dtype).items():
            want = torch.int64 if name.endswith("tid2eid") else kept if re.search(spared, name) else dtype
            assert tensor.dtype == want, name
    assert {t.dtype for t in read(folder, config).values()} == {torch.float32, torch.int64}


def edit(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    return folder


def test_tables_of_ids_may_be_int32_and_shared_copies_are_skipped(tmp_path):
    config = tiny()

    def change(tensors):
        tensors["layers.0.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"].int()
        tensors["mtp.0.head.weight"] = tensors["head.weight"].clone()
        tensors["mtp.0.emb.tok_emb.weight"] = tensors["embed.weight"].clone()

    assert_equal(read(edit(write(tmp_path / "x", config, "official"), change), config), made_up(config))


def test_missing_and_unexpected_tensors_are_listed_together(tmp_path):
    def change(tensors):
        del tensors["layers.1.attn.wq_a.weight"], tensors["layers.3.ffn.experts.4.w3.weight"]
        tensors["layers.1.attn.wq_x.weight"] = torch.zeros(1)

    folder = edit(write(tmp_path / "x", tiny(), "official"), change)
    words = (
        r"2 missing: layers.1.attn.wq_a.weight, layers.3.ffn.experts.4.w3.weight; "
        r"1 unexpected: layers.1.attn.wq_x.weight"
    )
    with pytest.raises(ValueError, match=words):
        read(folder, tiny())
    with pytest.raises(ValueError, match=r"17 missing: (\S+, ){9}\S+ and 7 more"):
        read(edit(folder, lambda t: [t.pop(k) for k in list(t) if ".experts.0." in k]), tiny())


@pytest.mark.parametrize(
    "layout, name, want",
    [
        ("official", "layers.2.ffn.experts.3.w2.weight", "(24, 7)"),
        ("official", "layers.2.attn.compressor.ape", "(8, 12)"),
        ("huggingface", "model.layers.2.mlp.experts.down_proj", "(5, 24, 7)"),
        ("huggingface", "mtp.0.e_proj.weight", "(24, 24)"),
    ],
)
def test_a_wrong_shape_is_named_with_both_shapes(tmp_path, layout, name, want):
    folder = edit(write(tmp_path / "x", tiny(), layout), lambda t: t.update({name: torch.zeros(3, 4)}))
    with pytest.raises(ValueError, match=re.escape(f"{name} has shape (3, 4): the configuration needs {want}")):
        read(folder, tiny())


def test_folders_without_what_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict()), "utf-8")
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        load_pretrained(tmp_path)
    save_file({"wte.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"none of lm_head.weight, .*embed.weight: it has wte.weight"):
        load_pretrained(tmp_path)
    folder = write(tmp_path / "x", tiny(), "official", limit=4096)
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(lost.name)):
        load_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has model-00001-of.* and \d+ more, but no model.safetensors.index.json"
    ):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "state.pkl"])
def test_pickles_are_refused_and_not_opened(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict()), "utf-8")
    torch.save({"embed.weight": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: pickled weights are refused"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 100, -1, -1000])
def test_a_cut_off_shard_is_named(tmp_path, size):
    folder = write(tmp_path / "x", tiny(), "official", limit=20_000)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:size])
    with pytest.raises(ValueError, match=f"{shard.name} is broken or cut off"):
        load_pretrained(folder)


@pytest.mark.parametrize("where", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, where):
    folder = write(tmp_path / "x", tiny(), "official", limit=20_000)
    save_file({"embed.weight": torch.zeros(53, 24)}, tmp_path / "other.safetensors")
    edit_index(folder, lambda places: places.update({"embed.weight": where}))
    with pytest.raises(ValueError, match="names of files beside it"):
        load_pretrained(folder)


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text("utf-8"))
    change(index["weight_map"])
    path.write_text(json.dumps(index), "utf-8")


def test_an_index_that_is_wrong(tmp_path):
    folder = write(tmp_path / "x", tiny(), "official", limit=20_000)
    path = folder / "model.safetensors.index.json"
    good = path.read_text("utf-8")
    files = sorted(set(json.loads(good)["weight_map"].values()))
    edit_index(folder, lambda places: places.update({"embed.weight": files[-1], "more": files[0]}))
    with pytest.raises(ValueError, match=r"promises tensors that their files do not hold: embed\.weight, more"):
        load_pretrained(folder)
    twice = good.replace("embed.weight", "head.weight")
    for broken, says in {
        **{
            "{{": "no JSON",
            "[" * 10**5: "nested too deeply",
            twice: "'head.weight' is there twice",
            "[]": "no JSON object",
        },
        **dict.fromkeys(["{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'], "is no index of shards"),
        **{'{"weight_map": {}}': "lists no tensor", '{"weight_map": {"a": "b\\u0000"}}': "names of files beside it"},
    }.items():
        path.write_text(broken, "utf-8")
        with pytest.raises(ValueError, match=says):
            load_pretrained(folder)


def test_an_index_decides(tmp_path):
    config, state = tiny(), made_up(tiny())
    folder = write(tmp_path / "x", config, "official", limit=20_000)
    places = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    name, first = "layers.1.attn.wq_a.weight", min(places.values())
    save_file({name: state[name]}, folder / "overlay.safetensors")
    edit(folder, lambda t: t.update({name: torch.zeros(3)}), places[name])  # superseded, and of another shape even
    edit(folder, lambda t: t.update({"left.over": torch.zeros(3)}), first)
    for other in ("adapter_model", "consolidated", "model-00001-of-00099"):
        save_file({"embed.weight": torch.zeros(3)}, folder / f"{other}.safetensors")
    edit_index(folder, lambda places: places.update({name: "overlay.safetensors"}))
    assert_equal(read(folder, config), state)
    edit_index(folder, lambda places: places.pop("norm.weight"))  # which its file holds
    with pytest.raises(ValueError, match=r"1 missing: norm\.weight$"):
        read(folder, config)


def test_one_file_beside_an_index(tmp_path):
    config = tiny()
    folder = write(tmp_path / "x", config, "official")
    save_file({"embed.weight": torch.zeros(3)}, folder / "consolidated.safetensors")
    assert_equal(read(folder, config), made_up(config))
    write(tmp_path / "y", config, "official", limit=20_000)
    for file in (tmp_path / "y").glob("model*"):
        file.rename(folder / file.name)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"delete model.safetensors.index.json to read model.safetensors, as tr"):
            read(folder, config)
        (folder / "model-00001-of-00002.safetensors").unlink(missing_ok=True)  # its shards being lost changes nothing
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    assert_equal(read(folder, config), made_up(config))


def no_file(path, kind):
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "nothing"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "model-00002"])
def test_what_is_no_file(tmp_path, name, kind):
    folder = write(tmp_path / "x", tiny(), "official", limit=10**9 if name == "model.safetensors" else 20_000)
    (path,) = [file for file in folder.iterdir() if file.name == name or file.name.startswith(f"{name}-of")]
    no_file(path, kind)
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(path.name)):
        load_pretrained(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_broken_bytes_are_one_line(tmp_path, file):
    folder = write(tmp_path / "x", tiny(), "official", limit=20_000 if "index" in file else 10**9)
    path, draw = folder / file, random.Random(0)
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little") if file == "model.safetensors" else len(good)
    refused = 0
    for _ in range(60):
        i, new = draw.randrange(end), bytes([draw.choice(b'\x00\xff"{}[],:-.0123456789')])
        path.write_bytes(draw.choice([good[:i], good[:i] + new + good[i + 1 :], good[:i] + new + good[i:]]))
        try:
            read(folder, tiny())
        except (FileNotFoundError, ValueError) as error:
            refused += 1
            assert "\n" not in str(error)
        except AssertionError:  # another configuration that these tensors fit
            pass
    assert refused > 40


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8, 0])
def test_lengths_of_headers(tmp_path, length):
    folder = write(tmp_path / "x", tiny(), "official")
    path = folder / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors is broken or cut off"):
        load_pretrained(folder)


@pytest.mark.parametrize("limit", [20_000, 10**9])
def test_a_folder_that_is_replaced_while_it_is_read(tmp_path, limit):
    folder = write(tmp_path / "x", tiny(), "official", limit=20_000)
    stored = Stored(folder)
    write(folder, tiny(), "official", limit=limit)
    with pytest.raises(ValueError, match="x was written anew while it was read"):
        stored.tensor("embed.weight")


@pytest.mark.parametrize("module, step", [(interchange.files, "_headers"), (interchange, "refuse_foreign")])
def test_a_folder_that_is_replaced_before_all_is_known(tmp_path, monkeypatch, module, step):
    """Its shards are gone, or the configuration is of another model than the headers."""
    folder, before = write(tmp_path / "x", tiny(), "official", limit=20_000), getattr(module, step)

    def after_another_save(*arguments):
        write(folder, tiny(n_routed_experts=4), "official")
        return before(*arguments)

    monkeypatch.setattr(module, step, after_another_save)
    with pytest.raises(ValueError, match="x was written anew while it was read"):
        load_pretrained(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrong", [5, -1, 2**40])
def test_experts_that_do_not_exist(tmp_path, layout, wrong):
    state = made_up(tiny())
    state["layers.0.ffn.gate.tid2eid"][7] = 3  # one expert twice, as transformers' own tables have before training
    folder = write(tmp_path / "x", tiny(), layout, state)
    assert_equal(read(folder, tiny()), state)
    state["layers.0.ffn.gate.tid2eid"][7, 1] = wrong
    folder = write(folder, tiny(), layout, state)
    says = rf"layers.0.ffn.gate.tid2eid\[7, 1\] is {wrong}: allowed is 0 to 4"
    for reading in (load_pretrained, lambda folder: convert_pretrained(folder, tmp_path / "y")):
        with pytest.raises(ValueError, match=says):
            reading(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"x"}


def test_token_classes_that_do_not_exist(tmp_path):
    config = replace(tiny(), engram=EngramConfig(layers=(1,), head_dim=4, vocab_size=11, heads=2))
    state = made_up(config, {1: len(Transformer(config).layers[1].engram.table.weight)})
    state["layers.1.engram.canonical"][3] = 53
    folder = write(tmp_path / "x", config, "official", state)
    with pytest.raises(ValueError, match=r"canonical\[3\] is 53: allowed is 0 to 52"):
        load_pretrained(folder)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_routed_experts": 10**9}, "n_routed_experts=1000000000: the checkpoint has tensors for 5"),
        ({"n_routed_experts": 6}, "n_routed_experts=6: the checkpoint has tensors for 5"),
        ({"num_nextn_predict_layers": 0}, "num_nextn_predict_layers=0: the checkpoint has tensors for 1"),
        (
            {"num_hidden_layers": 3, "compress_ratios": [0, 4, 8], "layer_types": [SLIDING, SPARSE, HEAVY]},
            "num_hidden_layers=3: the checkpoint has tensors for 4",
        ),
        ({"vocab_size": 10**12}, r"embed.weight has shape \(53, 24\): the configuration needs \(1000000000000, 24\)"),
        ({"hidden_size": 10**18}, "hidden_size=1000000000000000000: no model has tensors of the configuration's sizes"),
        (
            {"engram": {"layers": [1], "head_dim": 4, "vocab_size": 11, "heads": 10**6}},
            "layers x .* x heads = 1 x 2 x 1000000: at most 4096",
        ),
        ({"dspark_block_size": 5, "dspark_markov_rank": 4}, "dspark_block_size, dspark_markov_rank: they are of DSp"),
        ({"candidate_topk_blocks": 4}, "candidate_topk_blocks: they are of V4.1's shared and pooled cache"),
        ({"engram_head_dim": 4}, "engram_head_dim: they are of V4.1's Engram, which this project does not have"),
    ],
)  # fmt: skip
def test_configurations_that_are_not_what_is_stored(tmp_path, changes, says):
    folder = write(tmp_path / "x", tiny(), "official")
    edit_config(folder, **changes)
    began = time.process_time()
    with pytest.raises(ValueError, match=says):
        load_pretrained(folder)
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    ("name", "mechanism"),
    [
        ("mtp.0.main_proj.weight", "DSpark"),
        ("mtp.2.markov_head.embed", "DSpark"),
        ("vision.blocks.0.norm.weight", "vision"),
        ("layers.1.ffn.gate.bias_vl", "vision"),
        ("layers.1.engram.q_weight", "V4.1's Engram"),
    ],
)
def test_tensors_of_what_is_not_here(tmp_path, name, mechanism):
    folder = edit(write(tmp_path / "x", tiny(), "official"), lambda t: t.update({name: torch.zeros(3)}))
    with pytest.raises(ValueError, match=f"x has {name}: they are of {mechanism}"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("embed.weight", torch.int64, "embed.weight is I64: allowed are F64"),
        ("layers.0.ffn.gate.tid2eid", torch.float32, "tid2eid is F32: allowed are I64, I32"),
        ("norm.weight", torch.float8_e4m3fn, r"1 missing: norm.scale"),
        ("layers.1.attn.attn_sink", torch.float8_e4m3fn, "attn_sink is F8_E4M3: allowed"),
    ],
)
def test_a_flipped_dtype_is_named(tmp_path, name, kind, says):
    folder = write(tmp_path / "x", tiny(), "official")
    edit(folder, lambda t: t.update({name: t[name].to(kind)}))
    with pytest.raises(ValueError, match=says):
        load_pretrained(folder)


def test_a_model_does_not_depend_on_its_files(tmp_path):
    folder = write(tmp_path / "x", tiny(), "official")
    model = load_pretrained(folder)
    file = folder / "model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)  # the same file: memory that is mapped would change
    assert_equal(dict(model.state_dict()), made_up(tiny()))


# number formats ------------------------------------------------------------------------------------------------------

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def released(**changes) -> ModelConfig:
    """Sizes that the released formats take, with matrices that are no whole number of blocks."""
    sizes = {"head_dim": 68, "index_head_dim": 32, "hidden_size": 160, "moe_intermediate_size": 96, "q_lora_rank": 140}
    return tiny(**sizes, **changes)


def dequantised(codes, scales):
    """By the tables of the formats, a value at a time of each block."""
    exponents = scales.view(torch.uint8).double() - 127
    if codes.dtype == torch.int8:
        nibbles = torch.stack([codes.view(torch.uint8) & 15, codes.view(torch.uint8) >> 4], -1).flatten(1)
        return (E2M1[nibbles.long()].double() * (2.0**exponents).repeat_interleave(32, 1)).float()
    wide = (2.0**exponents).repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (codes.double() * wide[: codes.shape[0], : codes.shape[1]]).float()


@pytest.mark.parametrize("weights", ["fp8", "fp4"])
def test_released_formats(tmp_path, weights):
    torch.manual_seed(0)
    config = released()
    model = Transformer(config)
    save_pretrained(model, tmp_path / "x", "official", weights=weights, max_shard_size=200_000)
    data = json.loads((tmp_path / "x/config.json").read_text("utf-8"))
    assert data["expert_dtype"] == weights and data["quantization_config"]["weight_block_size"] == [128, 128]
    tensors = {}
    for file in (tmp_path / "x").glob("model-*.safetensors"):
        tensors |= load_file(file)
    kinds = {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()}
    for prefix in ("layers.1.", "mtp.0."):
        assert kinds[prefix + "attn.wq_a.weight"] == kinds[prefix + "ffn.shared_experts.w3.weight"] == "float8_e4m3fn"
        expert = prefix + "ffn.experts.4.w2"
        assert kinds[expert + ".weight"] == ("int8" if weights == "fp4" else "float8_e4m3fn")
        assert tensors[expert + ".scale"].shape == ((160, 3) if weights == "fp4" else (2, 1))
    plain = ("embed.weight", "head.weight", "layers.1.ffn.gate.weight", "layers.1.attn.compressor.wkv.weight")
    plain += ("layers.1.attn.indexer.weights_proj.weight", "layers.1.attn.indexer.compressor.wgate.weight")
    assert {kinds[name] for name in plain} == {"float32"} and kinds["mtp.0.e_proj.weight"] == "float8_e4m3fn"
    assert kinds["layers.1.attn.indexer.wq_b.weight"] == "float8_e4m3fn" and "embed.scale" not in kinds

    loaded = load_pretrained(tmp_path / "x")
    state, before = loaded.state_dict(), model.state_dict()
    assert state["layers.1.attn.wq_a.weight"].dtype == torch.bfloat16
    changed = 0
    for name in state:
        for part, place in sources(name, config, "official").items():
            want = before[name][place]
            if part.removesuffix("weight") + "scale" in tensors and part.endswith(".weight"):
                changed += 1
                want = dequantised(tensors[part], tensors[part.removesuffix("weight") + "scale"])
                apart = (want - before[name][place]).norm() / before[name][place].norm()
                assert 0.005 < apart < (0.04 if kinds[part] == "float8_e4m3fn" else 0.2), part
            assert torch.equal(state[name][place].to(want), want), part
    assert changed == (4 + 1) * 8 + 2 * 1 + 5 * 15 + 2

    save_pretrained(loaded, tmp_path / "again", "official", weights=weights, max_shard_size=200_000)
    assert_equal(load_pretrained(tmp_path / "again").state_dict(), state)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scale": None}, r"1 missing: layers.1.attn.wq_b.scale"),
        ({"other": lambda t: t["scale"].clone()}, r"1 unexpected: layers.1.attn.wq_b.other"),
        ({"scale": lambda t: t["scale"][:1].clone()}, r"wq_b.scale has shape \(1, 2\): .* needs \(3, 2\)"),
        ({"scale": lambda t: t["scale"].float()}, r"wq_b.scale is F32: allowed is F8_E8M0"),
        ({"weight": lambda t: t["weight"][:, 1:].contiguous()}, r"wq_b.weight has shape \(272, 139\)"),
        ({"weight": lambda t: t["weight"].view(torch.int8)}, r"wq_b.weight has shape .* in e2m1 needs \(272, 70\)"),
    ],
)  # fmt: skip
def test_broken_quantised_tensors_are_named(tmp_path, change, says):
    save_pretrained(Transformer(released()), tmp_path / "x", "official", weights="fp8")

    def apply(tensors):
        own = {key: tensors.pop(f"layers.1.attn.wq_b.{key}") for key in ("weight", "scale")}
        new = own | {key: make and make(own) for key, make in change.items()}
        tensors.update({f"layers.1.attn.wq_b.{key}": t for key, t in new.items() if t is not None})

    folder = edit(tmp_path / "x", apply)
    with pytest.raises(ValueError, match=says):
        load_pretrained(folder)


def test_formats_that_do_not_go(tmp_path):
    model = Transformer(released())
    with pytest.raises(ValueError, match="huggingface layout holds exact weights only"):
        save_pretrained(model, tmp_path / "x", weights="fp8")
    with pytest.raises(ValueError, match="weights='fp6': allowed are 'exact', 'fp8', 'fp4'"):
        save_pretrained(model, tmp_path / "x", "official", weights="fp6")
    with pytest.raises(ValueError, match="multiple of 32, because expert_dtype is 'fp4'"):
        save_pretrained(Transformer(tiny(head_dim=68, index_head_dim=32)), tmp_path / "x", "official", weights="fp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("start", ["official", "huggingface", "fp4"])
@pytest.mark.parametrize("target", ["official", "huggingface", "fp8", "fp4"])
def test_converting_is_loading_and_saving(tmp_path, start, target):
    def how(kind):
        return {"layout": kind} if kind in LAYOUTS else {"layout": "official", "weights": kind}

    torch.manual_seed(0)
    save_pretrained(Transformer(released()), tmp_path / "start", max_shard_size=100_000, **how(start))
    convert_pretrained(
        tmp_path / "start", tmp_path / "converted", max_shard_size=300_000, dtype=torch.float32, **how(target)
    )
    loaded = load_pretrained(tmp_path / "start", dtype=torch.float32)
    save_pretrained(loaded, tmp_path / "saved", max_shard_size=300_000, **how(target))
    names = sorted(file.name for file in (tmp_path / "saved").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "converted").iterdir()) and len(names) > 3
    for name in names:
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes(), name


def test_converting_keeps_dtypes_and_refuses_its_source(tmp_path):
    folder = write(
        tmp_path / "x",
        tiny(),
        "official",
        {n: t.bfloat16() if t.is_floating_point() else t for n, t in made_up(tiny()).items()},
    )
    convert_pretrained(folder, tmp_path / "y")
    assert load_pretrained(tmp_path / "y").embed.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="must not be written over"):
        convert_pretrained(folder, tmp_path / "z" / ".." / "x")
    edit(
        folder, lambda t: t.update({"layers.0.ffn.experts.0.w1.weight": t["layers.0.ffn.experts.0.w1.weight"].float()})
    )
    with pytest.raises(ValueError, match=r"the parts of layers.0.ffn.experts.w13 are torch.bfloat16, torch.float32"):
        convert_pretrained(folder, tmp_path / "y")


def test_saving_again_replaces_weights_and_keeps_other_files(tmp_path):
    config, folder = tiny(), tmp_path / "x"
    write(folder, config, "official", limit=4096)
    (folder / "tokenizer.json").write_text("{}", "utf-8")
    other = {name: tensor + tensor.is_floating_point() for name, tensor in made_up(config).items()}
    write(folder, config, "huggingface", other)
    kept = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {f.name for f in folder.iterdir()} == kept
    assert_equal(read(folder, config), other)
    write(folder, config, "official", limit=4096)
    assert not (folder / "model.safetensors").exists()
    assert_equal(read(folder, config), made_up(config))
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


FAILURES = {
    "disk full": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "over the quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "interrupted": KeyboardInterrupt(),
}


@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("there", [True, False])
def test_a_failed_save_leaves_nothing_and_harms_nothing(tmp_path, monkeypatch, there, error):
    config, folder = tiny(), tmp_path / "x" / "y"
    if there:
        write(folder, config, "official")
    before = sorted(tmp_path.rglob("*"))
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return save_file(*args, **kwargs)

    monkeypatch.setattr(disk, "save_file", fail)
    kind = type(error) if isinstance(error, KeyboardInterrupt) else OSError
    with pytest.raises(kind) as found:
        write(folder, config, "huggingface", limit=4096)
    if kind is OSError:
        assert found.value.filename == str(folder) and "(nothing was changed)" in str(found.value)
    assert sorted(tmp_path.rglob("*")) == before
    if there:
        assert_equal(read(folder, config), made_up(config))


@pytest.mark.parametrize("where", ["file", "file/x", "file/x/y", "loop", "n" * 300, "/proc/x", "here", "here/inside"])
def test_places_that_cannot_be_written(tmp_path, where, monkeypatch):
    (tmp_path / "here" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "inside")
    (tmp_path / "file").write_text("a", "utf-8")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=r"\(nothing was changed\)"):
        write(tmp_path / where, tiny(), "official")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text("utf-8") == "a"


def test_a_limit_on_the_size_of_files(tmp_path):
    folder = write(tmp_path / "x", tiny(), "official")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(folder, tiny(), "huggingface")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert_equal(read(folder, tiny()), made_up(tiny()))


def test_a_save_follows_links_and_keeps_them(tmp_path):
    (tmp_path / "link").symlink_to("far/x")
    write(tmp_path / "link", tiny(), "official", limit=4096)
    (tmp_path / "link" / "other").symlink_to("nowhere")
    write(tmp_path / "link", tiny(), "official")
    assert (tmp_path / "link").is_symlink() and {path.name for path in (tmp_path / "far").iterdir()} == {"x"}
    kept = {"config.json", "generation_config.json", "model.safetensors", "other"}
    assert {path.name for path in (tmp_path / "far/x").iterdir()} == kept


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_new_files_have_the_rights_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = write(tmp_path / "x", tiny(), "official", limit=20_000)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    folder.chmod(0o750)
    assert write(folder, tiny(), "official").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("swaps", [True, False], ids=["one step", "two renames"])
@pytest.mark.parametrize("over", [True, False], ids=["over a folder", "to a new place"])
def test_a_save_that_is_killed_at_any_step(tmp_path, monkeypatch, over, swaps):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    if not swaps:
        monkeypatch.setattr(placing, "_swap", lambda one, other: False)
    found = saves.every_step(tmp_path, over)
    assert found["old"] > 10 and found["new"] > 4


def test_loading_brings_back_what_a_dead_save_had_moved_away(tmp_path):
    folder = write(tmp_path / "x", tiny(), "official")
    beside = tmp_path / ".x.writing-abcdefgh"
    beside.mkdir()
    folder.rename(beside / "old")
    assert_equal(read(folder, tiny()), made_up(tiny()))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_comes_back_if_the_second_of_two_renames_fails(tmp_path, monkeypatch):
    folder = write(tmp_path / "x", tiny(), "official")
    rename = os.rename

    def fail(source, target):
        if target == folder and source.name == "new" and not folder.exists():
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(placing, "_swap", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match=r"Input/output error \(nothing was changed\)"):
        write(folder, tiny(), "huggingface")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert_equal(read(folder, tiny()), made_up(tiny()))


def test_two_saves_to_one_place_do_not_destroy_each_other(tmp_path):
    with placing.replaced(tmp_path / "x") as first, placing.replaced(tmp_path / "x") as second:
        (first / "1").touch()
        (second / "2").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "1"]  # the one that came to its end later


def test_shards_respect_their_limit(tmp_path):
    folder = write(tmp_path / "x", tiny(), "official", limit=20_000)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    for file in set(weight_map.values()):
        with safe_open(folder / file, "pt") as tensors:
            names = list(tensors.keys())
            size = sum(tensors.get_tensor(name).nbytes for name in names)
        assert size <= 20_000 or len(names) == 1, file
        assert {weight_map[name] for name in names} == {file}


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_sizes_of_shards_that_are_none(tmp_path, limit):
    with pytest.raises(ValueError, match=f"max_shard_size={limit}: allowed are bytes, 1 or more"):
        write(tmp_path / "x", tiny(), "official", limit=limit)


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layout='gguf': allowed are 'huggingface', 'official'"):
        write(tmp_path / "x", tiny(), "gguf")


CONFIGS = {
    "tiny": tiny(),
    "yarn": tiny(rope_scaling={"factor": 16, "original_max_position_embeddings": 64, "beta_fast": 30, "beta_slow": 2}),
    "no mtp": tiny(num_nextn_predict_layers=0),
    "sliding": tiny(compress_ratios=[0] * 4, layer_types=[SLIDING] * 4),
    "null ids": tiny(bos_token_id=None, pad_token_id=3),
    "truncated product": tiny(head_dim=46, qk_rope_head_dim=26, index_head_dim=32),
    "bases": tiny(rope_theta=500.0, compress_rope_theta=777.0),
    "toy": replace(ModelConfig.load("toy"), engram=None),
    "long": ModelConfig.load("long"),
    "flash": replace(ModelConfig.load("v4-flash"), quantization_config=None, expert_dtype=None),
    "pro": replace(ModelConfig.load("v4-pro"), quantization_config=None, expert_dtype=None),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_configurations_pass_through_transformers(config):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DeepseekV4Config(**to_huggingface(config.to_dict()))
    assert theirs.qk_rope_head_dim == config.qk_rope_head_dim
    for written in (theirs.to_diff_dict(), theirs.to_dict()):
        assert ModelConfig.from_dict(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro"])
def test_transformers_version_of_a_released_configuration(name):
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.load(name)
    theirs = ModelConfig.from_dict(transformers.DeepseekV4Config(**config.to_dict()).to_diff_dict())
    assert replace(theirs, quantization_config=config.quantization_config) == config


def test_yarn_reaches_its_place():
    config = tiny(rope_scaling={"factor": 16, "original_max_position_embeddings": 64})
    written = to_huggingface(config.to_dict())["rope_parameters"]
    assert written["main"]["rope_type"] == "default" and written["main"]["rope_theta"] == 10_000
    assert written["compress"]["rope_type"] == "yarn" and written["compress"]["attention_factor"] == 1.0
    assert from_huggingface(to_huggingface(config.to_dict()))["rope_scaling"]["factor"] == 16
    assert config.rope_scaling == RopeScaling(factor=16, original_max_position_embeddings=64)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mlp_layer_types": ["dense"] * 4}, r"mlp_layer_types\[0\]='dense': allowed is 'hash_moe' or 'moe'"),
        ({"mlp_bias": True}, r"mlp_bias=True: allowed is False"),
        ({"router_jitter_noise": 0.1}, r"router_jitter_noise=0.1: allowed is 0.0"),
        ({"compress_rates": {SPARSE: 4}}, rf"layer_types has '{HEAVY}': compress_rates has {SPARSE}"),
        ({"layer_types": None}, r"missing keys: layer_types"),
        (
            {"rope_parameters": {"compress": {"rope_type": "yarn", "attention_factor": 1.2}}},
            r"attention_factor.*only 1.0",
        ),
        ({"rope_parameters": {"main": {"rope_type": "yarn"}}}, r"rope_parameters.main.rope_type='yarn'"),
        ({"rope_parameters": {"compress": {"rope_type": "llama3"}}}, r"rope_type='llama3'"),
        ({"rope_parameters": {"compress": {"rope_type": "yarn", "factor": 2}}}, r"original_max_position_embeddings"),
        ({"scoring_func": "softmax"}, r"scoring_func='softmax'"),
        ({"n_shared_experts": 2}, r"n_shared_experts=2: allowed is 1"),
        ({"compress_rates": {SPARSE: 4, HEAVY: 8, "x": 1}}, r"unknown key 'compress_rates.x'"),
        ({"rope_parameters": {"main": {}, "compress": {}, "x": 1}}, r"unknown key 'rope_parameters.x'"),
        ({"rope_parameters": {"main": {"rope_theta": 5.0}}}, r"missing keys: rope_parameters.compress"),
        ({"rope_parameters": {"rope_theta": 5.0}}, r"rope_parameters.rope_theta=5.0: allowed is 10000"),
        (
            {"rope_parameters": {"main": {"factor": 2}, "compress": {"rope_theta": 5.0}}},
            r"rope_parameters.main.factor=2",
        ),
        (
            {"rope_parameters": {"main": {}, "compress": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}}},
            r"rope_parameters.compress.partial_rotary_factor=0.5: allowed is qk_rope_head_dim=4 of head_dim=12",
        ),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\]: allowed is int"),
    ],
)
def test_configurations_that_are_not_v4_are_refused(changes, words):
    with pytest.raises((ValueError, TypeError), match=words):
        ModelConfig.from_dict({**to_huggingface(tiny().to_dict()), **changes})


@pytest.mark.parametrize(
    "config, words",
    [
        (tiny(n_shared_experts=2), r"n_shared_experts=2: transformers has exactly one"),
        (tiny(compress_ratios=[0, 4, 8, 8]), rf"{SPARSE} layers have the ratios \[4, 8\]"),
    ],
)
def test_configurations_that_transformers_cannot_hold_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        to_huggingface(config.to_dict())


@pytest.fixture(scope="module")
def peer():
    """A transformers model of the tiny configuration."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**to_huggingface(tiny().to_dict())))


@pytest.mark.parametrize("original, layout", [(True, "hybrid"), (False, "huggingface")])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_reads_what_transformers_writes(tmp_path, peer, original, layout, shard):
    peer.save_pretrained(tmp_path, save_original_format=original, max_shard_size=shard)
    assert Stored(tmp_path).layout == layout
    config = ModelConfig.load(tmp_path / "config.json")
    assert config == tiny()
    config = replace(config, num_nextn_predict_layers=0)
    state = read(tmp_path, config)
    theirs = peer.state_dict()
    for name, tensor in state.items():
        for source, index in sources(name, config, "huggingface").items():
            assert torch.equal(tensor[index], theirs[source]), source


def test_transformers_reads_what_is_written_here(tmp_path):
    transformers = pytest.importorskip("transformers")
    config, state = tiny(), made_up(tiny())
    folder = write(tmp_path / "x", config, "huggingface", state, limit=20_000)
    theirs, info = transformers.DeepseekV4ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    loaded = theirs.state_dict()
    for name, tensor in state.items():
        for source, index in sources(name, config, "huggingface").items():
            if not name.startswith("mtp."):
                assert torch.equal(loaded[source], tensor[index]), source


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_survives_saving_and_loading(tmp_path, layout):
    torch.manual_seed(0)
    model = Transformer(replace(tiny(), torch_dtype="bfloat16"))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == model_tensors(tiny())
    save_pretrained(model, tmp_path / "x", layout=layout)
    loaded = load_pretrained(tmp_path / "x")
    assert loaded.config == tiny()  # torch_dtype says what was written
    assert_equal(loaded.state_dict(), model.state_dict())
    assert all(p.requires_grad for p in loaded.parameters()) and not any(p.is_meta for p in loaded.parameters())
    half = load_pretrained(tmp_path / "x", dtype=torch.bfloat16)
    save_pretrained(loaded.double(), tmp_path / "double", layout=layout)
    assert ModelConfig.load(tmp_path / "double" / "config.json").torch_dtype == "float64"
    kinds = {name: p.dtype for name, p in half.named_parameters()}
    assert kinds["embed.weight"] == torch.bfloat16 and kinds["layers.0.hc_attn.fn"] == torch.float32


def fewer_experts(model):
    experts = model.layers[1].ffn.experts
    experts.w13 = torch.nn.Parameter(experts.w13.detach()[:4])


def one_more(model):
    model.layers[1].attn.wq_a.bias = torch.nn.Parameter(torch.zeros(10))


def one_less(model):
    model.layers[1].attn.wq_a = torch.nn.Identity()


def no_numbers(model):
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().to(torch.complex64))


@pytest.mark.parametrize("change, says", [
    (fewer_experts, r"layers\.1\.ffn\.experts\.w13 has shape \(4, 14, 24\): the configuration needs \(5, 14, 24\)"),
    (one_more, r"1 unexpected: layers\.1\.attn\.wq_a\.bias"), (one_less, r"1 missing: layers\.1\.attn\.wq_a\.weight"),
    (no_numbers, r"head\.weight is torch\.complex64: allowed are torch\.float64"),
])  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_that_could_not_be_loaded_is_not_saved(tmp_path, layout, change, says):
    model = Transformer(tiny())
    save_pretrained(model, tmp_path / "x", layout)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(model)
    with pytest.raises(ValueError, match=says):
        save_pretrained(model, tmp_path / "x", layout)
    assert_equal(load_pretrained(tmp_path / "x").state_dict(), state)


def test_a_model_without_its_mtp_block_is_saved(tmp_path):
    model = Transformer(tiny())
    model.mtp = torch.nn.ModuleList()
    save_pretrained(model, tmp_path / "x", "official")
    assert not load_pretrained(tmp_path / "x").config.num_nextn_predict_layers


def test_weights_that_share_memory_and_compiled_models(tmp_path):
    model = Transformer(tiny())
    model.head.weight = model.embed.weight
    model.norm.weight = torch.nn.Parameter(torch._neg_view(model.norm.weight.detach()))
    save_pretrained(torch.compile(model), tmp_path / "x")
    assert_equal(load_pretrained(tmp_path / "x").state_dict(), model.state_dict())


def test_a_checkpoint_without_mtp_loads_as_a_model_without_it(tmp_path, peer):
    peer.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    assert model.config == replace(tiny(), num_nextn_predict_layers=0) and len(model.mtp) == 0

"""Every parameter of every shipped model against a table of its own: rule, decay, and which matrices it holds."""

import re
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch

from abyssal.model import ModelConfig, Transformer
from abyssal.model.tables import row_tables
from abyssal.train.cli import main
from abyssal.train.optim import build_optimizer, parameter_groups
from abyssal.train.optim.rules import Widths, parameter_rules, rule_lines, rule_of, rule_table
from abyssal.train.settings import OptimConfig

PRESETS = ("nano", "toy", "small", "long", "v4-flash", "v4-pro")
BLOCK = r"(layers|mtp)\.\d+"
COMPRESSOR = rf"{BLOCK}\.attn\.(indexer\.)?compressor"

# of each kind of parameter: its name, its rule when linear maps have Muon, and the shapes [stack, n, m] of its matrices
# with and without `head_wise`; letters are those of `sizes`, and no shapes means that none are asked for
TABLE = [
    (r"embed\.weight", "adamw", None, None),
    (r"head\.weight", "adamw", None, None),
    (r"(.*\.)?norm\.weight", "adamw", None, None),
    (rf"{BLOCK}\.(attn_norm|ffn_norm|enorm|hnorm|attn\.q_norm|attn\.kv_norm)\.weight", "adamw", None, None),
    (rf"({BLOCK}\.hc_attn|{BLOCK}\.hc_ffn|(mtp\.\d+\.)?hc_head)\.(base|scale)", "adamw", None, None),
    (rf"{BLOCK}\.attn\.attn_sink", "adamw", None, None),
    (rf"{COMPRESSOR}\.ape", "adamw", None, None),
    (r"layers\.\d+\.engram\.(h_norm|k_norm|conv_norm|conv)", "adamw", None, None),
    (r"layers\.\d+\.engram\.table\.weight", "adam", None, None),
    (rf"{BLOCK}\.hc_(attn|ffn)\.fn", "muon", "1,s,sd 1,s,sd 1,ss,sd", None),
    (r"(mtp\.\d+\.)?hc_head\.fn", "muon", "1,s,sd", None),
    (rf"{BLOCK}\.attn\.wq_a\.weight", "muon", "1,q,d", None),
    (rf"{BLOCK}\.attn\.wq_b\.weight", "muon", "1,hc,q", "h,c,q"),
    (rf"{BLOCK}\.attn\.wkv\.weight", "muon", "1,c,d", None),
    (rf"{BLOCK}\.attn\.wo_a\.weight", "muon", "1,gr,hc/g", "g,r,hc/g"),
    (rf"{BLOCK}\.attn\.wo_b\.weight", "muon", "1,d,gr", None),
    (rf"{BLOCK}\.attn\.compressor\.(wkv|wgate)\.weight", "muon", "1,oc,d", "o,c,d"),
    (rf"{BLOCK}\.attn\.indexer\.compressor\.(wkv|wgate)\.weight", "muon", "1,oi,d", "o,i,d"),
    (rf"{BLOCK}\.attn\.indexer\.wq_b\.weight", "muon", "1,ni,q", "n,i,q"),
    (rf"{BLOCK}\.attn\.indexer\.weights_proj\.weight", "muon", "1,n,d", None),
    (rf"{BLOCK}\.ffn\.gate\.weight", "muon", "1,E,d", None),
    (rf"{BLOCK}\.ffn\.experts\.w13", "muon", "2E,f,d", None),
    (rf"{BLOCK}\.ffn\.experts\.w2", "muon", "E,d,f", None),
    (rf"{BLOCK}\.ffn\.shared_experts\.w13\.weight", "muon", "2,f,d", None),
    (rf"{BLOCK}\.ffn\.shared_experts\.w2\.weight", "muon", "1,d,f", None),
    (r"layers\.\d+\.engram\.wkv\.weight", "muon", "S,d,e", None),
    (r"mtp\.\d+\.(e_proj|h_proj)\.weight", "muon", "1,d,d", None),
]


def sizes(config: ModelConfig, name: str) -> dict[str, int]:
    layer = re.search(r"layers\.(\d+)", name)
    overlapping = layer and config.layer_kind(int(layer[1])) == "compressed_sparse_attention"
    memory = config.engram
    return {
        **{"d": config.hidden_size, "s": config.hc_mult, "S": config.hc_mult + 1, "q": config.q_lora_rank},
        **{"h": config.num_attention_heads, "c": config.head_dim, "g": config.o_groups, "r": config.o_lora_rank},
        **{"n": config.index_n_heads, "i": config.index_head_dim, "o": 2 if overlapping else 1},
        **{"E": config.n_routed_experts, "f": config.moe_intermediate_size},
        "e": (memory.max_ngram - 1) * memory.heads * memory.head_dim if memory else 0,
    }


def shapes(text: str, size: dict[str, int]) -> list[tuple[int, ...]]:
    """`"1,s,sd 2,f,d"` as shapes: neighbouring letters multiply, a slash divides."""

    def value(product: str) -> int:
        above, _, below = product.partition("/")
        total = 1
        for letter in above:
            total *= size[letter] if letter.isalpha() else int(letter)
        return total // (size[below] if below else 1)

    return [tuple(value(part) for part in matrix.split(",")) for matrix in text.split(" ")]


def held(rule, shape) -> list[tuple[int, ...]]:
    """Shapes [stack, n, m] of a rule's matrices, equal neighbours together."""
    stack = shape[0] if len(shape) == 3 else 1
    found: list[tuple[int, ...]] = []
    for rows in rule.rows:
        if found and found[-1][1] == rows:
            found[-1] = (found[-1][0] + stack, rows, shape[-1])
        else:
            found.append((stack, rows, shape[-1]))
    return found


def merged(matrices: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    out: list[tuple[int, ...]] = []
    for count, n, m in matrices:
        if out and out[-1][1:] == (n, m):
            out[-1] = (out[-1][0] + count, n, m)
        else:
            out.append((count, n, m))
    return out


@pytest.fixture(scope="module")
def models():
    with torch.device("meta"):
        return {name: Transformer(ModelConfig.load(name)) for name in PRESETS}


@pytest.mark.parametrize("head_wise", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_of_every_preset_has_the_rule_of_the_table(models, preset, head_wise):
    model = models[preset]
    rules = parameter_rules(model, OptimConfig(rule="muon", head_wise=head_wise))
    assert list(rules) == [name for name, _ in model.named_parameters()]
    if preset == "nano":
        assert not [row[0] for row in TABLE if not any(re.fullmatch(row[0], name) for name in rules)], "unused lines"
    for name, parameter in model.named_parameters():
        matching = [row for row in TABLE if re.fullmatch(row[0], name)]
        assert len(matching) == 1, f"{name}: {matching}"
        _, rule, whole, by_head = matching[0]
        assert rules[name].name == rule, name
        assert rules[name].reason, name
        if whole:
            text = by_head if head_wise and by_head else whole
            want = merged(shapes(text, sizes(model.config, name)))
            assert held(rules[name], parameter.shape) == want, name
            assert sum(rules[name].rows) == parameter.shape[-2], name


@pytest.mark.parametrize("preset", PRESETS)
def test_with_adamw_linear_maps_and_the_head_decay_and_nothing_else(models, preset):
    groups = parameter_groups(models[preset], OptimConfig())
    maps = [row[0] for row in TABLE if row[1] == "muon"]
    for name, _ in models[preset].named_parameters():
        decays = name == "head.weight" or any(re.fullmatch(pattern, name) for pattern in maps)
        table = name.endswith("engram.table.weight")
        assert name in groups["tables" if table else "matrices" if decays else "vectors"], name
    assert not groups["muon"] and not groups["balanced"]


def test_v4_1_s_rules_are_for_tables_embedding_and_head_only(models):
    plain = parameter_rules(models["nano"], OptimConfig())
    rules = parameter_rules(models["nano"], OptimConfig(engram_rule="balanced", embedding_rule="balanced"))
    changed = {name: rules[name].name for name in rules if rules[name] != plain[name]}
    assert changed == dict.fromkeys(("embed.weight", "head.weight", "layers.1.engram.table.weight"), "balanced")
    assert rules["layers.1.engram.table.weight"].group == "tables", "faster than the others"


def test_what_no_line_names_is_a_linear_map_or_a_vector_and_stacks_must_be_known():
    rule = OptimConfig(rule="muon")
    assert rule_of("layers.0.mix.weight", (6, 4), rule, Widths())[:3] == ("muon", "muon", (6,))
    assert rule_of("layers.0.bias", (6,), rule, Widths())[:3] == ("adamw", "vectors", ())
    with pytest.raises(ValueError, match=r"layers\.0\.mix \(2, 6, 4\): optim\.rule='muon' knows no matrices in it"):
        rule_of("layers.0.mix", (2, 6, 4), rule, Widths())
    assert rule_of("layers.0.mix", (2, 6, 4), OptimConfig(), Widths()).name == "adamw"


def test_a_table_in_a_store_has_the_rule_of_a_table_among_the_weights():
    config = ModelConfig.load("nano")
    optim = OptimConfig(rule="muon", engram_rule="balanced")
    among = Transformer(config)
    with row_tables():
        apart = Transformer(config)
    assert parameter_rules(apart, optim) == parameter_rules(among, optim)
    assert rule_lines(apart, optim) == rule_lines(among, optim)


def test_frozen_parameters_have_no_rule():
    model = Transformer(ModelConfig.load("nano"))
    model.embed.weight.requires_grad_(False)
    rules = parameter_rules(model, OptimConfig())
    assert "embed.weight" not in rules and "head.weight" in rules
    learning = {p for group in build_optimizer(model, OptimConfig()).param_groups for p in group["params"]}
    assert learning == {p for p in model.parameters() if p.requires_grad}


def test_the_table_shows_each_kind_once_with_its_count_and_matrices(models):
    lines = rule_lines(models["nano"], OptimConfig(rule="muon"))
    names = [name for name, _ in models["nano"].named_parameters()]
    assert sum(line.copies for line in lines) == len(names)
    by_name = {(line.parameter, line.matrices): line for line in lines}
    experts = by_name["layers.*.ffn.experts.w13", "16 of 64 x 64"]
    assert experts.copies == 5 and experts.rule == "muon" and "each expert by itself" in experts.reason
    assert ("layers.*.hc_attn.fn", "2 of 4 x 256, 1 of 16 x 256") in by_name
    assert by_name["embed.weight", "260 x 64"].rule == "adamw"
    text = rule_table(lines).splitlines()
    assert len(text) == len(lines) + 1 and text[0].split() == ["parameter", "of", "it", "rule", "matrices", "why"]
    assert len({line.index(word) for line, word in ((text[0], "rule"), (text[1], "adamw"))}) == 1, "columns line up"


def test_widths_of_a_model_without_a_configuration():
    assert Widths.of(None, True) == Widths()
    config = SimpleNamespace(hidden_size=8, head_dim=4, index_head_dim=2, o_lora_rank=3)
    assert Widths.of(config, False) == (8, 0, 0, 0) and Widths.of(config, True) == (8, 4, 2, 3)


def rules_shown(capsys, *arguments: str) -> list[list[str]]:
    assert main(["info", *arguments]) == 0
    lines = capsys.readouterr().out.split("\nparameter ")[1].splitlines()[1:]
    return [line.split() for line in lines]


def test_info_shows_the_rules_of_a_recipe_or_under_another(capsys, tmp_path):
    shown = {(words[0], words[2]) for words in rules_shown(capsys, "nano", "--rules")}
    assert ("layers.*.attn.wq_a.weight", "adamw") in shown and ("layers.*.engram.table.weight", "adam") in shown
    shown = {(words[0], words[2]) for words in rules_shown(capsys, "v4-flash", "--rules", "muon")}
    assert ("layers.*.attn.wq_a.weight", "muon") in shown and ("head.weight", "adamw") in shown
    text = (files("abyssal.configs") / "nano.toml").read_text("utf-8")
    (tmp_path / "mine.toml").write_text(text.replace("[optim]", "[optim]\nrule = 'muon'\nhead_wise = true"), "utf-8")
    maps = [words for words in rules_shown(capsys, str(tmp_path / "mine.toml"), "--rules") if words[2] == "muon"]
    assert [words[3] for words in maps if words[0] == "layers.*.attn.wq_b.weight"] == ["4"], "a matrix per head"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["v3", "--rules"], "--rules: 'v3' is no model that is trained here: allowed are V4's"),
        (["nano", "--rules", "sgd"], "optim.rule='sgd': allowed is adamw or muon"),
    ],
)
def test_rules_that_cannot_be_shown(capsys, arguments, message):
    assert main(["info", *arguments]) == 2
    assert message in capsys.readouterr().err

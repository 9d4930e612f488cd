"""A recipe: one TOML file with the tables [model], [data], [optim] and [train] that says all of a training run.

A run that learns conversations has [chat] too, one that learns generated tasks [reason], from rewards with [grpo], from
a teacher with [distil]. [schedule] says what changes on the way, [[stages]] that a run has several (train.steps is
their sum then), [stability] that it looks out for spikes of the loss.

    recipe = load_recipe("toy", ["optim.lr=1e-3", "train.steps=200"])

Keys of [model] are those of `ModelConfig`, those of the other tables stand in `settings`. An unknown key is an error
that names the nearest one. `base = "toy"` above the tables takes what is not said from there; "none" in place of an
optional table, `model.engram` or `stability`, leaves it out.
"""

import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..model.config import ModelConfig, laid_over, read_recipe, shipped
from ..model.fields import LIST, NONE, build, typed, unknown
from ..model.folders import STATE, model_folder, read_json
from ..model.interchange import config_in
from ..model.kinds import SPARSE
from . import own
from .data.places import STDLIB, absolute
from .data.planted import planted_task
from .data.tokenizers import BOS, SPECIAL_TOKENS, ByteTokenizer, bpe_size, load_tokenizer
from .settings import (
    OPTIONAL,
    PLANTED,
    STAGES,
    TABLES,
    ChatConfig,
    DataConfig,
    DistilConfig,
    GrpoConfig,
    OptimConfig,
    PlantedConfig,
    ReasonConfig,
    RolloutConfig,
    ScheduleConfig,
    StabilityConfig,
    StageConfig,
    Table,
    TrainConfig,
)

INIT = "init"  # data.tokenizer: that of what the run starts from
NAMES = ("model", STAGES, *TABLES, *OPTIONAL)
MAY_BE_NONE = (STAGES, *OPTIONAL)
TOKENIZERS = ("bytes", INIT)  # what data.tokenizer says by name


@dataclass(frozen=True)
class Recipe:
    name: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    stages: tuple[StageConfig, ...] = ()
    chat: ChatConfig | None = None
    planted: PlantedConfig | None = None
    stability: StabilityConfig | None = None
    reason: ReasonConfig | None = None
    grpo: GrpoConfig | None = None
    distil: DistilConfig | None = None

    def __post_init__(self) -> None:
        _check_schedule(self)
        _check_data(self)
        if self.rollouts and not self.reason:
            raise ValueError(f"[{self.rollouts.name}] without [reason]: allowed with problems that it can answer")
        if self.grpo and self.distil:
            raise ValueError("[distil] beside [grpo]: allowed is one of them")
        if self.train.engram_tables != "resident" and self.optim.engram_rows != "touched":
            where = f"train.engram_tables={self.train.engram_tables!r}"
            raise ValueError(f"{where}: allowed with optim.engram_rows='touched' only: other updates read every row")

    @property
    def rollouts(self) -> RolloutConfig | None:
        """The table of a run that learns from what it writes."""
        return self.grpo or self.distil

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `Recipe.from_dict` of it is equal."""
        present = [name for name in (*TABLES, *OPTIONAL) if getattr(self, name) is not None]
        tables = {name: {k: _plain(v) for k, v in asdict(getattr(self, name)).items()} for name in present}
        stages = {STAGES: [asdict(stage) for stage in self.stages]} if self.stages else {}
        return {"name": self.name, "model": self.model.to_dict(), **tables, **stages}

    def with_absolute_paths(self) -> "Recipe":
        """The same with data.source, data.tokenizer, train.init and distil.teacher from the root on, where they are
        existing paths.
        """
        data, init = self.data, absolute(self.train.init)
        source = data.source if data.source == STDLIB else absolute(data.source)
        if source.startswith(PLANTED):
            source = PLANTED + own.absolute(source.removeprefix(PLANTED))
        tokenizer = data.tokenizer if data.tokenizer in TOKENIZERS else absolute(data.tokenizer)
        data = replace(data, source=source, tokenizer=tokenizer)
        train = replace(self.train, init=init, prepare=own.absolute(self.train.prepare))
        distil = self.distil and replace(self.distil, teacher=absolute(self.distil.teacher))
        return replace(self, data=data, train=train, distil=distil)

    def with_seed(self, seed: int) -> "Recipe":
        """The same with that train.seed."""
        return replace(self, train=replace(self.train, seed=seed))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Raises ValueError for an unknown table or key, a missing [model], or a bad value."""
        if not isinstance(values, Mapping):
            raise ValueError(f"recipe={values!r}: allowed is a table")
        for table in values:
            if table not in ("name", *NAMES):
                raise unknown("table", table, NAMES, "[{}]".format)
        values = present(values)
        if "model" not in values:
            raise ValueError(f"recipe {values.get('name', '')!r} has no table [model]")
        if not isinstance(values["model"], Mapping):
            raise ValueError(f"model={values['model']!r}: allowed is a table [model]")
        tables = {name: of_kind(kind, values.get(name, {})) for name, kind in TABLES.items()}
        tables |= {name: of_kind(kind, values[name]) for name, kind in OPTIONAL.items() if name in values}
        if STAGES in values:
            tables[STAGES] = _stages(values[STAGES])
            if "steps" not in values.get("train", {}):
                tables["train"] = replace(tables["train"], steps=sum(stage.steps for stage in tables[STAGES]))
        return cls(values.get("name", "unnamed"), ModelConfig.from_dict(values["model"]), **tables)


def present(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those tables of a recipe that are not left out."""
    return {table: value for table, value in values.items() if value != NONE or table not in MAY_BE_NONE}


def of_kind(kind: type[Table], values: Any) -> Any:
    """A table out of its keys. Raises TypeError or ValueError naming the one that is wrong."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind.name}={values!r}: allowed is a table [{kind.name}]")
    return build(kind, _renamed(values) if kind is TrainConfig else values, f"{kind.name}.", see=LIST)


def _renamed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """[train] with the keys of earlier recipes under their present names: tensorboard = true is one of `log`."""
    if "tensorboard" not in values:
        return values
    rest, wanted = dict(values), typed("train.tensorboard", values["tensorboard"], bool)
    del rest["tensorboard"]
    others = [name for name in rest.get("log", ()) if name != "tensorboard"]
    return {**rest, "log": [*others, *["tensorboard"] * wanted]}


def _check_data(recipe: Recipe) -> None:
    """The tokens of the data fit into the model's vocabulary, and [planted] belongs to a planted source."""
    model, source = recipe.model, recipe.data.source
    if recipe.chat:
        _check_chat(recipe)
    if source.startswith(PLANTED):
        least = planted_task(source, recipe.planted).vocabulary
        if model.vocab_size < least:
            raise ValueError(f"model.vocab_size={model.vocab_size}: allowed is at least {least}, for {source}")
        if not recipe.data.held_out_rows:
            raise ValueError(f"data.held_out_rows=0: allowed is 1 or more: the rows of {source} never end")
        return
    if recipe.planted:
        raise ValueError(f"[planted] is for sources that begin with {PLANTED!r}: data.source={source!r}")
    size = bpe_size(recipe.data.tokenizer)
    if recipe.reason and recipe.data.tokenizer != "bytes":
        raise ValueError(f"data.tokenizer={recipe.data.tokenizer!r}: allowed with [reason] is bytes")
    if recipe.data.tokenizer != "bytes" and size is None:
        return  # a path: what is there is checked when it is read
    bos = BOS if size is None else size - SPECIAL_TOKENS
    check_vocabulary(model, recipe.data.tokenizer, bos + 1, bos, bos + 1, bos + 2)


def _check_chat(recipe: Recipe) -> None:
    """Conversations are not also problems or a planted task, and train no tokenizer."""
    for table in ("planted", "reason", "grpo", "distil"):
        if getattr(recipe, table):
            raise ValueError(f"[{table}] beside [chat]: allowed is one of them")
    if recipe.data.source.startswith(PLANTED):
        raise ValueError(f"data.source={recipe.data.source!r}: allowed with [chat] are conversations")
    if bpe_size(recipe.data.tokenizer) is not None:
        raise ValueError(
            f"data.tokenizer={recipe.data.tokenizer!r}: allowed with [chat] is bytes, or the folder of one"
        )


def check_vocabulary(model: ModelConfig, tokenizer: str, least: int, bos: int, eos: int, pad: int) -> None:
    """Raises ValueError unless the model has the rows that a tokenizer's text takes, and, where it has one, its bos."""
    named, special = f"for data.tokenizer={tokenizer!r}", f"eos_token_id is {eos}, pad_token_id {pad}"
    if model.vocab_size < least:
        raise ValueError(
            f"model.vocab_size={model.vocab_size}: allowed is at least {least} (tokens of text and bos), {named}"
            f" (bos_token_id is {bos}, {special})"
        )
    if model.bos_token_id not in (None, bos):
        raise ValueError(f"model.bos_token_id={model.bos_token_id}: allowed is {bos}, {named} ({special})")


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by name, or a .toml file, with `table.key=value` overrides laid over it.

    A recipe without [model] learns on with the model that train.init names, and with `data.tokenizer = "init"` in its
    tokens.

    Raises:
        ValueError: no such recipe, an override that is not `table.key=value`, an unknown key, or a bad value.
    """
    values = {"name": Path(name_or_path).stem, **read_recipe(name_or_path)}
    asked = apply(values, overrides)
    if str(name_or_path) in shipped() or not Path(name_or_path).is_dir():  # whose recipe is somebody else's
        own.allow(*own_code(asked))
    return Recipe.from_dict(_started(asked, "model" not in values))


def own_code(values: Mapping[str, Any]) -> list[str]:
    """The references to code of one's own in a recipe's tables, and '' for none."""
    source, prepare = values.get("data", {}).get("source", ""), values.get("train", {}).get("prepare", "")
    planted = isinstance(source, str) and source.startswith(PLANTED)
    return [source.removeprefix(PLANTED) if planted else "", str(prepare)]


def _started(values: dict[str, Any], takes_model: bool) -> dict[str, Any]:
    """A recipe's tables with the model and the tokenizer of what it starts from, where it takes them from there."""
    train, data = values.get("train", {}), values.get("data", {})
    takes_tokens = data.get("tokenizer") == INIT
    if not (takes_model or takes_tokens):
        return values
    if not train.get("init"):
        what = "[model]" if takes_model else f"data.tokenizer={INIT!r}"
        raise ValueError(f"{values['name']!r} takes {what} from the model that it starts from: give train.init=RUN")
    folder = model_folder(train["init"])
    if takes_tokens:
        learnt = read_json(folder / STATE)["recipe"].get("data", {}) if (folder / STATE).is_file() else {}
        if str(learnt.get("source", "")).startswith(PLANTED):
            raise ValueError(f"{str(folder)!r} was trained on {learnt['source']}: its tokens spell no text")
        in_bytes = learnt.get("tokenizer") == ByteTokenizer.name
        in_bytes = in_bytes or isinstance(load_tokenizer(folder), ByteTokenizer)
        values = {**values, "data": {**data, "tokenizer": ByteTokenizer.name if in_bytes else str(folder)}}
    if takes_model:
        found = config_in(folder)
        if not isinstance(found, ModelConfig):
            raise ValueError(f"train.init={train['init']!r} is of {found.model_type}: allowed are models of V4")
        stored = {
            key: value for key, value in found.to_dict().items() if key not in ("quantization_config", "expert_dtype")
        }
        values = {**values, "model": laid_over({**stored, "torch_dtype": "float32"}, values.get("model", {}))}
    return values


def apply(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with `a.b.c=value` set for each override; values are read as TOML, a bare word as a string.

    `table=none` leaves an optional table out, of the recipe or (`model.engram=none`) of another table.
    """
    result = deepcopy(dict(values))
    for override in overrides:
        path, equals, text = override.partition("=")
        names, removes = path.strip().split("."), text.strip() == NONE
        if not equals or (len(names) < 2 and not removes) or not all(names):
            raise ValueError(f"--set {override!r}: allowed is table.key=value, for example optim.lr=1e-3")
        if names[0] not in NAMES:
            raise ValueError(f"--set {override!r}: {unknown('table', names[0], NAMES)}")
        if len(names) < 2 and names[0] not in MAY_BE_NONE:
            raise ValueError(f"--set {override!r}: allowed as none are {', '.join(MAY_BE_NONE)}")
        table = result
        for name in names[:-1]:
            table = _within(override, table, name)
        if not isinstance(table, dict):
            raise ValueError(f"--set {override!r}: {names[-2]!r} is a list: allowed is {names[-2]}.0.key=value")
        table[names[-1]] = _parse(text.strip())
    return result


def _within(override: str, table: Any, name: str) -> Any:
    """The table or list of tables `name` of a table, made if it is missing, or the table of that number of a list."""
    if isinstance(table, list):
        if not name.isdigit() or int(name) >= len(table):
            raise ValueError(f"--set {override!r}: {name!r}: allowed are 0 to {len(table) - 1}")
        return table[int(name)]
    inner = table.setdefault(name, {})
    if not isinstance(inner, dict | list):
        what = f"left out ({name}=none)" if inner == NONE else "a value, not a table"
        raise ValueError(f"--set {override!r}: {name!r} is {what}")
    return inner


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`table.key: old -> new` for every key that differs (names of recipes aside)."""
    before, after = old.to_dict(), new.to_dict()
    found = []
    for table in ("model", *TABLES, *OPTIONAL):
        ours, theirs = before.get(table, {}), after.get(table, {})
        for name in sorted({*ours, *theirs}):
            a, b = ours.get(name), theirs.get(name)
            if a != b:
                found.append(f"{table}.{name}: {a!r} -> {b!r}")
    if before.get(STAGES) != after.get(STAGES):
        found.append(f"{STAGES}: {before.get(STAGES, [])} -> {after.get(STAGES, [])}")
    return found


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _stages(values: Any) -> tuple[StageConfig, ...]:
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{STAGES}={values!r}: allowed are one or more tables [[{STAGES}]]")
    return tuple(of_kind(StageConfig, value) for value in values)


def _check_schedule(recipe: Recipe) -> None:
    """That stages, ramp and model fit together."""
    stages, ramp, steps = recipe.stages, recipe.schedule, recipe.train.steps
    total = sum(stage.steps for stage in stages)
    if stages and steps != total:
        raise ValueError(f"train.steps={steps}: allowed is {total}, the sum of the stages (or leave it out)")
    starts = accumulate((stage.steps for stage in stages), initial=0)
    ramped = [stage for first, stage in zip(starts, stages) if first < ramp.batch_ramp_steps]
    sizes = [stage.batch_size or recipe.data.batch_size for stage in ramped] or [recipe.data.batch_size]
    if ramp.batch_ramp_steps and ramp.batch_start > min(sizes):
        raise ValueError(f"schedule.batch_start={ramp.batch_start}: allowed are 1 to {min(sizes)}, the ramp's batch")
    sparse = SPARSE in recipe.model.layer_types
    for number, stage in enumerate(stages):
        if stage.attention == "warmup" and not sparse:
            raise ValueError(f"stages.{number}.attention='warmup': allowed where the model has a CSA layer to teach")
    for table in ("stability", STAGES):
        if recipe.rollouts and getattr(recipe, table):
            raise ValueError(f"[{table}] beside [{recipe.rollouts.name}]: allowed is one of them")

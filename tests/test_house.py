"""Rules of the house: who imports whom, what the package needs, what a public op promises."""

import ast
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "model": {"kernels", "model"},
    "hf": {"model", "hf"},
    "train": {"kernels", "model", "train", "configs"},
}
FILES = [(folder, path) for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]
# Rooms from the ground up: one imports from floors below its own. A room is a file or a folder of model/ or train/.
FLOORS = (
    "kernels",
    "model.fields model.foreign model.kept model.kinds model.layout model.text",
    "model.dialect model.folders model.norm model.tables",
    "model.config",
    "model.disk model.hyper model.losses model.quantization model.rotary model.storage",
    "model.cache model.moe",
    "model.accounting model.compressor model.engram model.routing",
    "model.indexer",
    "model.attention",
    "model.block",
    "model.mtp model.recompute",
    "model.decode",
    "model.transformer",
    "model.lineage",
    "model.generation model.interchange",
    "model",
    "hf",
    "train.own train.settings",
    "train.data train.optim",
    "train.distributed train.recipe",
    "train.run",
    "train.reason train.talk",
    "train.plots train.start",
    "train.evaluate train.measure",
    "train.ablate",
    "train.study",
    "train.cli",
    "train.__main__",
)


def module_of(path: Path) -> str:
    """`train.run.loop`, `train.run` for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for folder in (*MAY_IMPORT, "configs") for path in (ROOT / folder).rglob("*.py")}


def nodes(tree: ast.AST, for_types: bool) -> Iterator[ast.AST]:
    """All of a tree; what stands under TYPE_CHECKING only if asked for."""
    for node in ast.iter_child_nodes(tree):
        if for_types or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node
            yield from nodes(node, for_types)


@functools.cache
def imported(module: str, for_types: bool = False) -> set[str]:
    """Our modules that one imports when it runs, at the top of the file or in a function."""
    path, found = MODULES[module], set()
    package = ("abyssal", *path.relative_to(ROOT).parts[:-1])
    for node in nodes(ast.parse(path.read_text("utf-8")), for_types):
        names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            base = (*package[: len(package) - node.level + 1], node.module) if node.level else (node.module,)
            stem = ".".join(filter(None, base))
            names = [f"{stem}.{name}" for name in names]
        assert not any(name.split(".")[0] in MAY_IMPORT for name in names), f"{path}: bare import of {names}"
        ours = [name.removeprefix("abyssal.") for name in names if name.startswith("abyssal.")]
        found |= {name if name in MODULES else name.rpartition(".")[0] for name in ours}
    return found & MODULES.keys() - {module}


def room_of(module: str) -> str:
    folder, *inner = module.split(".")
    return ".".join((folder, *inner[:1])) if folder in ("model", "train") else folder


@pytest.mark.parametrize("folder, path", FILES, ids=[str(p.relative_to(ROOT)) for _, p in FILES])
def test_imports_flow_one_way(folder, path):
    assert {name.split(".")[0] for name in imported(module_of(path), for_types=True)} <= MAY_IMPORT[folder]


def test_modules_import_each_other_in_no_circle():
    TopologicalSorter({module: imported(module) for module in MODULES}).prepare()  # CycleError names the circle


def test_rooms_import_from_floors_below():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
    assert floor.keys() == {room_of(module) for module in MODULES} - {"configs", "train"}  # these two are empty
    steps = [(a, b) for a in MODULES for b in imported(a) if room_of(b) not in (room_of(a), "configs")]
    assert not [f"{a} imports {b}" for a, b in steps if floor[room_of(a)] <= floor[room_of(b)]]


@pytest.mark.parametrize("folder, path", FILES, ids=[str(p.relative_to(ROOT)) for _, p in FILES])
def test_triton_and_transformers_stay_where_they_belong(folder, path):
    tops = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            tops |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            tops.add(node.module.split(".")[0])
    assert "transformers" not in tops or folder == "hf"
    assert "triton" not in tops or "triton" in path.parts


def test_imports_without_triton_transformers_and_plots():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('triton', 'transformers', 'matplotlib', 'tqdm')));"
        "import abyssal.model, abyssal.kernels, abyssal.train.cli; print(abyssal.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_configuration_needs_no_torch():
    code = (
        "import sys, types; root = types.ModuleType('abyssal'); root.__path__ = ['.'];"
        "model = types.ModuleType('abyssal.model'); model.__path__ = ['model']; sys.modules.update({'abyssal': root,"
        "'abyssal.model': model, 'torch': None}); from abyssal.model.config import ModelConfig;"
        "ModelConfig.load('nano')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_repository_root_on_the_path_does_not_shadow_the_hub_package():
    spec = importlib.util.spec_from_file_location("kernels", ROOT / "kernels" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not hasattr(module, "attention")


def test_every_engine_has_the_signature_of_its_op():
    import inspect

    from abyssal import kernels

    ops = [p.parent.name for p in (ROOT / "kernels").glob("*/eager.py")]
    assert len(ops) >= 9
    for op, engine in [(op, engine) for op in ops for engine in ("reference", "eager")]:
        module = importlib.import_module(f"abyssal.kernels.{op}.{engine}")
        public = importlib.import_module(f"abyssal.kernels.{op}")
        for name in kernels.__all__:
            if hasattr(public, name) and inspect.isfunction(getattr(module, name, None)):
                face = [p for p in inspect.signature(getattr(public, name)).parameters if p != "backend"]
                assert face == list(inspect.signature(getattr(module, name)).parameters), f"{op}.{engine}: {name}"


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/*/triton/launch.py")), ids=lambda p: p.parts[-3])
def test_launches_group_their_arguments(path):
    many = {f.name: len(f.args.args) + len(f.args.kwonlyargs) for f in functions(path)}
    assert not {name: count for name, count in many.items() if name.startswith("_") and count > 8}


TYPED = [*(ROOT / "model" / f"{name}.py" for name in ("transformer", "attention", "cache"))]
TYPED += sorted(ROOT.glob("kernels/*/reference.py")) + sorted(ROOT.glob("kernels/*/eager.py"))


@pytest.mark.parametrize("path", TYPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_argument_has_a_type(path):
    bare = [
        f.name
        for f in functions(path)
        if f.returns is None
        or any(a.annotation is None and a.arg not in ("self", "cls") for a in (*f.args.args, *f.args.kwonlyargs))
    ]
    assert not bare


def test_every_op_has_its_doors():
    ops = sorted(path.parent for path in (ROOT / "kernels").glob("*/eager.py"))
    assert len(ops) == 13
    doors = ("__init__", "reference", "triton/__init__", "triton/launch")
    assert not [f"{op.name}/{door}.py" for op in ops for door in doors if not (op / f"{door}.py").is_file()]
    kernels = ("triton/kernels.py", "triton/forward.py")  # of one file, or of several
    assert not [op.name for op in ops if not any((op / name).is_file() for name in kernels)]
    assert not [op.name for op in ops if not (ROOT / f"tests/kernels/test_{op.name}.py").is_file()]
    assert not [op.name for op in ops if not (ROOT / f"tests/support/compiled_{op.name}.py").is_file()]
    assert not [op.name for op in ops if not (ROOT / f"train/measure/bench/{op.name}.py").is_file()]

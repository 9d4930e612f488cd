"""Rules of the house: who imports whom, what the package needs, what a public op promises."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"kernels": {"kernels"}, "model": {"kernels", "model"}, "train": {"kernels", "model", "train", "configs"}}
FILES = [(folder, path) for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_folders(path: Path, folder: str) -> set[str]:
    """Our own folders that a file imports, from relative imports and from `abyssal.*`."""
    package = ("abyssal", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [a.name for a in node.names]
            found |= {".".join((*base, name)).split(".")[1] for name in names if len(base) > 1 or len(base) == 1}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.module.split(".")[0] not in MAY_IMPORT, f"{path}: bare import of {node.module}"
            if node.module.startswith("abyssal."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & MAY_IMPORT.keys(), f"{path}: bare import"
    return found & {"kernels", "model", "train", "configs"}


@pytest.mark.parametrize("folder, path", FILES, ids=[str(p.relative_to(ROOT)) for _, p in FILES])
def test_imports_flow_one_way(folder, path):
    assert imported_folders(path, folder) <= MAY_IMPORT[folder]


@pytest.mark.parametrize("folder, path", FILES, ids=[str(p.relative_to(ROOT)) for _, p in FILES])
def test_triton_and_transformers_stay_where_they_belong(folder, path):
    tops = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            tops |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            tops.add(node.module.split(".")[0])
    assert "transformers" not in tops
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
    for op in ops:
        reference = importlib.import_module(f"abyssal.kernels.{op}.eager")
        public = importlib.import_module(f"abyssal.kernels.{op}")
        for name in kernels.__all__:
            if hasattr(public, name) and inspect.isfunction(getattr(reference, name, None)):
                face = [p for p in inspect.signature(getattr(public, name)).parameters if p != "backend"]
                assert face == list(inspect.signature(getattr(reference, name)).parameters), f"{op}.{name}"

"""What is published: a source archive, a wheel made of it, and that wheel in use, far from any checkout."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOME = "https://example.org/abyssal"
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"

pytestmark = pytest.mark.slow("builds a source archive and a wheel, and trains with the wheel")


def run(*command: str, cwd: Path, **environment: str) -> str:
    settings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The archive, what it holds unpacked, and the wheel."""
    work = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, work / "tree", ignore=left_out)
    run("-c", BUILD, "build_sdist", str(work), cwd=work / "tree", ABYSSAL_HOME=HOME)
    archive = next(work.glob("*.tar.gz"))
    with tarfile.open(archive) as file:
        file.extractall(work / "unpacked", filter="data")
    unpacked = next((work / "unpacked").iterdir())
    run("-c", BUILD, "build_wheel", str(work), cwd=unpacked, ABYSSAL_HOME=HOME)
    return archive, unpacked, next(work.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The wheel's files, as an installation lays them out."""
    place = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built[2]) as file:
        file.extractall(place)
    return place


def test_the_archive_has_what_tests_and_readers_need(built):
    for name in (
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "constraints.txt",
        "tests/conftest.py",
        "examples/own_suite.py",
    ):
        assert (built[1] / name).is_file(), name


def test_the_wheel_has_the_package_and_nothing_else(built):
    names = zipfile.ZipFile(built[2]).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"abyssal"}
    for name in (
        "py.typed",
        "configs/toy.toml",
        "configs/v4-pro.json",
        "hf/model.py",
        "kernels/pool/triton/kernels.py",
    ):
        assert f"abyssal/{name}" in names
    assert not [name for name in names if name.endswith((".png", ".pyc")) or "/tests/" in name]


def test_what_an_index_shows(built):
    with zipfile.ZipFile(built[2]) as file:
        told = email.message_from_bytes(file.read(next(n for n in file.namelist() if n.endswith("METADATA"))))
    assert told["Name"] == "abyssal" and told["License-Expression"] == "Apache-2.0"
    assert f"Source, {HOME}" in told.get_all("Project-URL") and len(told.get_all("Classifier")) > 5
    text = told.get_payload()
    assert f"]({HOME}/raw/main/train/toy-curves.png)" in text
    assert not re.findall(r"\]\((?!https?:|#)[^)]*\)", text), "a link that only a checkout has"


def test_the_wheel_in_use(installed, tmp_path):
    where = {"PYTHONPATH": str(installed)}
    assert str(installed) in run("-c", "import abyssal; print(abyssal.__file__)", cwd=tmp_path, **where)
    assert "toy" in run("-m", "abyssal", "recipes", cwd=tmp_path, **where)
    (tmp_path / "text.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(400)), "utf-8")
    few = ("train.steps=2", "data.sequence_length=64", "data.batch_size=2", "data.held_out_rows=2")
    options = [word for key in (*few, "train.sample_tokens=4", "data.source=text.txt") for word in ("--set", key)]
    run("-m", "abyssal", "train", "nano", *options, "--out", "run", cwd=tmp_path, **where)
    code = (
        "from abyssal.model import load_pretrained; import abyssal.hf; from transformers import AutoModelForCausalLM;"
        "from abyssal.model.folders import model_folder; import torch; ours = load_pretrained('run');"
        "theirs = AutoModelForCausalLM.from_pretrained(model_folder('run')); ids = torch.arange(20)[None];"
        "print(torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5))"
    )
    assert run("-c", code, cwd=tmp_path, **where).strip().endswith("True")

"""Maps the top-level folders to abyssal.*, which a table in pyproject.toml cannot: it discovers no sub-packages under
another name. Makes the page for a package index: with ABYSSAL_HOME, the repository's address, its links are absolute.

    ABYSSAL_HOME=https://github.com/OWNER/abyssal python -m build
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("kernels", "model", "train", "hf", "configs")
PICTURE = re.compile(r"(!\[[^]]*\])\((?!https?:)([^)]+)\)")
LINK = re.compile(r"(\[[^]]*\])\((?!https?:|#)([^)]+)\)")


def page(home: str) -> str:
    """README.md, from anywhere; without an address its own links lead nowhere, and pictures are their titles."""
    text = (Path(__file__).parent / "README.md").read_text("utf-8")
    if not home:
        return LINK.sub(lambda found: found[1].strip("[]"), PICTURE.sub("", text))
    return LINK.sub(rf"\1({home}/blob/main/\2)", PICTURE.sub(rf"\1({home}/raw/main/\2)", text))


home = os.environ.get("ABYSSAL_HOME", "").rstrip("/")
packages = [
    f"abyssal.{top}{dot}{sub}" for top in FOLDERS for dot, sub in [("", ""), *((".", s) for s in find_packages(top))]
]
setup(
    packages=["abyssal", *packages],
    package_dir={"abyssal": "abyssal", **{f"abyssal.{top}": top for top in FOLDERS}},
    long_description=page(home),
    long_description_content_type="text/markdown",
    project_urls={"Source": home, "Changelog": f"{home}/blob/main/CHANGELOG.md"} if home else {},
)

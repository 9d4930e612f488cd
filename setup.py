"""Maps the top-level folders to abyssal.*; a table in pyproject.toml cannot discover sub-packages under another
name.
"""

from setuptools import find_packages, setup

FOLDERS = ("kernels", "model", "train", "hf", "configs")
packages = [
    f"abyssal.{top}{dot}{sub}" for top in FOLDERS for dot, sub in [("", ""), *((".", s) for s in find_packages(top))]
]
setup(packages=["abyssal", *packages], package_dir={"abyssal": "abyssal", **{f"abyssal.{top}": top for top in FOLDERS}})

"""A small model with every mechanism, and the folder that holds it."""

import pytest
from lively import lively

from abyssal.model import save_pretrained


@pytest.fixture(scope="session")
def ours():
    return lively("nano", num_hidden_layers=3, compress_ratios=[0, 4, 16], index_topk=4)


@pytest.fixture(scope="session")
def folder(ours, tmp_path_factory):
    path = tmp_path_factory.mktemp("abyssal")
    save_pretrained(ours, path, layout="abyssal")
    return path

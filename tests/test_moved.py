"""Earlier names of inner modules lead to where these lie now, with a warning; other names lead nowhere."""

import importlib
import sys

import pytest

from abyssal.moved import MOVED


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the packages on the way
@pytest.mark.parametrize("old", MOVED)
def test_an_earlier_name_is_the_same_module(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=rf"{old} is now {MOVED[old]}"):
        found = importlib.import_module(old)
    assert found is importlib.import_module(MOVED[old]) and found.__spec__.name == MOVED[old]


def test_modules_within_follow():
    sys.modules.pop("abyssal.train.tokenizers.bpe", None)
    with pytest.warns(DeprecationWarning):
        found = importlib.import_module("abyssal.train.tokenizers.bpe")
    assert found is importlib.import_module("abyssal.train.data.tokenizers.bpe")


def test_other_names_are_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"abyssal\.model\.nowhere"):
        importlib.import_module("abyssal.model.nowhere")
    for gone in ("tokenizers.nowhere", "roofline.head", "roofline.streams"):
        with pytest.raises(ModuleNotFoundError, match=rf"abyssal\.train\.{gone}"):
            importlib.import_module(f"abyssal.train.{gone}")

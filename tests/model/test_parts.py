"""Tensors in parts: joined where they fill the whole, each once, and refused where they do not."""

import json

import pytest
import torch
from safetensors.torch import save_file

from abyssal.model.interchange.files import _opened, checked_parts
from abyssal.model.interchange.parts import OFFSETS, joined

WHOLE = torch.arange(24.0).view(8, 3)


def write(folder, parts):
    """`parts`: (tensor, where it begins) of one tensor named w, a file each."""
    for number, (tensor, start) in enumerate(parts):
        told = {OFFSETS: json.dumps({"w": {"saved_offsets": start}})}
        save_file({"w": tensor.contiguous()}, folder / f"shard-{number}.safetensors", metadata=told)


def test_parts_are_joined_in_any_order(tmp_path):
    write(tmp_path, [(WHOLE[4:, :2], [4, 0]), (WHOLE[:4], [0, 0]), (WHOLE[4:, 2:], [4, 2])])
    assert torch.equal(joined("w", checked_parts(tmp_path)["w"], _opened), WHOLE)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([(WHOLE[2:6], [2, 0]), (WHOLE[4:], [4, 0])], "does not hold all parts of w, each once"),
        ([(WHOLE[:4], [0, 0])] * 2, "does not hold all parts of w, each once"),
        ([(WHOLE[:4], [0, 0]), (WHOLE[5:], [5, 0])], "does not hold all parts of w, each once"),
        ([(WHOLE[:4], [-4, 0]), (WHOLE[4:], [0, 0])], "does not hold all parts of w, each once"),
        ([(WHOLE[:4], [0, 0]), (WHOLE[4:].bfloat16(), [4, 0])], "the parts of w are BF16, F32"),
        ([(WHOLE[:4], [0])], "does not say where its part of w belongs"),
        ([(WHOLE[:4], [0, 0.5])], "does not say where its part of w belongs"),
        ([(WHOLE[:4], "00")], "does not say where its part of w belongs"),
    ],
)
def test_what_is_no_whole_is_refused(tmp_path, parts, words):
    write(tmp_path, parts)
    with pytest.raises(ValueError, match=words):
        checked_parts(tmp_path)


def test_a_file_that_says_nothing_of_places(tmp_path):
    save_file({"w": WHOLE}, tmp_path / "shard-0.safetensors")
    with pytest.raises(ValueError, match="does not say where"):
        checked_parts(tmp_path)

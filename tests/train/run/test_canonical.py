"""Engram's tokenizer compression: one row for one text, from the recipe to the checkpoint and back."""

import pytest
import torch

from abyssal.model import load_pretrained, save_pretrained
from abyssal.model.layout import make_layout
from abyssal.train.data.tokenizers import ByteTokenizer, canonical_ids, train_bpe
from abyssal.train.run.load import load_trained
from abyssal.train.start import train

BYTES, SPACES = ByteTokenizer(), [*b" \t\r\n"]
CLASSES = 260 - 26 - 3  # capitals are small letters; tab and both line ends are spaces
ASKED = f"model.engram.canonical_vocab_size={CLASSES}"


def test_bytes():
    """Capitals and white space; parts of characters and special tokens stay themselves."""
    ids = canonical_ids(BYTES, 260).tolist()
    assert ids[ord("A") : ord("Z") + 1] == ids[ord("a") : ord("z") + 1] and len({ids[i] for i in SPACES}) == 1
    alone = [i for i in range(260) if i not in SPACES[1:] and not ord("A") <= i <= ord("Z")]
    assert len({ids[i] for i in alone}) == len(alone) == max(ids) + 1 == CLASSES


def test_byte_pairs_by_their_text():
    tokenizer = train_bpe([b"the The THE the The THE \xc3\xa9 e caf\xc3\xa9 cafe " * 9] * 3, 302)
    ids = canonical_ids(tokenizer, tokenizer.vocab_size + 2).tolist()
    spelt = {piece: ids[i] for i, piece in enumerate(tokenizer.pieces)}
    assert spelt[b"the"] == spelt[b" the"] == spelt[b" The"] == spelt[b" THE"] != spelt[b"e"]
    assert spelt[b"\xc3\xa9"] == spelt[b" e"] == spelt[b"E"] and spelt[b"\xc3"] != spelt[b"\xa9"]
    assert ids[tokenizer.bos] != ids[tokenizer.eos] and ids[-1] == ids[-2]


def rows(model, text):
    ids = torch.tensor([BYTES.encode(text)])
    return model.layers[1].engram.rows(ids, make_layout(ids, None))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    return train(tiny(ASKED), tmp_path_factory.mktemp("whole") / "run", shown=False)


def test_a_run_keeps_it(whole, tiny, tmp_path):
    """Trained, stopped and gone on with, loaded, exported and read again."""
    half = train(tiny(ASKED), tmp_path / "run", stop_at=2, shown=False)
    train(tiny(ASKED), tmp_path / "run", resume=half.out, shown=False)
    exported = tmp_path / "exported"
    model, _ = load_trained(whole.out, "cpu")
    save_pretrained(model, exported, layout="official")
    for other in (model, load_trained(tmp_path / "run", "cpu")[0], load_pretrained(exported)):
        assert torch.equal(other.layers[1].engram.canonical, canonical_ids(BYTES, 260))
        assert torch.equal(rows(other, "The  End\n"), rows(other, "tHE\t eND "))
        assert not torch.equal(rows(other, "the end"), rows(other, "the and"))
        assert torch.equal(other.head.weight, model.head.weight)


def test_off_unless_it_is_asked_for(tiny, tmp_path):
    model, _ = load_trained(train(tiny(), tmp_path / "run", stop_at=1, shown=False).out, "cpu")
    assert torch.equal(model.layers[1].engram.canonical, torch.arange(260))


def test_the_number_of_classes_is_said(tiny, tmp_path):
    with pytest.raises(ValueError, match=rf"engram\.canonical_vocab_size=99: allowed is {CLASSES}"):
        train(tiny("model.engram.canonical_vocab_size=99"), tmp_path / "run", shown=False)
    recipe = tiny(ASKED, "data.source=planted:recall", "data.held_out_rows=2")
    with pytest.raises(ValueError, match=f"canonical_vocab_size={CLASSES}: allowed with text only"):
        train(recipe, tmp_path / "planted", shown=False)

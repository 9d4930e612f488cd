"""The comparison of speculative and plain decoding tells when they differ, and adds the prompts up."""

import pytest
import torch

from abyssal.model import ModelConfig, Transformer
from abyssal.train.evaluate import speculation

PROMPTS = [[256, 1, 2, 3], [256, 9], [256, 100, 100, 100]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(ModelConfig.load("nano")).eval()


def test_both_write_the_same(model):
    found = speculation.compare(model, PROMPTS, 12)
    assert found.tokens == 36 and found.differs is None
    assert 0 <= found.acceptance_rate <= 1 and found.speed_up > 0
    assert "36 of each, the same" in str(found)


def test_a_difference_is_found(model, monkeypatch):
    generate = speculation.generate

    def wrong(model, prompt, *, speculative, **options):
        stream = generate(model, prompt, speculative=speculative, **options)
        if speculative and prompt == PROMPTS[1]:
            stream._steps = iter([(step[0] ^ (i == 5),) for i, step in enumerate(stream._steps)])
        return stream

    monkeypatch.setattr(speculation, "generate", wrong)
    found = speculation.compare(model, PROMPTS, 12)
    assert found.differs == (1, 5) and "different after prompt 1 from token 5 on" in str(found)


def test_a_shorter_text_is_a_difference(model, monkeypatch):
    generate = speculation.generate
    monkeypatch.setattr(
        speculation,
        "generate",
        lambda model, prompt, *, speculative, max_new_tokens, **options: generate(
            model, prompt, speculative=speculative, max_new_tokens=max_new_tokens - speculative, **options
        ),
    )
    assert speculation.compare(model, PROMPTS[:1], 6).differs == (0, 5)


def test_no_prompts(model):
    with pytest.raises(ValueError, match="prompts is empty"):
        speculation.compare(model, [], 5)

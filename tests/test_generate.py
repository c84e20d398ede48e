"""Generation: equal to the same thing without a cache, and each sampling setting against its definition."""

from __future__ import annotations

import pytest
import torch

from pygpt import GPT, GPTConfig
from pygpt.generate import sample


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=40, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)  # sharper, so that different contexts choose different tokens
    return model


def without_cache(model: GPT, idx: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        idx = torch.cat([idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


@pytest.mark.parametrize("prompt", [1, 7, 32])
def test_greedy_equals_no_cache(model, prompt):
    idx = torch.randint(40, (3, prompt))
    out = model.generate(idx, 64 - prompt, temperature=0)
    assert torch.equal(out, without_cache(model, idx, 64 - prompt))
    assert len(out[:, prompt:].unique()) > 5  # not a constant


def test_context_longer_than_block_size_goes_on_from_its_last_half(model):
    idx = torch.randint(40, (1, 60))
    out = model.generate(idx, 30, temperature=0)
    full = without_cache(model, idx, 5)  # 65 tokens: position 64 is the last that the whole window can predict
    assert torch.equal(out[:, :65], full)
    assert torch.equal(out[:, 65:66], without_cache(model, full[:, -32:], 1)[:, -1:])
    assert out.shape == (1, 90)


def test_seed_decides(model):
    idx = torch.randint(40, (2, 4))
    a = model.generate(idx, 20, seed=1)
    torch.randn(3)  # the default generator's state must not matter
    assert torch.equal(model.generate(idx, 20, seed=1), a)
    assert not torch.equal(model.generate(idx, 20, seed=2), a)


def test_end_of_text(model):
    idx = torch.randint(40, (4, 4))
    free = model.generate(idx, 40, temperature=0)
    eos = int(free[0, 8])
    out = model.generate(idx, 40, temperature=0, eos_id=eos)
    for row, reference in zip(out[:, 4:].tolist(), free[:, 4:].tolist(), strict=True):
        if eos in row:
            end = row.index(eos)
            assert row[: end + 1] == reference[: end + 1]
            assert set(row[end:]) == {eos}
        else:
            assert row == reference[: len(row)]
    assert model.generate(idx[:1], 40, temperature=0, eos_id=eos).shape[1] <= 9  # ends once every row has ended


def test_sampling_follows_the_definitions():
    p = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]])
    logits = p.log().repeat(20000, 1)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options) -> torch.Tensor:
        return sample(logits, generator=generator, **options).bincount(minlength=5) / 20000

    def close(found, expected) -> bool:
        return torch.allclose(found, expected, atol=0.02)

    assert close(frequencies(), p[0])
    assert close(frequencies(temperature=0.5), p[0] ** 2 / (p[0] ** 2).sum())
    assert close(frequencies(top_k=2), torch.tensor([4 / 7, 3 / 7, 0, 0, 0]))
    assert close(frequencies(top_p=0.7), torch.tensor([4 / 7, 3 / 7, 0, 0, 0]))
    assert close(frequencies(top_p=0.71), torch.tensor([0.4, 0.3, 0.15, 0, 0]) / 0.85)
    assert close(frequencies(top_p=1e-6), torch.tensor([1.0, 0, 0, 0, 0]))
    assert close(frequencies(top_k=100, top_p=1.0), p[0])
    assert close(frequencies(temperature=0), torch.tensor([1.0, 0, 0, 0, 0]))


def test_training_mode_is_restored_and_dropout_is_off():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=1, n_head=1, n_embd=16, dropout=0.5)).train()
    idx = torch.randint(40, (1, 3))
    assert torch.equal(model.generate(idx, 10, temperature=0), model.generate(idx, 10, temperature=0))
    assert model.training


def test_bad_input(model):
    idx = torch.zeros(1, 4, dtype=torch.long)
    for arguments, message in [
        ({"idx": torch.zeros(1, 65, dtype=torch.long)}, "65 tokens, more than the model's block_size"),
        ({"idx": torch.zeros(1, 0, dtype=torch.long)}, "T >= 1"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(**{"idx": idx, "max_new_tokens": 1, **arguments})
    assert torch.equal(model.generate(idx, 0), idx)

"""Generation: equal to the same thing without a cache, and each sampling setting against its definition."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pygpt import GPT, GPTConfig, use_backend
from pygpt.generate import Generation, Sampling
from pygpt.ops import backends

V = 40


def sharp_model(**changes) -> GPT:
    """A random model whose weights are large, so that different contexts choose different tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{"block_size": 64, "vocab_size": V, "n_layer": 2, "n_head": 2, "n_embd": 32, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model.eval()


@pytest.fixture
def model() -> GPT:
    return sharp_model()


GPU = [(name, "cuda") for name in ("eager", "cuda", "triton") if torch.cuda.is_available() and backends.ready(name)]


@pytest.fixture(params=[("eager", "cpu"), ("cpp", "cpu"), *GPU], ids="-".join)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend of this machine in turn, forced, and the device it is for."""
    name, device = request.param
    if not backends.ready(name):
        pytest.skip("pygpt._C is not built: there are no compiled CPU kernels to test")
    with use_backend(name):
        yield device


def without_cache(model: GPT, prompt: list[int], steps: int) -> list[int]:
    """The rule of pygpt.generate written down as plainly as can be: all of the context again for every token."""
    ids, context, block_size = list(prompt), list(prompt), model.config.block_size
    for _ in range(steps):
        if len(context) > block_size:
            context = context[-max(1, block_size // 2) :]
        token = int(model(torch.tensor([context], device=model.lm_head.weight.device))[0][0, -1].argmax())
        ids.append(token)
        context.append(token)
    return ids


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (length,), generator=generator).tolist() for length in lengths]


def test_greedy_equals_no_cache_for_200_tokens(device):
    """Alone, in a batch of equal lengths, and in one of different lengths."""
    model = sharp_model(block_size=256).to(device)
    prompts = random_prompts(7, 1, 30, 7)
    expected = [without_cache(model, prompt, 200) for prompt in prompts]
    assert all(len(set(row[-200:])) > 10 for row in expected)  # no constants
    assert model.generate(prompts, 200, temperature=0) == expected
    for row in (0, 1):
        assert model.generate(torch.tensor(prompts[row : row + 1], device=device), 200, temperature=0).tolist() == [
            expected[row]
        ]
    equal = torch.tensor([prompts[0], prompts[3]], device=device)
    assert model.generate(equal, 200, temperature=0).tolist() == [expected[0], expected[3]]


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 17])
def test_past_block_size_equals_no_cache(device, block_size):
    """Each row follows the rule on its own: rows reach the end of the context at different steps, several times."""
    model = sharp_model(block_size=block_size).to(device)
    prompts = random_prompts(*(max(1, block_size - i) for i in (5, 0, 1, 12, 3, 0)))
    expected = [without_cache(model, prompt, 60) for prompt in prompts]
    assert model.generate(prompts, 60, temperature=0) == expected
    assert model.generate(prompts[:1], 60, temperature=0) == expected[:1]
    assert model.generate(torch.tensor(prompts[1:2], device=device), 60, temperature=0).tolist() == expected[1:2]


def test_rows_that_end_leave_the_batch(model, monkeypatch):
    """Some end early, the longest among them; the others go on as before, past block_size too."""
    prompts = random_prompts(60, 3, 20, 41, 8)
    free = model.generate(prompts, 100, temperature=0)

    def until(eos: int) -> list[list[int]]:
        new = [row[len(prompt) :] for row, prompt in zip(free, prompts, strict=True)]
        return [
            prompt + (row[: row.index(eos) + 1] if eos in row else row)
            for row, prompt in zip(new, prompts, strict=True)
        ]

    def lengths(rows: list[list[int]]) -> list[int]:
        return [len(row) - len(prompt) for row, prompt in zip(rows, prompts, strict=True)]

    eos = max(range(V), key=lambda token: len(set(lengths(until(token)))))
    ends = until(eos)
    assert len(set(lengths(ends))) > 3
    assert sorted(lengths(ends))[-2] < 100
    computed = 0
    forward = model.lm_head.forward

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal computed
        computed += hidden.shape[0]
        return forward(hidden)

    monkeypatch.setattr(model.lm_head, "forward", counted)
    assert model.generate(prompts, 100, temperature=0, eos_id=eos) == ends
    assert computed == sum(lengths(ends))
    generation = Generation(model, prompts, 100, temperature=0)
    for step, tokens in enumerate(generation):
        assert sorted(tokens) == [row for row in range(5) if step <= 10 * row]
        for row in range(5):
            if step == 10 * row:
                generation.finish(row)
    assert generation.tokens == [row[: len(prompts[i]) + 10 * i + 1] for i, row in enumerate(free)]


def test_a_tensor_is_filled_with_end_of_text(model):
    idx = torch.tensor(random_prompts(4, 4, 4, 4))
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
    streamed = torch.stack(list(model.stream(idx, 40, 0.0, None, None, eos)), dim=1)
    assert torch.equal(streamed, out[:, 4:])
    assert model.generate(idx[:1], 40, temperature=0, eos_id=eos).shape[1] <= 9  # ends once every row has ended


SETTINGS = {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.4}


def test_a_row_does_not_depend_on_the_others(model):
    prompts = random_prompts(5, 60, 9, 5)
    together = model.generate(prompts, 50, seed=3, **SETTINGS)
    # In the same place, beside other and fewer rows, and with more samples.
    assert model.generate(prompts[:1], 50, seed=3, **SETTINGS) == together[:1]
    others = random_prompts(33, 2, seed=1)
    assert model.generate([others[0], *prompts[1:3], *others], 50, seed=3, **SETTINGS)[1:3] == together[1:3]
    samples = model.generate(prompts, 50, seed=3, num_samples=3, **SETTINGS)
    assert samples[::3] == together
    eos = together[0][20]  # nor on when they end
    for row, free in zip(model.generate(prompts, 50, seed=3, eos_id=eos, **SETTINGS), together, strict=True):
        assert row == free[: len(row)]


def test_samples_differ_and_a_seed_repeats_them(model):
    hot = {"temperature": 3.0}
    idx = torch.tensor(random_prompts(4, 4))
    samples = model.generate(idx, 20, **hot, seed=1, num_samples=3)
    assert samples[:, :4].tolist() == idx.repeat_interleave(3, 0).tolist()
    assert len({tuple(row) for row in samples[:, 4:].tolist()}) == 6
    same = model.generate(idx[:1].repeat(3, 1), 20, **hot, seed=1)  # the same prompt in different rows
    assert len({tuple(row) for row in same.tolist()}) == 3
    torch.randn(3)  # the default generator's state must not matter
    assert torch.equal(model.generate(idx, 20, **hot, seed=1, num_samples=3), samples)
    assert not torch.equal(model.generate(idx, 20, **hot, seed=2, num_samples=3), samples)
    torch.manual_seed(5)
    free = model.generate(idx, 20, **hot)
    assert not torch.equal(model.generate(idx, 20, **hot), free)
    torch.manual_seed(5)
    assert torch.equal(model.generate(idx, 20, **hot), free)
    model.generate(idx, 1, seed=-1)
    greedy = model.generate(idx, 20, temperature=0, num_samples=2)
    assert torch.equal(greedy[::2], greedy[1::2])


def test_distribution_equals_that_of_transformers():
    """Every setting, alone and together, in transformers' order; peaked, flat and large distributions."""
    generator = torch.Generator().manual_seed(0)
    V = 3000  # more than the first look at the largest probabilities takes in
    for scale in (0.1, 1.0, 4.0, 100.0):
        logits = torch.randn(5, V, generator=generator) * scale
        context = torch.randint(V, (5, 300), generator=generator)
        seen = torch.zeros(5, V, dtype=torch.bool).scatter_(1, context, True)
        for penalty in (1.0, 1.3, 0.7):
            for temperature, top_k, top_p in [
                (1.0, None, None),
                (0.5, None, None),
                (1.0, 1, None),
                (1.5, 50, None),
                (1.0, None, 0.95),
                (1.0, None, 0.01),
                (0.7, 200, 0.8),
                (1.0, 10 * V, 1.0),
            ]:
                expected = RepetitionPenaltyLogitsProcessor(penalty)(context, logits.clone())
                expected = TemperatureLogitsWarper(temperature)(context, expected)
                if top_k is not None:
                    expected = TopKLogitsWarper(top_k)(context, expected)
                if top_p is not None:
                    expected = TopPLogitsWarper(top_p)(context, expected)
                sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
                found, expected = sampling.probabilities(logits, seen), expected.softmax(-1)
                what = f"scale {scale}, {sampling}"
                assert torch.equal(found > 0, expected > 0), what
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9, msg=what)


def test_repetition_penalty_is_about_prompt_and_answer_of_its_own_row(model):
    """Against transformers' processor in an uncached loop; padding is not part of a row's text."""
    prompts = random_prompts(3, 30, 11)
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(30):
            ids = torch.cat([ids, processor(ids, model(ids)[0][:, -1].detach()).argmax(-1, keepdim=True)], dim=1)
        expected.append(ids[0].tolist())
    found = model.generate(prompts, 30, temperature=0, repetition_penalty=1.7)
    assert found == expected
    assert found != model.generate(prompts, 30, temperature=0)
    eos = expected[1][35]  # with rows leaving the batch
    for row, free in zip(
        model.generate(prompts, 30, temperature=0, repetition_penalty=1.7, eos_id=eos), expected, strict=True
    ):
        assert row == free[: len(row)]


def test_tokens_are_drawn_with_their_probabilities():
    """Evenly spaced numbers hit each token in proportion to its probability; impossible ones never."""
    p = torch.tensor([0.0, 0.4, 0.0, 0.3, 0.15, 0.1, 0.05, 0.0])
    n = 20000
    logits, uniform = p.log().repeat(n, 1), torch.arange(n, dtype=torch.float64) / n

    def frequencies(**settings) -> torch.Tensor:
        return Sampling(**settings).sample(logits, uniform).bincount(minlength=8) / n

    def close(found: torch.Tensor, expected: list[float]) -> bool:
        wanted = torch.tensor(expected, dtype=found.dtype)
        return torch.allclose(found, wanted, atol=2 / n) and bool((found[wanted == 0] == 0).all())

    assert close(frequencies(), p.tolist())
    assert close(frequencies(temperature=0.5), (p**2 / (p**2).sum()).tolist())
    assert close(frequencies(top_k=2), [0, 4 / 7, 0, 3 / 7, 0, 0, 0, 0])
    assert close(frequencies(top_p=0.69), [0, 4 / 7, 0, 3 / 7, 0, 0, 0, 0])
    assert close(frequencies(top_p=1e-6), [0, 1, 0, 0, 0, 0, 0, 0])
    assert close(frequencies(temperature=0), [0, 1, 0, 0, 0, 0, 0, 0])
    assert close(frequencies(temperature=1e-300), [0, 1, 0, 0, 0, 0, 0, 0])
    largest = torch.tensor([np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert Sampling().sample(logits[:1], largest).item() == 6
    tied = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])  # as likely as the k-th, and as the last that top_p needs
    assert (Sampling(top_k=2).probabilities(tied) > 0).tolist() == [[False, True, True, False, True]]
    assert (Sampling(top_p=0.3).probabilities(tied) > 0).tolist() == [[False, True, True, False, True]]


def test_generated_tokens_follow_the_distribution(model):
    """First tokens of many samples, against the model's own probabilities."""
    prompt = random_prompts(6)[0]
    p = model(torch.tensor([prompt]))[0][0, -1].div(2).softmax(-1)
    n = 4000
    drawn = model.generate([prompt], 1, temperature=2.0, seed=0, num_samples=n)
    found = torch.tensor([row[-1] for row in drawn]).bincount(minlength=V) / n
    deviation = (p * (1 - p) / n).sqrt()
    assert ((found - p).abs() < 4.5 * deviation + 1e-9).all()


def test_a_padded_vocabulary(model):
    """Ids that stand for no token are never drawn, however likely; they may be in the prompt."""
    prompt = [39, 3, 4]
    best = [model.generate([prompt], 30, temperature=0)[0]]
    assert max(best[0][3:]) >= 20
    for settings in ({"temperature": 0}, {"temperature": 5.0, "seed": 0}):
        generation = Generation(model, [prompt], 200, vocab_size=20, repetition_penalty=1.1, **settings)
        assert sum(1 for _ in generation) == 200
        assert max(generation.tokens[0][3:]) < 20


def test_the_cache_is_allocated_once_and_only_as_long_as_needed(model, monkeypatch):
    import pygpt.generate as module

    made = []
    original = module.KVCache.__init__

    def recorded(self, *arguments) -> None:
        original(self, *arguments)
        made.append(tuple(self.k.shape))

    monkeypatch.setattr(module.KVCache, "__init__", recorded)
    model.generate(random_prompts(5, 9), 20, temperature=0, num_samples=2)
    model.generate(random_prompts(60), 200, temperature=0)
    model.generate(random_prompts(1), 1)
    assert made == [(2, 4, 28, 2, 16), (2, 1, 64, 2, 16), (2, 1, 1, 2, 16)]


def test_bfloat16_and_autocast():
    """A row in a batch of different lengths is what it is alone; logits may differ by rounding, so their ties may break."""
    model = sharp_model().bfloat16()
    prompts = random_prompts(5, 19)
    assert [len(row) for row in model.generate(prompts, 80, temperature=0)] == [85, 99]
    alone = model.generate(prompts[1:], 20, temperature=0)[0]
    uncached = without_cache(model, prompts[1], 1)
    assert alone[:20] == uncached
    model = sharp_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(prompts[1:], 1, temperature=0)[0] == without_cache(model, prompts[1], 1)
        assert len(model.generate(prompts, 60, temperature=0)[1]) == 79


def test_training_mode_is_restored_and_dropout_is_off():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=1, n_head=1, n_embd=16, dropout=0.5)).train()
    idx = torch.randint(40, (1, 3))
    assert torch.equal(model.generate(idx, 10, temperature=0), model.generate(idx, 10, temperature=0))
    assert model.training
    stream = model.stream(idx, 10)
    assert next(stream).requires_grad is False
    assert torch.is_grad_enabled()
    stream.close()  # left before its end
    assert model.training


def test_bad_input(model):
    idx = torch.zeros(1, 4, dtype=torch.long)
    for arguments, message in [
        ({"idx": torch.zeros(1, 65, dtype=torch.long)}, "65 tokens, more than the model's block_size"),
        ({"idx": [[1], [0] * 65]}, "prompt 1 has 65 tokens"),
        ({"idx": torch.zeros(1, 0, dtype=torch.long)}, "T >= 1"),
        ({"idx": [[1], []]}, "prompt 1 is empty"),
        ({"idx": torch.zeros(4, dtype=torch.long)}, r"\(B, T\), got \(4,\)"),
        ({"idx": [[1], [3, V]]}, f"token id {V} of prompt 1 is outside"),
        ({"idx": [[-1]]}, "token id -1 of prompt 0"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k must be a whole number of at least 1, got 2.5"),
        ({"temperature": "a"}, "temperature must be a number, got 'a'"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": 0.0}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"num_samples": 0}, "num_samples"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(**{"idx": idx, "max_new_tokens": 1, **arguments})
    for wrong in (torch.zeros(1, 4), [[1.5]], [1, 2], [["a"]]):
        with pytest.raises(TypeError, match="integer token ids"):
            model.generate(wrong, 1)
    with pytest.raises(ValueError, match="top_k"):  # when asked for, not at the first token
        model.stream(idx, 1, top_k=0)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = float("nan")
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="not finite"):
            model.generate(idx, 3, temperature=temperature)


def test_sizes_of_nothing(model):
    idx = torch.zeros(2, 4, dtype=torch.long)
    assert torch.equal(model.generate(idx, 0), idx)
    assert model.generate([[1], [2, 3]], 0) == [[1], [2, 3]]
    assert model.generate([], 5) == []
    assert model.generate(idx[:0], 5).shape == (0, 4)
    assert model.generate([np.array([1, 2]), torch.tensor([3])], 1, temperature=0) == [
        without_cache(model, [1, 2], 1),
        without_cache(model, [3], 1),
    ]

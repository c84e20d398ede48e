from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pygpt.data import RandomOffsets, SlidingWindows, load_tokens, sequential_windows
from pygpt.errors import InputError, InputTypeError

TOKENS = np.random.default_rng(0).permutation(997).astype(np.uint16)  # all different: a window shows where it is from

SAMPLERS: dict[str, Callable[[Any, int], Any]] = {
    "random": lambda tokens, seed: RandomOffsets(tokens, 8, 4, seed),
    "sliding": lambda tokens, seed: SlidingWindows(tokens, 8, 3, 4, seed),
}


def start_of(x: Sequence[int]) -> int:
    return int(TOKENS.tolist().index(x[0]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_targets_are_inputs_shifted_by_one(name: str) -> None:
    for step in range(50):
        x, y = SAMPLERS[name](TOKENS, 1).batch(step)
        assert x.dtype == y.dtype == torch.int64
        assert x.is_contiguous()
        assert y.is_contiguous()
        for row in range(4):
            start = start_of(x[row].tolist())
            assert x[row].tolist() == TOKENS[start : start + 8].tolist()
            assert y[row].tolist() == TOKENS[start + 1 : start + 9].tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_batches_are_functions_of_seed_and_step(name: str) -> None:
    make = SAMPLERS[name]
    straight = make(TOKENS, 7)
    batches = [straight.batch(step) for step in range(300)]
    resumed = make(TOKENS, 7)
    for step in [299, 0, 150, 82, 83, 299, 1]:
        assert torch.equal(resumed.batch(step)[0], batches[step][0])
        assert torch.equal(resumed.batch(step)[1], batches[step][1])
    assert not torch.equal(make(TOKENS, 8).batch(0)[0], batches[0][0])
    assert not torch.equal(batches[1][0], batches[0][0])


def philox(key: tuple[int, int], counter: int) -> list[int]:
    """Four 64-bit outputs of Philox4x64-10, from its definition (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", 2011)."""
    word = 2**64
    x, (k0, k1) = [counter, 0, 0, 0], key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * x[0], word)
        high1, low1 = divmod(0xCA5A826395121157 * x[2], word)
        x = [high1 ^ x[1] ^ k0, low1, high0 ^ x[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % word, (k1 + 0xBB67AE8584CAA73B) % word
    return x


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (3, 5), (2**64 - 1, 2**40)])
def test_random_offsets_are_the_documented_stream(seed: int, step: int) -> None:
    # fixed for good: a resumed run depends on it
    x, _ = RandomOffsets(TOKENS, 8, 8, seed).batch(step)
    expected = philox((seed, step), 1) + philox((seed, step), 2)
    assert [start_of(row) for row in x.tolist()] == [value % (997 - 8) for value in expected]


def test_random_offsets_reach_every_window_evenly() -> None:
    sampler = RandomOffsets(TOKENS[:14], 8, 60, seed=0)
    counts = np.zeros(6)
    for step in range(100):
        for row in sampler.batch(step)[0].tolist():
            counts[start_of(row)] += 1
    assert abs(counts - 1000).max() < 130  # 6 windows, 6,000 draws: 4.5 standard deviations
    only = RandomOffsets(TOKENS[:9], 8, 2).batch(0)
    assert only[0].tolist() == [TOKENS[:8].tolist()] * 2
    assert only[1].tolist() == [TOKENS[1:9].tolist()] * 2


def test_sliding_windows_in_order_are_the_book_s() -> None:
    ids = TOKENS[:101].tolist()
    inputs = [ids[i : i + 4] for i in range(0, len(ids) - 4, 3)]
    targets = [ids[i + 1 : i + 5] for i in range(0, len(ids) - 4, 3)]
    sampler = SlidingWindows(ids, 4, 3, 5, drop_last=False)
    assert len(sampler) == 7
    assert [row for x, _ in sampler for row in x.tolist()] == inputs
    assert [row for _, y in sampler for row in y.tolist()] == targets
    assert sampler.batch(6)[0].shape == (len(inputs) - 6 * 5, 4)
    dropping = SlidingWindows(ids, 4, 3, 5)
    assert len(dropping) == 6
    assert [row for x, _ in dropping for row in x.tolist()] == inputs[:30]
    assert torch.equal(dropping.batch(6)[0], dropping.batch(0)[0])  # wraps into the next epoch


@pytest.mark.parametrize("drop_last", [True, False])
def test_shuffled_epochs_hold_every_window_once_in_another_order(drop_last: bool) -> None:
    sampler = SlidingWindows(TOKENS, 8, 5, 6, seed=11, drop_last=drop_last)
    windows = len(range(0, 997 - 8, 5))
    orders = []
    for epoch in range(3):
        rows = [start_of(row) for x, _ in sampler.epoch(epoch) for row in x.tolist()]
        assert len(set(rows)) == len(rows) == (windows // 6 * 6 if drop_last else windows)
        assert set(rows) <= set(range(0, 997 - 8, 5))
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != sorted(orders[0])
    first = [x.tolist() for x, _ in sampler]
    assert (
        first
        == [x.tolist() for x, _ in sampler.epoch(0)]
        == [sampler.batch(i)[0].tolist() for i in range(len(sampler))]
    )
    second = [sampler.batch(len(sampler) + i)[0].tolist() for i in range(len(sampler))]
    assert second == [x.tolist() for x, _ in sampler.epoch(1)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_tokens_may_be_any_row_of_integers(name: str, tmp_path: Path) -> None:
    expected = SAMPLERS[name](TOKENS, 0).batch(3)[0]
    wide = np.zeros((997, 2), np.uint32)
    wide[:, 0] = TOKENS
    for tokens in (TOKENS.tolist(), TOKENS.astype(np.int64), torch.from_numpy(TOKENS.astype(np.int32)), wide[:, 0]):
        assert torch.equal(SAMPLERS[name](tokens, 0).batch(3)[0], expected)
    TOKENS.tofile(tmp_path / "train.bin")
    assert torch.equal(SAMPLERS[name](load_tokens(tmp_path), 0).batch(3)[0], expected)


@settings(deadline=None)
@given(length=st.integers(2, 80), block_size=st.integers(1, 20), batch_size=st.integers(1, 5))
def test_sequential_windows_hold_every_target_once(length: int, block_size: int, batch_size: int) -> None:
    tokens = TOKENS[:length]
    inputs, targets = [], []
    batches = list(sequential_windows(tokens, block_size, batch_size))
    for x, y in batches:
        assert x.shape == y.shape == (len(x), block_size)
        assert x.dtype == y.dtype == torch.int64
        inputs += x[y != -1].tolist()
        targets += y[y != -1].tolist()
    assert all(len(x) == batch_size for x, _ in batches[:-1])
    assert inputs == tokens[:-1].tolist()
    assert targets == tokens[1:].tolist()
    assert int((batches[-1][1] == -1).sum()) == -(length - 1) % block_size
    assert batches[-1][0][batches[-1][1] == -1].sum() == 0


def test_samplers_refuse_what_they_cannot_sample() -> None:
    makers = [
        lambda tokens, block, batch: RandomOffsets(tokens, block, batch),
        lambda tokens, block, batch: SlidingWindows(tokens, block, 1, batch, drop_last=False),
    ]
    for make in makers:
        with pytest.raises(InputError, match="has 8 tokens; block_size 8 needs at least 9"):
            make(TOKENS[:8], 8, 1)
        for block, batch in [(0, 1), (-1, 1), (8, 0), (8, 1.5), ("8", 1)]:
            with pytest.raises(InputError, match=r"(block|batch)_size must be an integer of at least 1"):
                make(TOKENS, block, batch)
        with pytest.raises(InputTypeError, match=r"1-D array of integers, got .* of shape \(2, 3\)"):
            make(np.zeros((2, 3), np.int64), 1, 1)
        with pytest.raises(InputTypeError, match="got float64"):
            make(np.zeros(9), 1, 1)
        with pytest.raises(InputError, match="step must be an integer of at least 0, got -1"):
            make(TOKENS, 8, 1).batch(-1)
    for seed in (-1, 2**64, 1.5, None):
        with pytest.raises(InputError, match="seed must be an integer from 0"):
            RandomOffsets(TOKENS, 8, 1, seed)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="stride must be"):
        SlidingWindows(TOKENS, 8, 0, 1)
    with pytest.raises(InputError, match="gives 2 windows, fewer than batch_size 3"):
        SlidingWindows(TOKENS[:10], 8, 1, 3)
    with pytest.raises(InputError, match="has 1 tokens; block_size 1 needs at least 2"):
        sequential_windows(TOKENS[:1], 4, 1)
    with pytest.raises(InputError, match="batch_size must be"):
        sequential_windows(TOKENS, 4, 0)


def test_memory_mapped_tokens_are_not_read_whole(tmp_path: Path) -> None:
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(1 << 38)  # a sparse file of 256 GiB
    sampler = RandomOffsets(load_tokens(tmp_path), 1024, 4, seed=0)
    assert int(sampler.batch(10**12)[0].abs().sum()) == 0
    assert len(sampler.tokens) == 1 << 37

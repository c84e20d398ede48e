"""A block's step of generation as one operator, against its modules in float64, and when it stands back for them."""

from __future__ import annotations

import copy

import pytest
import torch
from common import assert_close

import pygpt
from pygpt import GPTConfig
from pygpt.nn import Block, Int8Linear, KVCache
from pygpt.ops import backends
from pygpt.ops.decode_block import decode_block
from pygpt.train.lora import add_lora

pytestmark = pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built")
CASES = [  # rows, rows of the cache, tokens, tokens in the cache, heads, C, bias
    (1, 1, 1, 0, 1, 1, True), (1, 1, 1, 37, 3, 48, True), (2, 5, 1, 70, 2, 64, False), (1, 1, 4, 5, 4, 96, True),
    (3, 3, 2, 9, 1, 17, True), (8, 8, 1, 20, 2, 130, True), (1, 2, 7, 0, 2, 66, False),
]  # fmt: skip


def block_of(heads: int, C: int, bias: bool, layer: int = 1) -> Block:
    torch.manual_seed(0)
    block = Block(GPTConfig(n_layer=3, n_head=heads, n_embd=C, block_size=128, vocab_size=8, bias=bias), layer).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (0.5 if parameter.dim() == 1 else parameter.shape[1] ** -0.5)
            )
    return block.requires_grad_(False)


def cache_of(block: Block, rows: int, past: int, dtype: torch.dtype, columns: int = 100) -> KVCache:
    heads, C = block.attn.n_head, block.ln_1.weight.numel()
    config = GPTConfig(n_layer=3, n_head=heads, n_embd=C, block_size=128, vocab_size=8)
    cache = KVCache(config, rows, torch.device("cpu"), dtype, columns)
    cache.k.normal_(), cache.v.normal_()
    cache.length = past
    return cache


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the operator."""
    made = []

    def counted(*arguments):
        made.append(arguments)
        return decode_block(*arguments)

    monkeypatch.setattr(pygpt.nn, "decode_block", counted)
    return made


def in_float64(block: Block, x, residual, cache: KVCache, start):
    wide = copy.deepcopy(block).double()
    same = copy.copy(cache)
    same.k, same.v = cache.k.double(), cache.v.double()
    with pygpt.use_backend("eager"):
        y, sum_ = wide(x.double(), None if residual is None else residual.double(), same, start)
    return y, sum_, same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("documents", [False, True])
@torch.no_grad()
def test_matches_float64(case, dtype, documents, calls):
    rows, cache_rows, T, past, heads, C, bias = case
    block, start = block_of(heads, C, bias).to(dtype), None
    cache = cache_of(block, cache_rows, past, dtype)
    if documents:
        start = (torch.arange(rows)[:, None] * 3 % (past + 1)).int().expand(rows, T).contiguous()
    for residual in (None, torch.randn(rows, T, C).to(dtype)):
        x = torch.randn(rows, T, C).to(dtype)
        before = cache.k.clone(), cache.v.clone()
        y, new_residual, expected = in_float64(block, x, residual, cache, start)
        ours = block(x, residual, cache, start)
        # A narrow model rounds between its parts as the operator does; each rounding passes two matrices and an activation.
        assert_close(ours[1], new_residual, dtype, "residual")
        for name, actual, wide, old in zip("kv", (cache.k, cache.v), (expected.k, expected.v), before, strict=True):
            new = (slice(1, 2), slice(0, rows), slice(past, past + T))
            assert_close(actual[new], wide[new], dtype, name)
            actual = actual.clone()
            actual[new] = old[new]
            assert torch.equal(actual, old), f"{name}: other tokens of the cache have changed"
        error = (ours[0].double() - y).norm() / y.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), error
    assert len(calls) == 2


@torch.no_grad()
def test_gives_the_bits_of_its_operators(calls):
    """They are called one after the other; so a block of weights of 8 bits too, which no reference in float64 rounds alike."""
    block = block_of(2, 64, True).bfloat16()
    int8 = copy.deepcopy(block)
    for of in (int8.attn, int8.mlp):
        for name, layer in of.named_children():
            setattr(of, name, Int8Linear(layer))
    for b in (block, int8):
        cache = cache_of(b, 2, 11, torch.bfloat16)
        again = copy.deepcopy(cache)
        x, residual = torch.randn(2, 1, 64).bfloat16(), torch.randn(2, 1, 64).bfloat16()
        y, new_residual = b(x, residual, cache)
        assert calls
        with pygpt.use_backend("cpp"):  # no op of torch's own for small tensors
            x, expected_residual = b.ln_1(x, residual)
            x = b.attn(x, again)
            x, expected_residual = b.ln_2(x, expected_residual)
            expected = b.mlp(x)
        for ours, theirs in ((new_residual, expected_residual), (y, expected), (cache.k, again.k), (cache.v, again.v)):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_stands_back(calls):
    """Hooks, forwards of a module's own, adapters, dropout, autocast, other dtypes and backends: by the modules."""
    x = torch.randn(1, 1, 64)
    seen = []

    def step(block: Block, x=x, dtype=torch.float32) -> None:
        block(x, None, cache_of(block, 1, 3, dtype))

    block = block_of(2, 64, True)
    step(block)
    assert len(calls) == 1
    for module in (block.attn, block.mlp, block.ln_2, block.attn.c_proj, block.mlp.c_fc):
        handle = module.register_forward_hook(lambda *_: seen.append("hook"))
        step(block)
        handle.remove()
        forward = module.forward
        module.forward = lambda *a, forward=forward: seen.append("forward") or forward(*a)
        step(block)
        del module.forward
    assert seen == ["hook", "forward"] * 5
    step(block.train())
    block.eval()
    with torch.enable_grad():
        step(block)
    with pygpt.use_backend("eager"):
        step(block)
    with torch.autocast("cpu", torch.bfloat16):
        block(x, None, cache_of(block, 1, 3, torch.bfloat16))
    step(block_of(2, 64, True).double(), x.double(), torch.float64)
    mixed = block_of(2, 64, True).bfloat16()
    mixed.ln_1.float()
    step(mixed, x.bfloat16(), torch.bfloat16)
    step(block, torch.randn(1, 90, 64))  # too many tokens for the kernel of few rows
    adapted = block_of(2, 64, True)
    add_lora(adapted, rank=2)
    step(adapted.eval())
    assert len(calls) == 1


@torch.no_grad()
def test_errors():
    block = block_of(2, 64, True)
    with pytest.raises(pygpt.errors.InputError, match="the KV cache holds 100 tokens; 101 do not fit"):
        block(torch.randn(1, 1, 64), None, cache_of(block, 1, 100, torch.float32))
    x, norms = torch.randn(1, 1, 4), [torch.ones(4)] * 2
    linears = [torch.ones(s) for s in ((12, 4), (4, 4), (16, 4), (4, 16))]
    k = torch.zeros(1, 1, 3, 2, 2)
    op = torch.ops.pygpt.decode_block.default
    torch.library.opcheck(op, (x, x, norms, linears, [], k, k.clone(), 0, 1, 1e-5, None))
    bad = {
        "x must be": (x[0], None, norms, linears, [], k, k, 0, 0, 1e-5, None),
        "2 weights of LayerNorms": (x, None, norms * 2, linears, [], k, k, 0, 0, 1e-5, None),
        "does not fit": (x, None, norms, linears, [], k, k, 0, 3, 1e-5, None),
        "caches must have one shape": (x, None, norms, linears, [], k, k[:, :, :2], 0, 0, 1e-5, None),
        "caches must have x's dtype": (x, None, norms, linears, [], k.double(), k, 0, 0, 1e-5, None),
        "neighbours": (x, None, norms, linears, [], k.mT, k.mT, 0, 0, 1e-5, None),
        "3 C outputs": (x, None, norms, linears[1:2] * 4, [], k, k, 0, 0, 1e-5, None),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)

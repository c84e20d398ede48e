"""A model's step of generation as one operator, against its modules in float64, and when it stands back for them."""

from __future__ import annotations

import copy

import pytest
import torch

import pygpt
import pygpt.model
from pygpt import GPT, GPTConfig
from pygpt.nn import MLP, Block, Int8Linear, KVCache, LayerNorm
from pygpt.ops import backends
from pygpt.ops.decode_blocks import decode_blocks
from pygpt.train.lora import add_lora

pytestmark = pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built")
CASES = [  # rows, rows of the cache, tokens, tokens in the cache, heads, C, bias
    (1, 1, 1, 0, 1, 1, True), (1, 1, 1, 37, 3, 48, True), (2, 5, 1, 70, 2, 64, False), (1, 1, 4, 5, 4, 96, True),
    (3, 3, 2, 9, 1, 17, True), (8, 8, 1, 20, 2, 130, True), (1, 2, 7, 0, 2, 66, False),
]  # fmt: skip
if backends.extension is not None and backends.extension.multiplies_by_vectors():  # elsewhere these rows are not few
    CASES.append((20, 20, 2, 30, 2, 64, True))
LAYERS, COLUMNS, VOCABULARY = 3, 100, 11


def model_of(heads: int, C: int, bias: bool) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(n_layer=LAYERS, n_head=heads, n_embd=C, block_size=128, vocab_size=VOCABULARY, bias=bias)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (0.5 if parameter.dim() == 1 else parameter.shape[1] ** -0.5)
            )
    return model.requires_grad_(False)


def cache_of(model: GPT, rows: int, past: int, dtype: torch.dtype) -> KVCache:
    cache = KVCache(model.config, rows, torch.device("cpu"), dtype, COLUMNS)
    cache.k.normal_(), cache.v.normal_()
    cache.length = past
    return cache


def document_starts_of(rows: int, T: int, past: int):
    """Each row's document begins among the tokens of the cache, and another one at its last token."""
    start = ((torch.arange(rows)[:, None] + 1) * 3 % (past + 1)).int().expand(rows, T).contiguous()
    start[:, -1] = past + T - 1 if T > 1 else start[:, -1]
    return start


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the operator."""
    made = []

    def counted(*arguments):
        made.append(arguments)
        return decode_blocks(*arguments)

    monkeypatch.setattr(pygpt.model, "decode_blocks", counted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("documents", [False, True])
@torch.no_grad()
def test_matches_float64(case, dtype, documents, calls):
    rows, cache_rows, T, past, heads, C, bias = case
    model, start = model_of(heads, C, bias).to(dtype), None
    cache = cache_of(model, cache_rows, past, dtype)
    idx = torch.randint(VOCABULARY, (rows, T))
    if documents:
        start = document_starts_of(rows, T, past)
    wide, wide_cache = copy.deepcopy(model).double(), copy.copy(cache)
    wide_cache.k, wide_cache.v = cache.k.double(), cache.v.double()
    before = cache.k.clone(), cache.v.clone()
    with pygpt.use_backend("eager"):
        expected = wide.transformer(idx, wide_cache, start)
    ours = model.transformer(idx, cache, start)
    assert len(calls) == 1
    assert cache.length == past + T
    # In bfloat16 each of a block's parts rounds: the error of three blocks is that of some ten roundings, 2^-9 each.
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    new = (slice(None), slice(0, rows), slice(past, past + T))
    for name, actual, reference in (
        ("y", ours, expected),
        ("k", cache.k[new], wide_cache.k[new]),
        ("v", cache.v[new], wide_cache.v[new]),
    ):
        error = (actual.double() - reference).norm() / reference.norm()
        assert error < limit, (name, error)
    for actual, old in zip((cache.k.clone(), cache.v.clone()), before, strict=True):
        actual[new] = old[new]
        assert torch.equal(actual, old), "other tokens of the cache have changed"


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_gives_the_bits_of_its_operators(case, int8, calls):
    """They are called one after the other; so are blocks of weights of 8 bits, which no reference in float64 rounds alike."""
    rows, cache_rows, T, past, heads, C, bias = case
    model = model_of(heads, C, bias).bfloat16()
    if int8:
        model = model.to_int8()
    cache, idx, start = cache_of(model, cache_rows, past, torch.bfloat16), torch.randint(VOCABULARY, (rows, T)), None
    for start in (None, document_starts_of(rows, T, past)):
        cache.length, again = past, copy.deepcopy(cache)
        again.length = past
        made = len(calls)
        ours = model.transformer(idx, cache, start)
        assert len(calls) == made + 1
        with pygpt.use_backend("cpp"):  # no op of torch's own for small tensors
            if start is None:
                x = model.transformer.wte(idx, model.transformer.wpe, past)
            else:
                positions = torch.arange(past, past + T) - start
                x = model.transformer.wte(idx) + model.transformer.wpe(positions)
            residual = None
            for block in model.transformer.h:
                x, residual = block(x, residual, again, start)
            expected, _ = model.transformer.ln_f(x, residual)
        for actual, reference in ((ours, expected), (cache.k, again.k), (cache.v, again.v)):
            assert torch.equal(actual, reference)


@torch.no_grad()
def test_stands_back(calls):
    """Hooks, modules and forwards of a user's own, adapters, dropout, autocast, other dtypes and backends: by the modules."""
    idx = torch.tensor([[3]])
    seen = []

    def step(model: GPT, idx=idx, dtype=torch.float32) -> None:
        model.transformer(idx, cache_of(model, 1, 3, dtype))

    model = model_of(2, 64, True)
    step(model)
    assert len(calls) == 1
    h, ln_f = model.transformer.h, model.transformer.ln_f
    for module in (h[0], h[1].attn, h[2].mlp, h[0].ln_2, h[1].attn.c_proj, h[2].mlp.c_fc, ln_f):
        handle = module.register_forward_hook(lambda *_: seen.append("hook"))
        step(model)
        handle.remove()
        forward = module.forward
        module.forward = lambda *a, forward=forward: seen.append("forward") or forward(*a)
        step(model)
        del module.forward
    assert seen == ["hook", "forward"] * 7
    h[1]._compiled_call_impl = lambda *a: seen.append("compiled") or h[1].forward(*a)  # as Module.compile sets it
    step(model)
    h[1]._compiled_call_impl = None
    assert seen.pop() == "compiled"
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append("global"))
    step(model)
    handle.remove()
    assert "global" in seen
    for name, of in (("c_fc", h[1].mlp), ("ln_1", h[0]), ("mlp", h[2]), ("1", h)):
        own, kind = of._modules[name], type(of._modules[name])
        of._modules[name] = copy.copy(own)
        of._modules[name].__class__ = type("Own", (kind,), {})
        step(model)
        of._modules[name] = own
    for module in (h[0].attn, h[2].mlp):
        module.train()
        step(model)
        module.eval()
    h[0].ln_2.eps, eps = 1e-3, h[0].ln_2.eps
    step(model)
    h[0].ln_2.eps = eps
    with torch.enable_grad():
        step(model)
    with pygpt.use_backend("eager"):
        step(model)
    with torch.autocast("cpu", torch.bfloat16):
        step(model, dtype=torch.bfloat16)
    step(model_of(2, 64, True).double(), dtype=torch.float64)
    mixed = model_of(2, 64, True).bfloat16()
    mixed.transformer.h[1].ln_1.float()
    step(mixed, dtype=torch.bfloat16)
    step(model, torch.zeros(1, 90, dtype=torch.int64))  # too many tokens for the kernel of few rows
    adapted = model_of(2, 64, True)
    add_lora(adapted, rank=2)
    step(adapted.eval())

    def change(of, name, value):
        before = of.__dict__[name] if name in of.__dict__ else of._modules[name]
        setattr(of, name, value)
        step(model)
        setattr(of, name, before)

    change(model.transformer, "h", h[:2])
    change(model.transformer, "h", torch.nn.ModuleList())
    change(model.transformer, "h", torch.nn.ModuleList([h[1], h[0], h[2]]))
    with pytest.raises(
        RuntimeError, match="must match"
    ):  # by the modules, which find that the cache is another model's
        change(h[1].attn, "n_head", 4)
    h[1].attn.n_head = 2
    change(h[1].mlp, "c_fc", Int8Linear(h[1].mlp.c_fc))
    for module, name, value in (
        (h[2].attn.c_proj, "bias", None),
        (h[0].mlp.c_fc, "weight", torch.nn.Parameter(h[0].mlp.c_fc.weight.t().contiguous().t(), requires_grad=False)),
    ):
        before = getattr(module, name)
        setattr(module, name, value)
        step(model)
        setattr(module, name, before)
    own = type("Own", (KVCache,), {})
    cache = cache_of(model, 1, 3, torch.float32)
    cache.__class__ = own
    model.transformer(idx, cache)
    del_ln_2 = copy.deepcopy(model)
    parallel = del_ln_2.transformer.h[1]
    del parallel.ln_2
    parallel.forward = lambda x, residual, cache, start: (x, residual)
    step(del_ln_2)
    assert len(calls) == 1
    step(model)
    assert len(calls) == 2


@torch.no_grad()
def test_stands_back_for_a_class_that_was_patched(calls, monkeypatch):
    model, seen = model_of(2, 64, True), []
    for kind in (Block, MLP, LayerNorm):
        with monkeypatch.context() as patch:
            own = kind.forward
            patch.setattr(kind, "forward", lambda *a, own=own: (seen.append("mine"), own(*a))[1])
            model.transformer(torch.tensor([[3]]), cache_of(model, 1, 3, torch.float32))
        assert seen.pop() == "mine"
    assert not calls


@torch.no_grad()
def test_errors():
    model = model_of(2, 64, True)
    with pytest.raises(pygpt.errors.InputError, match="the KV cache holds 100 tokens; 101 do not fit"):
        model.transformer(torch.zeros(1, 1, dtype=torch.int64), cache_of(model, 1, 100, torch.float32))
    for start, error, message in (
        (torch.zeros(1, 1, dtype=torch.int64), pygpt.errors.InputTypeError, "must be int32"),
        (torch.zeros(1, 2).int(), pygpt.errors.InputError, r"must (have the shape|be)"),
    ):
        cache = cache_of(model, 1, 3, torch.float32)
        before = cache.k.clone()
        with pytest.raises(error, match=message):
            model.transformer(torch.zeros(1, 1, dtype=torch.int64), cache, start)
        assert torch.equal(cache.k, before)
    x, norms = torch.randn(1, 1, 4), [torch.ones(4)] * 3
    linears = [torch.ones(s) for s in ((12, 4), (4, 4), (16, 4), (4, 16))]
    k = torch.zeros(1, 1, 3, 2, 2)
    op = torch.ops.pygpt.decode_blocks.default
    torch.library.opcheck(op, (x, norms, linears, [], k, k.clone(), 1, 1e-5, None))
    bad = {
        "x must be": (x[0], norms, linears, [], k, k, 0, 1e-5, None),
        "weights of 2 LayerNorms": (x, norms * 2, linears, [], k, k, 0, 1e-5, None),
        "does not fit": (x, norms, linears, [], k, k, 3, 1e-5, None),
        "caches must have one shape": (x, norms, linears, [], k, k[:, :, :2], 0, 1e-5, None),
        "caches must have x's dtype": (x, norms, linears, [], k.double(), k, 0, 1e-5, None),
        "does not fit into": (
            torch.zeros(1, 1, 257),
            norms,
            linears,
            [],
            *[torch.zeros(1, 1, 3, 1, 257)] * 2,
            0,
            1e-5,
            None,
        ),
        "not fit into the caches": (
            torch.zeros(1, 1, 0),
            norms,
            linears,
            [],
            *[torch.zeros(1, 1, 3, 0, 2)] * 2,
            0,
            1e-5,
            None,
        ),
        "neighbours": (x, norms, linears, [], k.mT, k.mT, 0, 1e-5, None),
        "3 C outputs": (x, norms, linears[1:2] * 4, [], k, k, 0, 1e-5, None),
    }
    bad["x does not fit"] = (x, norms, linears, [], k, k, 2**63 - 1, 1e-5, None)
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)

"""Linear layers with 8-bit weights, and a model of them, against float64 on the same rounded weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from common import assert_close, double, leaf
from torch import nn

from pygpt import GPT, GPTConfig, ops
from pygpt.errors import InputError, InputTypeError
from pygpt.nn import Int8Linear
from pygpt.ops import backends
from pygpt.train import lora
from pygpt.train.evaluate import EvaluateConfig

DTYPES = [torch.float32, torch.bfloat16]
needs_extension = pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (1, 1), (0, 4), (4, 0)], ids=str)
def test_rounds_to_the_nearest_of_255_steps(shape, dtype):
    weight = (torch.randn(shape) * torch.logspace(-6, 3, max(shape[0], 1))[: shape[0], None]).to(dtype)
    q, scale = ops.quantize_int8(weight)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    largest = weight.double().abs().amax(1) if shape[1] else torch.zeros(shape[0])
    off = (q.double() * scale.double()[:, None] - weight.double()).abs()
    # The scale and the quotient, of up to 127, are rounded to float32: beside a tie that may decide.
    assert (off <= largest[:, None] / 127 * (0.5 + 127 * 2**-23)).all()
    if shape[1]:
        torch.testing.assert_close(scale.double() * 127, largest, rtol=1e-6, atol=0)


def test_rows_of_zeros_and_bad_weights():
    q, scale = ops.quantize_int8(torch.zeros(2, 3))
    assert not q.any()
    assert scale.isfinite().all()
    for bad in (torch.tensor([[1.0, math.inf]]), torch.tensor([[math.nan, 1.0]])):
        with pytest.raises(InputError, match="not finite"):
            ops.quantize_int8(bad)
    with pytest.raises(InputError, match=r"must be \(N, K\)"):
        ops.quantize_int8(torch.zeros(3))
    with pytest.raises(InputTypeError, match="must be floating-point"):
        ops.quantize_int8(torch.zeros(2, 3, dtype=torch.int64))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 13, 15])
@pytest.mark.parametrize(("K", "N"), [(64, 8), (1, 1), (3, 4), (37, 6), (129, 7), (768, 5)])
def test_kernel_matches_float64(capability, rows, K, N, dtype):
    x = leaf(rows, K, dtype=dtype).detach()
    weight, scale = ops.quantize_int8(leaf(N, K, seed=1))
    weight[0, 0] = -128  # which quantize_int8 never gives, and int8 has
    for bias in (None, leaf(N, dtype=dtype, seed=2).detach()):
        y = torch.ops.pygpt.linear_int8(x, weight, scale, bias)
        exact = F.linear(x.double(), weight.double() * scale.double()[:, None], None if bias is None else bias.double())
        assert y.dtype == dtype
        assert_close(y, exact, dtype, floor=math.sqrt(K))
        with torch.no_grad():
            assert torch.equal(ops.linear_int8(x, weight, scale, bias), y)


# (64, 770, 33000) and (1500, 770, 1400): sums of bfloat16 that wait for a second part of K are of half of the result at a time.
@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "K", "N"),
    [
        (31, 40, 5),
        (32, 1, 1),
        (33, 37, 6),
        (32, 8, 17),
        (70, 800, 49),
        (47, 129, 7),
        (64, 770, 33000),
        (1500, 770, 1400),
    ],
)
def test_many_rows_match_float64(capability, rows, K, N, dtype):
    has_vectors = backends.extension.multiplies_by_vectors()
    if not has_vectors and rows * N > 10000:
        pytest.skip("this level leaves products of many rows to a library, which has no halves of results")
    x, bias = leaf(rows, K, dtype=dtype).detach(), leaf(N, dtype=dtype, seed=2).detach()
    weight, scale = ops.quantize_int8(leaf(N, K, seed=1).detach() * torch.logspace(-3, 3, N)[:, None])
    for b in (None, bias):
        with torch.no_grad():
            y = ops.linear_int8(x, weight, scale, b)
        exact = F.linear(x.double(), weight.double() * scale.double()[:, None], None if b is None else b.double())
        assert y.dtype == dtype
        size = scale.double() * 127  # columns of very different magnitudes: each beside its own
        assert_close(y.double() / size, exact / size, dtype, floor=math.sqrt(K))
        if has_vectors:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            assert torch.equal(torch.ops.pygpt.linear_int8(x, weight, scale, b), y)
            torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (16, 8), (3, 7, 8), (2, 8), (8,)], ids=str)
def test_any_number_of_rows_and_gradients(backend, shape, dtype):
    x = leaf(*shape, dtype=dtype)
    weight, scale = ops.quantize_int8(leaf(5, 8, seed=1))
    bias = leaf(5, dtype=dtype, seed=2)
    exact_x, exact_bias = double(x), double(bias)
    exact = F.linear(exact_x, weight.double() * scale.double()[:, None], exact_bias)
    cotangent = leaf(*exact.shape, dtype=dtype, seed=3).detach()
    with backends.use_backend(backend):
        y = ops.linear_int8(x, weight, scale, bias)
        y.backward(cotangent)
        with torch.no_grad():
            assert_close(ops.linear_int8(x, weight, scale, bias), exact, dtype, floor=math.sqrt(8))
    exact.backward(cotangent.double())
    assert_close(y, exact, dtype, floor=math.sqrt(8))
    assert_close(x.grad, exact_x.grad, dtype, floor=math.sqrt(5))
    assert_close(bias.grad, exact_bias.grad, dtype, floor=math.sqrt(16))


def test_views():
    x, scale = leaf(6, 3).detach().t(), leaf(8, seed=2).detach()[::2].abs()
    weight = torch.randint(-127, 128, (6, 4), dtype=torch.int8).t()
    bias = leaf(4, 2, seed=3).detach()[:, 1]
    exact = F.linear(x.double(), weight.double() * scale.double()[:, None], bias.double())
    with torch.no_grad():
        assert_close(ops.linear_int8(x, weight, scale, bias), exact)


@needs_extension
def test_opcheck():
    weight, scale = ops.quantize_int8(torch.randn(5, 8))
    for bias in (None, torch.randn(5)):
        torch.library.opcheck(torch.ops.pygpt.linear_int8.default, (torch.randn(2, 3, 8), weight, scale, bias))


def test_errors():
    weight, scale = ops.quantize_int8(torch.randn(5, 8))
    x = torch.randn(2, 8)
    for arguments in [(x[:, :7], weight, scale), (x, weight[0], scale), (x, weight, scale[:4])]:
        with pytest.raises(InputError, match=r"must be \(\.\.\., K\), \(N, K\) and \(N,\)"):
            ops.linear_int8(*arguments)
    for arguments in [(x, weight.int(), scale), (x, weight, scale.double()), (x.long(), weight, scale)]:
        with pytest.raises(InputTypeError, match="must be floating-point, int8 and float32"):
            ops.linear_int8(*arguments)
    for bias in (torch.randn(4), torch.randn(5).bfloat16()):
        with pytest.raises(InputError, match="bias"):
            ops.linear_int8(x, weight, scale, bias)
    with pytest.raises(InputError, match="is on meta"):
        ops.linear_int8(x, weight, scale.to("meta"))
    if backends.extension is not None:  # a direct call
        for rows, K, N in ((40, 0, 5), (3, 0, 5), (40, 8, 0)):
            y = torch.ops.pygpt.linear_int8(
                torch.ones(rows, K), torch.ones(N, K, dtype=torch.int8), torch.ones(N), None
            )
            assert torch.equal(y, torch.zeros(rows, N))
        with pytest.raises(RuntimeError, match="must be int8"):
            torch.ops.pygpt.linear_int8(x, weight.float(), scale, None)
        with pytest.raises(RuntimeError, match="must both be float32"):
            torch.ops.pygpt.linear_int8(x.double(), weight, scale, None)


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=32, vocab_size=61, n_layer=2, n_head=2, n_embd=24)).eval()


def rounded(original: GPT) -> GPT:
    """The same model with the weights that 8 bits hold, in float64; its head is no longer tied."""
    twin = copy.deepcopy(original)
    twin.lm_head.weight = nn.Parameter(twin.lm_head.weight.detach().clone())
    for layer in twin.modules():
        if isinstance(layer, nn.Linear):
            q, scale = ops.quantize_int8(layer.weight)
            layer.weight.data = q * scale[:, None]
    return twin.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_model_computes_with_the_rounded_weights(dtype):
    original = model().to(dtype)
    before = copy.deepcopy(original.state_dict())
    small, exact = original.to_int8(), rounded(original)
    layers = [layer for layer in small.modules() if isinstance(layer, nn.Linear | Int8Linear)]
    assert len(layers) == 4 * 2 + 1
    assert all(isinstance(layer, Int8Linear) for layer in layers)
    idx = torch.randint(61, (2, 20))
    with backends.use_backend("eager"):
        logits, loss = exact(idx)[0], exact(idx, idx.roll(-1, 1))[1]
    for tokens in (20, 3):  # by the library, but for AVX2 alone, and by the kernel
        assert_close(small(idx[:, :tokens])[0], logits[:, :tokens], dtype, floor=1.0)
    assert small(idx, idx.roll(-1, 1))[1].item() == pytest.approx(
        loss.item(), rel=1e-5 if dtype == torch.float32 else 1e-2
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())
    assert not any(parameter.requires_grad for parameter in small.parameters())
    assert original.lm_head.weight is original.transformer.wte.weight


def test_model_generates_as_the_rounded_one_does():
    small, exact = model().to_int8(), rounded(model())
    idx = torch.randint(61, (2, 5))
    with backends.use_backend("eager"):
        wanted = exact.generate(idx, 12, temperature=0)
    assert torch.equal(small.generate(idx, 12, temperature=0), wanted)
    assert small.generate([[1, 2, 3], [4]], 3, temperature=0)[1][:1] == [4]


def test_under_autocast():
    small, exact = model().to_int8(), rounded(model())
    idx = torch.randint(61, (2, 20))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        layer = small.transformer.h[0].attn.c_attn
        x = torch.randn(3, layer.weight.shape[1])
        assert layer(x).dtype == torch.bfloat16
        assert_close(layer(x), x.double() @ layer.dequantized(torch.float64).T + layer.bias.double(), torch.bfloat16)
        assert small.generate(idx[:, :3], 4).shape == (2, 7)
        assert_close(small(idx)[0], exact(idx)[0].double(), torch.bfloat16)


def test_what_eight_bits_cannot_do(tmp_path):
    with pytest.raises(InputError, match=r"8 bits.*save the one it was made from"):
        model().to_int8().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputTypeError, match=r"scale \(torch.float64\) must be"):
        model().to_int8().double()(torch.zeros(1, 3, dtype=torch.int64))
    adapted = model()
    pytest.importorskip("peft", reason="peft is not installed")
    lora.add_lora(adapted)
    with pytest.raises(InputError, match="LoRA adapters: merge them first"):
        adapted.to_int8()
    with pytest.raises(InputError, match="int8 is for language models"):
        EvaluateConfig(run=tmp_path, labelled=tmp_path / "a.tsv", int8=True)

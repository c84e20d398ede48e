"""What only a GPU can show of the kernels there: the public ops at real sizes, their bits, graphs and compilation.

tests/test_triton.py runs its whole case list on the GPU too where there is one.
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from common import assert_close, new_memory_is_nan

import pygpt
from pygpt import GPT, GPTConfig, ops
from pygpt.ops import backends
from pygpt.optim import AdamW

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: the GPU kernels are not run", allow_module_level=True)

COLUMNS = [name for name in ("cuda", "triton") if backends.ready(name)]
if "cuda" in COLUMNS and torch.cuda.get_device_capability() == (9, 0):
    COLUMNS.append("cuda, portable")
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(params=COLUMNS or ["none"])
def column(request, monkeypatch):
    """Each of pygpt's GPU backends in turn, forced; on compute capability 9.0 the CUDA one also with its portable attention."""
    if request.param == "none":
        reasons = {c.name: c.problem for c in backends.columns() if c.device == "cuda"}
        pytest.fail(f"there is a CUDA device but no backend for it: {reasons}")
    name, _, portable = request.param.partition(", ")
    monkeypatch.setenv("PYGPT_CUDA_HOPPER", str(int(not portable)))
    with pygpt.use_backend(name):
        yield name


def draw(*shape, dtype=BF16, seed=0, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype).requires_grad_()


def check(run, inputs, dtype, floor=1e-3):
    """Outputs and gradients against float64; and the same bits on a second run."""
    grads = []
    for _ in range(2):
        out = run(*inputs)
        grad = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(5), device="cuda").to(out.dtype)
        grads.append([out, *torch.autograd.grad(out, inputs, grad)])
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second), "two runs differ"
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    with backends.use_backend("eager"):
        expected = run(*doubles)
        expected = [expected, *torch.autograd.grad(expected, doubles, grad.double())]
    for at, (actual, reference) in enumerate(zip(grads[0], expected, strict=True)):
        assert_close(actual, reference, dtype, f"result {at}", floor)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("rows", "C"), [(4096, 768), (1000, 1600), (333, 4096), (64, 12288)])
def test_layer_norm(column, rows, C, dtype):
    check(
        ops.layer_norm, [draw(rows, C, dtype=dtype), draw(C, dtype=dtype, seed=1), draw(C, dtype=dtype, seed=2)], dtype
    )


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("B", "T", "H", "D"), [(2, 1024, 12, 64), (1, 1000, 4, 128), (2, 77, 3, 96)])
def test_attention(column, B, T, H, D, dtype):
    check(
        lambda x: ops.causal_attention_qkvpacked(x, H),
        [draw(B, T, 3 * H * D, dtype=dtype)],
        dtype,
    )


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("B", "T", "H", "D"), [(2, 1024, 12, 64), (1, 1000, 4, 128), (2, 77, 3, 96)])
def test_attention_of_a_packed_projection(column, B, T, H, D, dtype):
    qkv, grad = draw(B, T, 3 * H * D, dtype=dtype), draw(B, T, H * D, dtype=dtype, seed=1).detach()
    apart = [t.detach().contiguous().requires_grad_() for t in qkv.view(B, T, 3, H, D).unbind(2)]
    expected_out = ops.causal_attention(*apart)
    expected = torch.autograd.grad(expected_out, apart, grad.view_as(expected_out))
    with new_memory_is_nan(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = ops.causal_attention_qkvpacked(qkv, H)
        (whole,) = torch.autograd.grad(out, qkv, grad)
    assert torch.equal(out, expected_out.flatten(2))
    assert whole.is_contiguous()
    assert torch.equal(whole, torch.stack(expected, 2).flatten(2))
    ran = {event.key for event in profile.key_averages()}
    assert not ran & {"aten::cat", "aten::stack", "aten::copy_", "aten::clone"}


def test_attention_dropout_drops_what_the_reference_drops(column):
    q, k, v = (draw(1, 300, 2, 64, dtype=F32, seed=i) for i in range(3))
    torch.manual_seed(3)
    out = ops.causal_attention(q, k, v, dropout_p=0.2)
    torch.manual_seed(3)
    with backends.use_backend("eager"):
        expected = ops.causal_attention(*(x.double() for x in (q, k, v)), dropout_p=0.2)
    assert_close(out, expected, F32)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_attention_of_documents(column, dtype):
    starts = torch.tensor([0] * 300 + [300] + [301] * 499 + [800] * 200, dtype=torch.int32, device="cuda").repeat(2, 1)
    check(
        lambda x: ops.causal_attention(*x.unflatten(2, (3, 4, 64)).unbind(2), document_start=starts),
        [draw(2, 1000, 3 * 4 * 64, dtype=dtype)],
        dtype,
    )


def test_attention_of_one_query_and_many_keys(column):
    q, k, v = draw(2, 1, 12, 64), draw(2, 3001, 12, 64, seed=1), draw(2, 3001, 12, 64, seed=2)
    with torch.no_grad():
        out = ops.causal_attention(q, k, v)
        with backends.use_backend("eager"):
            expected = ops.causal_attention(q.double(), k.double(), v.double())
    assert_close(out, expected, BF16)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("rows", "C"), [(4096, 3072), (1000, 6400), (77, 1023)])
def test_gelu(column, rows, C, dtype):
    check(ops.gelu, [draw(rows, C, dtype=dtype, scale=3.0)], dtype)
    check(ops.gelu, [draw(rows, C, dtype=dtype, scale=3.0), draw(C, dtype=dtype, seed=1)], dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_adamw(column, dtype):
    """Ten steps from the same start follow torch's AdamW in float64 on the same gradients."""
    ours = [draw(1000, 33, dtype=dtype), draw(7, dtype=dtype, seed=1)]
    doubles = [p.detach().double().requires_grad_() for p in ours]
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer, reference = AdamW(ours, **options), torch.optim.AdamW(doubles, **options)
    for step in range(10):
        for at, (p, r) in enumerate(zip(ours, doubles, strict=True)):
            p.grad = draw(*p.shape, dtype=dtype, seed=10 * step + at).detach()
            r.grad = p.grad.double()
        optimizer.step()
        reference.step()
    for p, r in zip(ours, doubles, strict=True):
        assert_close(p, r, dtype)


@pytest.mark.parametrize("ids", ["uniform", "hot", "one"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_embedding(column, ids, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    idx = torch.randint(50257, (8, 1024), generator=generator, device="cuda")
    if ids == "hot":
        idx = torch.where(torch.rand(idx.shape, generator=generator, device="cuda") < 0.5, 13, idx)
    elif ids == "one":
        idx = torch.full_like(idx, 50256)
    check(
        lambda wte, wpe: ops.embedding(idx, wte, wpe),
        [draw(50257, 768, dtype=dtype), draw(1024, 768, dtype=dtype)],
        dtype,
    )


def test_linear_cross_entropy(column):
    targets = torch.randint(50257, (2048,), device="cuda")
    targets[::7] = -100
    hidden, weight = draw(2048, 768), draw(50257, 768, scale=0.02)
    loss = ops.linear_cross_entropy(hidden, weight, targets)
    doubles = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = F.cross_entropy(doubles[0] @ doubles[1].t(), targets)
    assert_close(loss, expected, BF16)
    for actual, reference in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, doubles), strict=True
    ):
        assert_close(actual, reference, BF16)


def test_a_hundred_runs_give_the_same_bits(column):
    """Half of the tokens are one, so that many threads add to one row; attention drops, by a seed that is set anew."""
    generator = torch.Generator("cuda").manual_seed(0)
    idx = torch.randint(5000, (4, 512), generator=generator, device="cuda")
    idx = torch.where(torch.rand(idx.shape, generator=generator, device="cuda") < 0.5, 13, idx)
    table, weight, bias = draw(5000, 256), draw(256, seed=1), draw(768, seed=2)
    project = draw(256, 768, seed=3, scale=0.06)

    def run():
        torch.manual_seed(1)
        x = ops.layer_norm(ops.embedding(idx, table), weight)
        q, k, v = ops.gelu(x @ project, bias).view(4, 512, 3, 4, 64).unbind(2)
        y = ops.causal_attention(q, k, v, dropout_p=0.1).reshape(-1, 256)
        loss = ops.linear_cross_entropy(y, table, idx.flatten())
        return [y, loss, *torch.autograd.grad(loss, (table, weight, bias, project))]

    first = run()
    for _ in range(99):
        for actual, expected in zip(run(), first, strict=True):
            assert torch.equal(actual, expected)


def small_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=501, n_layer=2, n_head=2, n_embd=128)).cuda()
    return model, *torch.randint(501, (2, 4, 128), device="cuda")


def test_model_against_the_reference(column):
    model, idx, targets = small_model()
    loss = model(idx, targets)[1]
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model = model.double()
    model.zero_grad()
    with backends.use_backend("eager"):
        expected = model(idx, targets)[1]
        expected.backward()
    assert_close(loss, expected, torch.float16)
    for grad, p in zip(grads, model.parameters(), strict=True):
        assert_close(grad, p.grad, torch.float16)


def test_model_compiles_whole_and_not_again_for_a_new_length(column):
    model, idx, targets = small_model()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for T in (
        96,
        64,
        32,
    ):  # none that the model has too, as a width or a number of positions: that one would be tied to it
        rows, following = idx[:, :T].contiguous(), targets[:, :T].contiguous()
        assert_close(compiled(rows, following)[1], model(rows, following)[1], torch.float16)
        graphs.append(len(counter.graphs))
    assert len(set(graphs)) == 1  # what the first length compiled serves the others


def test_step_in_a_cuda_graph(column):
    """No host synchronisation anywhere: forward and backward are captured, and replayed on other tokens."""
    model, idx, targets = small_model()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            model(idx, targets)[1].backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(idx, targets)[1]
        loss.backward()
    idx.copy_(idx.flip(0, 1))
    for p in model.parameters():
        p.grad.zero_()
    graph.replay()
    captured = [loss.clone(), *(p.grad.clone() for p in model.parameters())]
    model.zero_grad(set_to_none=True)
    expected = model(idx, targets)[1]
    expected.backward()
    for actual, reference in zip(captured, [expected, *(p.grad for p in model.parameters())], strict=True):
        assert_close(actual, reference, torch.float16)

"""causal_attention_qkvpacked: the attention of q, k and v as they lie in a projection, and its gradient in one piece."""

from __future__ import annotations

import math

import pytest
import torch
from common import assert_close, document_starts, double, leaf
from test_attention import explicit, needs_extension
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.attention import SDPBackend, sdpa_kernel

from pygpt import ops
from pygpt.errors import InputError, InputTypeError, PygptError
from pygpt.ops import backends

DTYPES = [torch.float32, torch.bfloat16]
forward_op = torch.ops.pygpt.causal_attention_qkvpacked_forward if backends.extension else None
backward_op = torch.ops.pygpt.causal_attention_qkvpacked_backward if backends.extension else None
B, T, H, D = 2, 70, 3, 40
SHAPES = [(2, 70, 3, 40), (1, 600, 1, 64), (3, 200, 2, 33), (1, 90, 3, 16), (2, 67, 2, 80), (1, 1, 1, 1)]


def apart(qkv, n_head):
    return qkv.unflatten(2, (3, n_head, -1)).unbind(2)


def of_views(qkv, n_head, *settings):
    return ops.causal_attention(*apart(qkv, n_head), *settings).flatten(2)


def both(qkv, n_head, cotangent, *settings):
    """Results and gradients of the op, and of the one of q, k and v."""
    found = []
    for op in (ops.causal_attention_qkvpacked, of_views):
        torch.manual_seed(5)
        out = op(qkv, n_head, *settings)
        found.append((out, torch.autograd.grad(out, qkv, cotangent)[0]))
    return found


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 70, 3, 40), (1, 600, 1, 64), (3, 200, 2, 33), (1, 90, 3, 16), (2, 67, 2, 80), (1, 1, 1, 1)], ids=str
)
def test_the_bits_are_those_of_views(capability, shape, dtype, dropout_p, documents):
    """In one pass, by blocks in parallel, of widths that fill no vector."""
    B, T, H, D = shape
    starts = document_starts([[T // 3, T - T // 3] if T > 3 else [T]], T).expand(B, T) if documents else None
    qkv, cotangent = leaf(B, T, 3 * H * D, dtype=dtype), leaf(B, T, H * D, dtype=dtype, seed=9).detach()
    (out, grad), (expected, expected_grad) = both(qkv, H, cotangent, 0.3, dropout_p, starts)
    assert out.shape == (B, T, H * D)
    assert out.is_contiguous()
    assert torch.equal(out, expected)
    assert torch.equal(grad, expected_grad)
    if dropout_p == 0.0:
        wide = double(qkv)
        reference = explicit(*apart(wide, H), 0.3, document_start=starts)[0].flatten(2)
        assert_close(out, reference, dtype)
        reference.backward(cotangent.double())
        assert_close(grad, wide.grad, dtype)


@pytest.mark.parametrize(
    "layout", ["transposed", "part of a row", "part of a column", "a gradient of one number", "empty"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@needs_extension
def test_layouts(layout, dtype):
    width = 3 * H * D
    qkv, cotangent = leaf(B, T, width, dtype=dtype), leaf(B, T, H * D, dtype=dtype, seed=9).detach()
    if layout == "transposed":
        qkv = leaf(width, T, B, dtype=dtype).permute(2, 1, 0)
    elif layout == "part of a row":
        qkv = leaf(B, T, width + 5, dtype=dtype)[..., 2:-3]
    elif layout == "part of a column":
        qkv = leaf(T + 4, B, width, dtype=dtype)[2:-2].transpose(0, 1)
    elif layout == "empty":
        qkv, cotangent = leaf(0, T, width, dtype=dtype), cotangent[:0]
    else:
        cotangent = torch.ones((), dtype=dtype).expand(B, T, H * D)
    (out, grad), (expected, expected_grad) = both(qkv, H, cotangent)
    assert torch.equal(out, expected)
    assert torch.equal(grad, expected_grad)
    if layout == "empty":
        none = leaf(B, 0, width, dtype=dtype)
        ops.causal_attention_qkvpacked(none, H).sum().backward()
        assert none.grad.shape == none.shape


@needs_extension
def test_a_gradient_is_not_copied():
    qkv, cotangent = leaf(B, T, 3 * H * D), leaf(B, T, H * D, seed=1).detach()
    out = ops.causal_attention_qkvpacked(qkv, H)
    with torch.profiler.profile() as profile:
        (grad,) = torch.autograd.grad(out, qkv, cotangent)
    assert grad.is_contiguous()
    ran = {event.key for event in profile.key_averages()}
    assert "pygpt::causal_attention_qkvpacked_backward" in ran
    assert not any(name.startswith("aten::") and name not in ("aten::detach", "aten::empty_strided") for name in ran), (
        ran
    )


def test_without_a_gradient():
    qkv = leaf(B, T, 3 * H * D)
    with torch.no_grad():
        assert torch.equal(ops.causal_attention_qkvpacked(qkv, H), of_views(qkv, H))
    assert not ops.causal_attention_qkvpacked(qkv.detach(), H).requires_grad


def test_the_reference_answers_where_kernels_cannot():
    """Other dtypes, heads too wide for a kernel, and where it is asked for."""
    for dtype, n_head, width in ((torch.float64, 2, 12), (torch.float32, 1, 3 * 257)):
        qkv = leaf(1, 3, width, dtype=dtype)
        (out, grad), (expected, expected_grad) = both(qkv, n_head, torch.ones(1, 3, width // 3, dtype=dtype))
        assert torch.equal(out, expected)
        assert torch.equal(grad, expected_grad)
    with backends.use_backend("eager"):
        (out, grad), (expected, expected_grad) = both(leaf(1, 3, 12), 2, torch.ones(1, 3, 4))
        assert torch.equal(out, expected)
        assert torch.equal(grad, expected_grad)
    if backends.extension is not None:
        with (
            backends.use_backend("cpp"),
            pytest.raises(InputError, match=r"qkvpacked: .*head dimensions up to 256 in float32, got 257"),
        ):
            ops.causal_attention_qkvpacked(leaf(1, 3, 3 * 257), 1)


def test_second_derivatives():
    with sdpa_kernel(SDPBackend.MATH):  # float64: the reference answers
        qkv = double(leaf(1, 3, 12))
        assert torch.autograd.gradgradcheck(lambda x: ops.causal_attention_qkvpacked(x, 2), qkv)
    if backends.extension is not None:
        qkv = leaf(1, 9, 24)
        loss = ops.causal_attention_qkvpacked(qkv, 2).square().sum()
        (first,) = torch.autograd.grad(loss, qkv, create_graph=True)
        with pytest.raises(PygptError, match="causal_attention_qkvpacked has no second derivative"):
            first.sum().backward()


def test_a_result_changed_in_place_is_noticed():
    qkv = leaf(1, 9, 24)
    out = ops.causal_attention_qkvpacked(qkv, 2)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_batch_of_gradients():
    qkv, given = leaf(1, 3, 12), leaf(5, 1, 3, 4, seed=1).detach()
    found, expected = (
        torch.autograd.grad(op(qkv, 2), qkv, given, is_grads_batched=True)[0]
        for op in (ops.causal_attention_qkvpacked, of_views)
    )
    assert torch.equal(found, expected)


def test_torch_func_and_forward_mode():
    qkv, tangent = leaf(1, 9, 24).detach(), leaf(1, 9, 24, seed=1).detach()

    def loss(x, op):
        return op(x, 2).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
            found = transform(loss)(qkv, ops.causal_attention_qkvpacked)
            assert_close(found, transform(loss)(qkv, of_views).double())
        found, expected = (
            torch.func.jvp(lambda x: loss(x, op), (qkv,), (tangent,))[1]  # noqa: B023
            for op in (ops.causal_attention_qkvpacked, of_views)
        )
        assert_close(found, expected.double())


@needs_extension
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_once_for_every_length(dynamic):
    graphs = []

    def count(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        lambda x: ops.causal_attention_qkvpacked(x, H),
        fullgraph=True,
        dynamic=dynamic,
        backend=aot_autograd(fw_compiler=count),
    )
    for length in (70, 66, 50) if dynamic else (70,):
        x, y = (leaf(B, length, 3 * H * D) for _ in range(2))
        compiled(x).square().sum().backward()
        of_views(y, H).square().sum().backward()
        assert_close(x.grad, y.grad.double())
    forward, backward = graphs
    assert "pygpt.causal_attention_qkvpacked_forward.default" in forward
    assert "pygpt.causal_attention_qkvpacked_backward.default" in backward
    assert not any("cat" in name or "stack" in name for name in backward if name.startswith("aten"))


@needs_extension
def test_opcheck():
    qkv, grad = leaf(2, 5, 48).detach(), leaf(2, 5, 16, seed=1).detach()
    starts = torch.tensor([0, 0, 2, 3, 3]).int().expand(2, 5)
    for settings in ((0.0, None), (0.5, torch.tensor([3]), starts)):
        torch.library.opcheck(forward_op.default, (leaf(2, 5, 48), 2, 0.5, *settings))
        out, lse = forward_op.default(qkv, 2, 0.5, *settings)
        torch.library.opcheck(backward_op.default, (grad, qkv, out, lse, 2, 0.5, *settings))


def test_errors_name_what_is_wrong():
    for shape, n_head in (((2, 5, 47), 2), ((2, 5, 48), 5), ((5, 48), 2), ((2, 5, 48), 0), ((1, 2, 5, 48), 2)):
        with pytest.raises(InputError, match=r"qkv must be \(B, T, 3C\), C a multiple of n_head, got") as error:
            ops.causal_attention_qkvpacked(torch.zeros(shape), n_head)
        assert str(shape) in str(error.value)
    with pytest.raises(InputError, match=r"^causal_attention_qkvpacked: .*empty head dimension"):
        ops.causal_attention_qkvpacked(torch.zeros(2, 5, 0), 2)
    with pytest.raises(InputError, match=r"^causal_attention_qkvpacked: dropout_p must be in \[0, 1\), got 1.0"):
        ops.causal_attention_qkvpacked(torch.zeros(2, 5, 12), 2, dropout_p=1.0)
    with pytest.raises(InputTypeError, match=r"^causal_attention_qkvpacked: .*int64"):
        ops.causal_attention_qkvpacked(torch.zeros(2, 5, 12, dtype=torch.int64), 2)
    with pytest.raises(
        InputError, match=r"^causal_attention_qkvpacked: document_start must be \(B, T\) = \(2, 5\), got \(2, 4\)"
    ):
        ops.causal_attention_qkvpacked(torch.zeros(2, 5, 12), 2, document_start=torch.zeros(2, 4).int())


@needs_extension
def test_the_operators_check_their_arguments():
    qkv, out, lse = torch.zeros(1, 4, 24), torch.zeros(1, 4, 8), torch.zeros(1, 2, 4)
    starts = torch.tensor([[0, 1, 0, 0]]).int()
    with pytest.raises(RuntimeError, match="C a multiple of n_head"):
        forward_op(qkv, 5, 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="head dimension must be 1 to 256"):
        forward_op(torch.zeros(1, 1, 3 * 257), 1, 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        forward_op(qkv.double(), 2, 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="dropout needs a seed"):
        forward_op(qkv, 2, 1.0, 0.5, None)
    with pytest.raises(RuntimeError, match="must not decrease"):
        forward_op(qkv, 2, 1.0, 0.0, None, starts)
    for grad, given, sums in (
        (out[:, :3], out, lse), (out, out.bfloat16(), lse), (out[..., :7], out, lse), (out.view(1, 4, 2, 4), out, lse),
        (out, out, lse[..., :3]), (out, out, lse.double()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"grad and out must have|lse must be float32 \(B, H, T\)"):
            backward_op(grad, qkv, given, sums, 2, 1.0, 0.0, None)
    assert math.isfinite(backward_op(out, qkv, out, lse, 2, 1.0, 0.0, None).sum())

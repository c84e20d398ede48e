"""split_heads: q, k and v as views of one projection, and their gradients put together without a copy."""

from __future__ import annotations

import pytest
import torch
from common import assert_close, document_starts, double, leaf
from test_attention import explicit, needs_extension
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.attention import SDPBackend, sdpa_kernel

from pygpt import ops
from pygpt.errors import PygptError
from pygpt.ops import backends

DTYPES = [torch.float32, torch.bfloat16]
packed_op = torch.ops.pygpt.causal_attention_backward_packed if backends.extension else None
B, T, H, D = 2, 70, 3, 40


def projection(dtype=torch.float32):
    """A leaf and what a linear layer would make of it: not a leaf, so that its gradient is passed on as it is."""
    x = leaf(B, T, 3 * H * D, dtype=dtype)
    return x, x * 1.0


def plain(qkv, n_head):
    return qkv.unflatten(2, (3, n_head, -1)).unbind(2)


def gradients(split, loss, dtype=torch.float32):
    """The gradient of a projection, that of q, and how often gradients were copied together."""
    x, qkv = projection(dtype)
    seen = []
    qkv.register_hook(seen.append)
    q, k, v = split(qkv, H)
    q.register_hook(seen.append)
    with torch.profiler.profile() as profile:
        loss(q, k, v).backward()
    copies = sum(event.count for event in profile.key_averages() if event.key == "aten::cat")
    return x.grad, *reversed(seen), copies


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_passed_on_in_place(capability, dtype, dropout_p, documents):
    starts = document_starts([[20, 3, T - 23], [T]], T) if documents else None
    cotangent = leaf(B, T, H, D, dtype=dtype, seed=9).detach()

    def loss(q, k, v):
        torch.manual_seed(5)
        return (ops.causal_attention(q, k, v, dropout_p=dropout_p, document_start=starts) * cotangent).sum()

    grad, whole, of_q, copies = gradients(ops.split_heads, loss, dtype)
    assert copies == 0
    assert whole.data_ptr() == of_q.data_ptr()
    assert whole.is_contiguous()
    expected, *_, copies = gradients(plain, loss, dtype)
    assert copies == 1
    assert torch.equal(grad, expected)
    if dropout_p == 0.0:
        wide = double(leaf(B, T, 3 * H * D, dtype=dtype))
        (explicit(*plain(wide, H), document_start=starts)[0] * cotangent.double()).sum().backward()
        assert_close(grad, wide.grad, dtype)


def attention(q, k, v):
    return ops.causal_attention(q, k, v).square().sum()


OTHER_LOSSES = {
    "only q": lambda q, k, v: q.square().sum(),
    "not q": lambda q, k, v: (k * v).sum(),
    "twice": lambda q, k, v: attention(q, k, v) + attention(q, k, v),
    "swapped": lambda q, k, v: attention(k, q, v),
    "rotated": lambda q, k, v: attention(k, v, q),
    "and apart": lambda q, k, v: attention(q, k, v) + v.square().sum(),
    "fewer queries": lambda q, k, v: attention(q[:, 30:], k, v),
    "as many of each": lambda q, k, v: attention(q[:, 30:], k[:, 30:], v[:, 30:]),
    "one head": lambda q, k, v: attention(q[:, :, 1:2], k[:, :, 1:2], v[:, :, 1:2]),
    "heads first": lambda q, k, v: attention(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))),
}


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_extension)])
@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_any_other_gradients_are_put_together(name, backend):
    with backends.use_backend(backend):
        grad = gradients(ops.split_heads, OTHER_LOSSES[name])[0]
        assert torch.equal(grad, gradients(plain, OTHER_LOSSES[name])[0])


def test_a_gradient_accumulates():
    qkv = leaf(B, T, 3 * H * D)
    for _ in range(2):
        attention(*ops.split_heads(qkv, H)).backward()
    expected = leaf(B, T, 3 * H * D)
    attention(*plain(expected, H)).backward()
    assert_close(qkv.grad, 2 * expected.grad.double())


def test_second_derivatives():
    qkv = double(leaf(1, 3, 12))  # float64: the reference answers
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda x: ops.causal_attention(*ops.split_heads(x, 2)), qkv)
    x = leaf(1, 3, 12)  # and a loss of q, k and v themselves, through split_heads' own backward
    q, k, v = ops.split_heads(x, 2)
    (first,) = torch.autograd.grad((q * k * v).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    wide = double(x)
    q, k, v = plain(wide, 2)
    (first,) = torch.autograd.grad((q * k * v).sum(), wide, create_graph=True)
    assert_close(second, torch.autograd.grad(first.square().sum(), wide)[0])


def test_gradients_side_by_side_that_have_derivatives_themselves():
    qkv, given, weight = leaf(1, 3, 12), leaf(1, 3, 3, 2, 2, seed=1), leaf(1, 3, 12, seed=2).detach()
    (grad,) = torch.autograd.grad(ops.split_heads(qkv, 2), qkv, given.unbind(2), create_graph=True)
    (grad * weight).sum().backward()
    assert torch.equal(given.grad.view_as(weight), weight)


def test_a_batch_of_gradients():
    qkv, given = leaf(1, 3, 12), leaf(5, 1, 3, 2, 2, seed=1).detach()
    grads = torch.autograd.grad(sum(ops.split_heads(qkv, 2)), qkv, given, is_grads_batched=True)[0]
    assert torch.equal(grads.view(5, 1, 3, 3, 2, 2), given.unsqueeze(3).expand(5, 1, 3, 3, 2, 2))
    found, expected = (
        torch.autograd.grad(ops.causal_attention(*split(qkv, 2)), qkv, given, is_grads_batched=True)[0]
        for split in (ops.split_heads, plain)
    )
    assert torch.equal(found, expected)
    each = torch.func.vmap(lambda g: torch.autograd.grad(ops.split_heads(qkv, 2), qkv, g.unbind(2))[0])
    sides = leaf(5, 1, 3, 3, 2, 2).detach()  # side by side
    assert torch.equal(each(sides), sides.view(5, 1, 3, 12))


@needs_extension
def test_second_derivatives_of_the_compiled_attention_are_refused():
    qkv = leaf(1, 9, 24)
    (first,) = torch.autograd.grad(attention(*ops.split_heads(qkv, 2)), qkv, create_graph=True)
    with pytest.raises(PygptError, match="no second derivative"):
        first.sum().backward()


def test_torch_func_and_forward_mode():
    qkv, tangent = leaf(1, 9, 24).detach(), leaf(1, 9, 24, seed=1).detach()

    def loss(x, split):
        return attention(*split(x, 2))

    with sdpa_kernel(SDPBackend.MATH):
        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
            assert_close(transform(loss)(qkv, ops.split_heads), transform(loss)(qkv, plain).double())
        found, expected = (
            torch.func.jvp(lambda x: loss(x, split), (qkv,), (tangent,))[1]  # noqa: B023
            for split in (ops.split_heads, plain)
        )
        assert_close(found, expected.double())


@needs_extension
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_once_for_every_length(dynamic):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        lambda x: attention(*ops.split_heads(x, H)),
        fullgraph=True,
        dynamic=dynamic,
        backend=aot_autograd(fw_compiler=count),
    )
    for length in (70, 66, 50) if dynamic else (70,):
        x, y = (leaf(B, length, 3 * H * D) for _ in range(2))
        compiled(x).backward()
        attention(*plain(y, H)).backward()
        assert_close(x.grad, y.grad.double())
    assert len(graphs) == 2  # forward and backward


@needs_extension
def test_opcheck():
    q, k, v = (leaf(2, 5, 2, 8, seed=i).detach() for i in range(3))
    starts = torch.tensor([0, 0, 2, 3, 3]).int().expand(2, 5)
    for settings in ((0.0, None), (0.5, torch.tensor([3]), starts)):
        out, lse = torch.ops.pygpt.causal_attention_forward.default(q, k, v, 0.5, *settings)
        torch.library.opcheck(packed_op.default, (q, q, k, v, out, lse, 0.5, *settings))


@pytest.mark.parametrize(
    "shape", [(2, 5, 2, 8), (1, 600, 1, 64), (3, 200, 2, 33)], ids=str
)  # in one, blocks in parallel
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_gradients_apart(capability, dtype, shape):
    q, k, v, grad = (leaf(*shape, dtype=dtype, seed=i).detach() for i in range(4))
    for settings in ((0.0, None), (0.5, torch.tensor([3]))):
        out, lse = torch.ops.pygpt.causal_attention_forward.default(q, k, v, 0.5, *settings)
        saved = (grad, q, k, v, out, lse, 0.5, *settings)
        apart = torch.ops.pygpt.causal_attention_backward.default(*saved)
        assert all(gradient.is_contiguous() for gradient in apart)
        assert torch.equal(packed_op.default(*saved), torch.stack(apart, 2))


@needs_extension
def test_the_operator_checks_its_arguments():
    q, k = torch.zeros(1, 2, 1, 8), torch.zeros(1, 3, 1, 8)
    with pytest.raises(RuntimeError, match="one shape"):
        packed_op(q, q, k, k, q, torch.zeros(1, 1, 2), 1.0, 0.0, None)

"""bfloat16 attention where low-precision flash attention is known to go wrong: its rounding errors must not lean to one side.

Many keys that share a row's maximum, or a key that everyone looks at, together with values that share a sign, make errors of
a kind that add up over training instead of cancelling (Qiu and Yao, 2025, arXiv 2510.04212). Each result is compared with
float64 on the same bfloat16 inputs: the mean of the signed error must be small against the error's own spread.
"""

from __future__ import annotations

import pytest
import torch
from common import leaf
from test_attention import explicit

from pygpt import ops
from pygpt.ops import backends

B, T, H, D = 2, 256, 4, 64
LEAN = (
    0.1  # |mean| / standard deviation of the errors. Measured: up to 0.05 where a sink hides all other keys, else 0.04
)
KINDS = ["repeated maxima", "equal scores", "sink"]


def inputs(kind: str, sign: float) -> list[torch.Tensor]:
    """q, k, v and the output's gradient, bfloat16. Values and gradients lean to one side, as columns of trained models do."""
    q, k, v, grad = (leaf(B, T, H, D, seed=i).detach() for i in range(4))
    v, grad = v + 4 * sign, grad + sign
    if kind == "repeated maxima":  # eight keys after one another are the same: a maximum comes at least eight times
        k = k[:, ::8].repeat_interleave(8, 1)
    elif kind == "equal scores":
        q = q * 0
    else:  # the first key's score is about 20 above the others'
        q = q * 0.1 + 2.0
        k[:, 0] = 1.5
    return [x.bfloat16().requires_grad_() for x in (q, k, v)] + [grad.bfloat16()]


def lean(result: torch.Tensor, reference: torch.Tensor) -> float:
    error = result.detach().double() - reference.detach()
    spread = error.std().item()
    return error.mean().item() / spread if spread else 0.0


def check(kind: str, sign: float) -> None:
    q, k, v, grad = inputs(kind, sign)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    reference, _ = explicit(*wide)
    expected = torch.autograd.grad(reference, wide, grad.double())
    out = ops.causal_attention(q, k, v)
    results = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    for name, result, exact in zip(("out", "q", "k", "v"), results, (reference, *expected), strict=True):
        assert abs(lean(result, exact)) < LEAN, f"{kind}: errors of {name} lean by {lean(result, exact):.3f}"


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_the_kernels_do_not_lean(capability, kind, sign):
    check(kind, sign)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_the_reference_do_not_lean(kind):
    with backends.use_backend("eager"):
        check(kind, -1.0)


def test_the_measure_sees_what_leans():
    """Rounding towards zero, which is what a kernel does that drops the low half of a float32."""
    q, k, v, _ = inputs("repeated maxima", -1.0)
    exact, _ = explicit(*(x.detach().double() for x in (q, k, v)))
    dropped = (exact.float().view(torch.int32) & -65536).view(torch.float32)
    assert abs(lean(dropped, exact)) > 5 * LEAN
    assert abs(lean(exact.bfloat16(), exact)) < LEAN

"""The ops, their shapes and their peers: one entry per op, for `pygpt bench` and for the benches of the repository.

GB/s counts each input and output once. Attention's FLOPs count the visible half of the scores only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pygpt import ops
from pygpt.optim import AdamW

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """One op at one shape: ours and the peer, both on `inputs`. work: bytes (GB/s) or FLOPs (GFLOP/s) of one call, by
    passes."""

    ours: Callable[[], Any]
    peer: Callable[[], Any]
    peer_name: str
    inputs: list[Tensor]
    cotangents: list[Tensor]
    work: dict[str, float]
    unit: str = "GB/s"

    def call(self, ours: bool, passes: str, compiled: bool = False) -> Callable[[], Any]:
        """What to time. A forward pass alone is that of generation and evaluation, without autograd; training always runs
        both passes; "step" is a whole update."""
        function = self.ours if ours else self.peer
        if compiled:
            function = torch.compile(function, dynamic=False)
        if passes == "forward":
            return torch.no_grad()(function)
        return self._both(function) if passes == "forward+backward" else function

    def _both(self, function: Callable[[], Any]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            outputs = function()
            outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
            return outputs + list(torch.autograd.grad(outputs, self.inputs, self.cotangents))

        return run


@dataclass(frozen=True)
class Op:
    """make(shape, dtype, device) -> Pair. `pygpt bench` takes the first of the shapes, or `quick`, a small one."""

    make: Callable[[Shape, torch.dtype, str], Pair]
    shapes: dict[str, Shape]
    quick: str
    passes: tuple[str, ...] = ("forward", "forward+backward")


def _random(shape: Shape, dtype: torch.dtype, device: str, grad: bool = True) -> Tensor:
    return torch.randn(shape).to(device, dtype).requires_grad_(grad)


def _both(forward: float, backward: float) -> dict[str, float]:
    return {"forward": forward, "forward+backward": forward + backward}


def _attention(shape: Shape, dtype: torch.dtype, device: str) -> Pair:
    B, T, H, D = shape
    qkv = _random((B, T, 3 * H * D), dtype, device)

    # From one projection to the next, (B, T, H * D), as a model has them.
    def peer() -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in qkv.view(B, T, 3, H, D).unbind(2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, H * D)

    def ours() -> Tensor:
        return ops.causal_attention_qkvpacked(qkv, H)

    flops = 2.0 * B * H * T * T * D  # two products of 2 T^2 D each, of which half is visible; backward has five
    grads = [_random((B, T, H * D), dtype, device, False)]
    return Pair(ours, peer, "F.scaled_dot_product_attention", [qkv], grads, _both(flops, 2.5 * flops), "GFLOP/s")


def _attention_decode(shape: Shape, dtype: torch.dtype, device: str) -> Pair:
    """A token's attention in every layer, so that no cache holds the keys and values of the next one."""
    B, S, H, D, layers = shape
    q = torch.randn(B, 1, H, D).to(device, dtype)
    caches = [tuple(torch.randn(2, B, S, H, D).to(device, dtype)) for _ in range(layers)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    work = {"forward": 2.0 * layers * B * S * H * D * dtype.itemsize}
    return Pair(
        lambda: [ops.causal_attention(q, k, v) for k, v in caches],
        lambda: [attend(q, k, v) for k, v in caches],
        "F.scaled_dot_product_attention",
        [],
        [],
        work,
    )


def _embedding(shape: Shape, dtype: torch.dtype, device: str) -> Pair:
    B, T, V, C, with_positions = shape
    idx = torch.randint(0, V, (B, T)).to(device)
    tokens = _random((V, C), dtype, device)
    positions = _random((T, C), dtype, device) if with_positions else None

    def peer() -> Tensor:
        out = F.embedding(idx, tokens)
        return out if positions is None else out + F.embedding(torch.arange(T, device=device), positions)

    rows, more = B * T, T * C * with_positions
    forward = (2 * rows * C + more) * dtype.itemsize + 8 * rows  # rows gathered, result, positions; ids
    backward = (rows * C + V * C + more) * dtype.itemsize  # gradient; the tables' gradients
    return Pair(
        lambda: ops.embedding(idx, tokens, positions),
        peer,
        "F.embedding" + " + F.embedding" * with_positions,
        [tokens] if positions is None else [tokens, positions],
        [_random((B, T, C), dtype, device, False)],
        _both(forward, backward),
    )


def _layer_norm(shape: Shape, dtype: torch.dtype, device: str) -> Pair:
    C = shape[1]
    x, weight, bias = (_random(size, dtype, device) for size in (shape, (C,), (C,)))
    return Pair(
        lambda: ops.layer_norm(x, weight, bias),
        lambda: F.layer_norm(x, (C,), weight, bias),
        "F.layer_norm",
        [x, weight, bias],
        [_random(shape, dtype, device, False)],
        _both(2 * x.nbytes, 3 * x.nbytes),  # x, y; the gradient, x, the gradient of x
    )


def _add_layer_norm(shape: Shape, dtype: torch.dtype, device: str) -> Pair:
    C = shape[1]
    x, residual, weight, bias = (_random(size, dtype, device) for size in (shape, shape, (C,), (C,)))

    def peer() -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, (C,), weight, bias), total

    return Pair(
        lambda: ops.add_layer_norm(x, residual, weight, bias),
        peer,
        "x + r, F.layer_norm",
        [x, residual, weight, bias],
        [_random(shape, dtype, device, False)] * 2,
        _both(
            4 * x.nbytes, 4 * x.nbytes
        ),  # x, residual, y, sum; both gradients, sum, the gradient of x and of residual
    )


def _gelu(shape: Shape, dtype: torch.dtype, device: str) -> Pair:
    x = _random(shape, dtype, device)
    grads = [_random(shape, dtype, device, False)]
    peer = lambda: F.gelu(x, approximate="tanh")  # noqa: E731
    return Pair(lambda: ops.gelu(x), peer, "F.gelu", [x], grads, _both(2 * x.nbytes, 3 * x.nbytes))


def _linear(shape: Shape, dtype: torch.dtype, device: str) -> Pair:
    rows, K, N = shape
    x = torch.randn(rows, K).to(device, dtype)
    weight = (torch.randn(N, K) * 0.02).to(device, dtype)
    work = {"forward": float(x.nbytes + weight.nbytes + rows * N * x.itemsize)}
    return Pair(lambda: ops.linear(x, weight), lambda: F.linear(x, weight), "F.linear", [], [], work)


def _linear_prompt(shape: Shape, dtype: torch.dtype, device: str) -> Pair:
    """All linear layers of a model's blocks, so that no cache holds the weights of the next one."""
    rows, C, layers = shape
    xs = {K: torch.randn(rows, K).to(device, dtype) for K in (C, 4 * C)}
    sizes = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * layers
    weights = [(torch.randn(size) * 0.02).to(device, dtype) for size in sizes]
    biases = [torch.randn(N).to(device, dtype) for N, _ in sizes]

    def run(linear: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [linear(xs[w.shape[1]], w, b) for w, b in zip(weights, biases, strict=True)]

    flops = 2.0 * rows * sum(w.numel() for w in weights)
    return Pair(run(ops.linear), run(F.linear), "F.linear", [], [], {"forward": flops}, "GFLOP/s")


def _linear_training(shape: Shape, dtype: torch.dtype, device: str) -> Pair:
    rows, K, N = shape
    x, weight, bias = (_random(size, dtype, device) for size in ((rows, K), (N, K), (N,)))
    flops = 2.0 * rows * K * N
    return Pair(
        lambda: ops.linear(x, weight, bias),
        lambda: F.linear(x, weight, bias),
        "F.linear",
        [x, weight, bias],
        [_random((rows, N), dtype, device, False)],
        _both(flops, 2 * flops),
        "GFLOP/s",
    )


def _linear_cross_entropy(shape: Shape, dtype: torch.dtype, device: str) -> Pair:
    N, V, C = shape
    hidden = _random((N, C), dtype, device)
    weight = (torch.randn(V, C) * 0.02).to(device, dtype).requires_grad_()
    targets = torch.randint(0, V, (N,)).to(device)

    def peer() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    flops = 2.0 * N * V * C
    return Pair(
        lambda: ops.linear_cross_entropy(hidden, weight, targets),
        peer,
        "F.linear + F.cross_entropy",
        [hidden, weight],
        [torch.ones((), device=device)],
        _both(flops, 2 * flops),
        "GFLOP/s",
    )


def _adamw(shape: Shape, dtype: torch.dtype, device: str) -> Pair:
    """bfloat16 weights and gradients with float32 masters, against what plain PyTorch does there: all in float32."""
    C, layers, V = shape
    block = [(3 * C, C), (3 * C,), (C, C), (C,), (4 * C, C), (4 * C,), (C, 4 * C), (C,), (C,), (C,), (C,), (C,)]
    sizes = [size for size in [(V, C), (1024, C)] if V] + block * layers
    weights = [(torch.randn(size) * 0.02).to(device, dtype).requires_grad_() for size in sizes]
    plain = [weight.detach().float().requires_grad_() for weight in weights]
    for ours, peers in zip(weights, plain, strict=True):
        ours.grad = torch.randn_like(ours)
        peers.grad = ours.grad.float()
    optimizers = AdamW(weights, lr=1e-3), torch.optim.AdamW(plain, lr=1e-3, fused=True)

    def step(optimizer: torch.optim.Optimizer, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            optimizer.step()
            return [tensor.detach() for tensor in tensors]

        return run

    parameters = sum(weight.numel() for weight in weights)
    # Read gradient, weight and two averages, write the last three: the peer's bytes. With bfloat16 ours moves 26.
    return Pair(
        step(optimizers[0], weights),
        step(optimizers[1], plain),
        "torch.optim.AdamW(fused)",
        [],
        [],
        {"step": 28.0 * parameters},
    )


OPS = {
    "embedding": Op(
        _embedding,
        {
            "B4 T1024 V50257 C768": (4, 1024, 50257, 768, 1),
            "B4 T1024 V50257 C768, tokens only": (4, 1024, 50257, 768, 0),
            "B12 T64 V65 C128": (12, 64, 65, 128, 1),
            "B12 T64 V65 C128, tokens only": (12, 64, 65, 128, 0),
        },
        "B12 T64 V65 C128",
    ),
    "layer_norm": Op(
        _layer_norm,
        {"4096x768": (4096, 768), "1024x768": (1024, 768), "768x128": (768, 128), "1x768": (1, 768)},
        "1024x768",
    ),
    "add_layer_norm": Op(
        _add_layer_norm,
        {"4096x768": (4096, 768), "1024x768": (1024, 768), "768x128": (768, 128), "1x768": (1, 768)},
        "1024x768",
    ),
    "causal_attention": Op(
        _attention,
        {
            "B4 T1024 H12 D64": (4, 1024, 12, 64),
            "B1 T1024 H12 D64": (1, 1024, 12, 64),
            "B1 T4096 H12 D64": (1, 4096, 12, 64),
            "B12 T64 H4 D32": (12, 64, 4, 32),
        },
        "B12 T64 H4 D32",
    ),
    "causal_attention_decode": Op(  # keys, heads and layers
        _attention_decode,
        {
            "B1 S1024 H12 D64, 12 layers": (1, 1024, 12, 64, 12),
            "B8 S512 H12 D64, 12 layers": (8, 512, 12, 64, 12),
            "B1 S64 H4 D32, 4 layers": (1, 64, 4, 32, 4),
        },
        "B1 S64 H4 D32, 4 layers",
        ("forward",),
    ),
    "gelu": Op(_gelu, {"4096x3072": (4096, 3072), "1024x3072": (1024, 3072), "768x512": (768, 512)}, "768x512"),
    "linear": Op(  # of generation: the model's head, whose weight no cache holds; the last is small enough for one
        _linear,
        {
            "1 row, 50257x768": (1, 768, 50257),
            "8 rows, 50257x768": (8, 768, 50257),
            "1 row, 3072x768": (1, 768, 3072),
        },
        "1 row, 3072x768",
        ("forward",),
    ),
    "linear_prompt": Op(  # rows, width and layers
        _linear_prompt,
        {
            "32 tokens, GPT-2's blocks": (32, 768, 12),
            "64 tokens, GPT-2's blocks": (64, 768, 12),
            "256 tokens, GPT-2's blocks": (256, 768, 12),
            "32 tokens, 4 blocks of C 128": (32, 128, 4),
        },
        "32 tokens, 4 blocks of C 128",
        ("forward",),
    ),
    "linear_training": Op(
        _linear_training,
        {
            "1024 rows, 3072x768": (1024, 768, 3072),
            "1024 rows, 768x3072": (1024, 3072, 768),
            "768 rows, 512x128": (768, 128, 512),
        },
        "768 rows, 512x128",
    ),
    "linear_cross_entropy": Op(
        _linear_cross_entropy,
        {"N1024 V50257 C768": (1024, 50257, 768), "N768 V65 C128": (768, 65, 128)},
        "N768 V65 C128",
    ),
    "adamw": Op(
        _adamw,
        {"28M: 4 blocks of GPT-2": (768, 4, 0), "GPT-2 124M": (768, 12, 50257), "0.8M": (128, 4, 65)},
        "0.8M",
        ("step",),
    ),
}

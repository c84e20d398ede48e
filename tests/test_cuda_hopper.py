"""Hopper's instructions, one small kernel for each wrapper of csrc/cuda/ptx_sm90.h, against references in numpy; and the
attention kernels written with them, against the float64 reference.

They run on the emulated device; the instructions on a GPU of compute capability 9.0 too, where there is one.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import DOCUMENT_CASES, DOCUMENTS, document_starts
from cuda_emulation import build
from test_attention import explicit
from test_cuda_kernels import ATTENTIONS, Packed, compare_attention, library

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "built")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and shutil.which("nvcc")
__all__ = ["library"]  # a fixture


class Device:
    """Calls the exported functions on arrays of the host or of the GPU."""

    def __init__(self, library: ctypes.CDLL, where: str) -> None:
        self.library, self.where = library, where

    def call(self, name: str, *arguments: Any) -> None:
        given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        status = getattr(self.library, name)(
            *(ctypes.c_void_p(a) if type(a) is int and a > 2**31 else a for a in given)
        )
        if self.where == "cuda":
            torch.cuda.synchronize()
        assert status == 0


@pytest.fixture(scope="module", params=["seed 0", "seed 1", "seed 2", "GPU"])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Device:
    if request.param == "GPU":
        if not HOPPER:
            pytest.skip("no GPU of compute capability 9.0, or no nvcc to build for it")
        out = tmp_path_factory.mktemp("hopper") / "conformance_sm90.so"
        source, csrc = Path(build.HERE / "conformance_sm90.cu"), build.ROOT / "csrc"
        target = ["-std=c++20", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler=-fPIC", f"-I{csrc}"]
        subprocess.run(["nvcc", *target, source, "-o", out], check=True)
        return Device(ctypes.CDLL(str(out)), "cuda")
    (path,) = build.build("conformance_sm90.so")
    library = ctypes.CDLL(str(path))
    library.emulation_set_seed(ctypes.c_uint64(int(request.param[-1])))
    return Device(library, "cpu")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def swizzled(rows: np.ndarray) -> np.ndarray:
    """Rows of 64 elements as they lie in shared memory: 8 pieces of 16 bytes, permuted by the row's number."""
    pieces = rows.reshape(-1, 8, 8)
    return np.stack([row[np.arange(8) ^ (i % 8)] for i, row in enumerate(pieces)]).reshape(rows.shape)


# (a tensor's sizes, its strides in elements, a box of it, where the box begins): innermost dimension first. Inside; reaching
# out at the end, with and without rows between; beginning before the tensor; wholly outside; a box of three dimensions.
BOXES = [
    ((64, 40, 1, 1), (64, 64, 64), (64, 16, 1, 1), (0, 8, 0, 0)),
    ((72, 3, 20, 2), (80, 240, 4800), (64, 1, 24, 1), (0, 2, 8, 1)),
    ((72, 3, 20, 2), (80, 240, 4800), (64, 1, 16, 1), (64, 1, 0, 0)),
    ((64, 9, 1, 1), (64, 64, 64), (64, 16, 1, 1), (-8, -3, 0, 0)),
    ((64, 9, 1, 1), (64, 64, 64), (64, 8, 1, 1), (0, 9, 0, 0)),
    ((64, 5, 6, 3), (64, 320, 1920), (64, 3, 4, 2), (0, 3, 1, 2)),
]


@pytest.mark.parametrize("case", BOXES, ids=str)
def test_tensor_copy(device: Device, case: tuple[tuple[int, ...], ...]):
    sizes, strides, box, at = case
    memory = random(sizes[0] + sum((n - 1) * stride for n, stride in zip(sizes[1:], strides, strict=True)))
    tensor = np.lib.stride_tricks.as_strided(memory.numpy(), sizes[::-1], [2 * s for s in (*strides[::-1], 1)])
    wanted = np.zeros(box[::-1], np.float16)
    for index in np.ndindex(*box[::-1]):
        source = tuple(i + a for i, a in zip(index, at[::-1], strict=True))
        if all(0 <= s < n for s, n in zip(source, tensor.shape, strict=True)):
            wanted[index] = tensor[source]
    out = torch.full((wanted.size,), torch.nan, dtype=torch.float16, device=device.where)
    given = [
        (ctypes.c_uint64 * 4)(*sizes),
        (ctypes.c_uint64 * 3)(*(2 * s for s in strides)),
        (ctypes.c_uint32 * 4)(*box),
    ]
    device.call("tma", memory.to(device.where), *given, (ctypes.c_int * 4)(*at), out)
    assert np.array_equal(out.cpu().numpy().reshape(-1, 64), swizzled(wanted.reshape(-1, 64)))


@pytest.mark.parametrize("tiles", [1, 2, 3, 7])
def test_barriers_order_a_ring_of_copies(device: Device, tiles: int):
    data = random(tiles * 64, 64)
    out = torch.full_like(data, torch.nan, device=device.where)
    device.call("ring", data.to(device.where), tiles, out)
    assert np.array_equal(out.cpu().numpy(), swizzled(data.numpy()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("N", "K"), [(64, 64), (128, 64), (64, 128), (128, 128)])
def test_product_by_rows(device: Device, N: int, K: int, dtype: torch.dtype):
    a, b = random(64, K, dtype=dtype), random(N, K, dtype=dtype, seed=1)
    out = torch.full((2, 64, N), torch.nan, device=device.where)
    device.call("by_rows", int(dtype == torch.bfloat16), N, K, a.to(device.where), b.to(device.where), out)
    wanted = a.double().numpy() @ b.double().numpy().T
    np.testing.assert_allclose(out[0].cpu().numpy(), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out[1].cpu().numpy(), 2 * wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [64, 128])
def test_product_by_columns(device: Device, N: int, dtype: torch.dtype):
    a, b, c = random(64, 64, dtype=dtype), random(64, N, dtype=dtype, seed=1), random(64, N, seed=2).float()
    out = c.to(device.where, copy=True)
    device.call("by_columns", int(dtype == torch.bfloat16), N, a.to(device.where), b.to(device.where), out)
    wanted = c.double().numpy() + a.double().numpy() @ b.double().numpy()
    np.testing.assert_allclose(out.cpu().numpy(), wanted, rtol=1e-4, atol=1e-4)


class Operators:
    """The emulated operators; `on_hopper` says of the last forward and the last backward whether Hopper's kernels ran."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.count, self.on_hopper = library.emulation_wgmma_count, {}
        self.count.restype = ctypes.c_uint64

    def __getattr__(self, name: str) -> Any:
        def run(*arguments: Any) -> Any:
            before = self.count()
            results = getattr(torch.ops.pygpt_emulated, name)(*arguments)
            self.on_hopper[name.removeprefix("causal_attention_")] = self.count() > before
            return results

        return run


@pytest.fixture
def op(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Operators:
    """The emulated operators, whose device has compute capability 9.0."""
    library.emulation_set_seed(ctypes.c_uint64(1))
    monkeypatch.delenv("PYGPT_CUDA_HOPPER", raising=False)
    return Operators(library)


def compare(op: Operators, *arguments: Any, forward: bool = True, backward: bool = True, **more: Any) -> None:
    """Forward and backward with float64, each by the kernels that are meant."""
    compare_attention(op, *arguments, **more)
    assert op.on_hopper == {"forward": forward, "backward": backward}


# B, T, S, H, D: one query more than the fewest; one row in the second block; the rings of keys and of queries more than
# twice around; keys before the queries, so that the diagonal crosses two tiles; heads narrower than a tile, in one part and
# in two; and of the cases that all CUDA kernels share those that these kernels serve.
SHAPES = [
    (1, 65, 65, 1, 64),
    (1, 129, 129, 2, 64),
    (1, 140, 140, 3, 40),  # two blocks of each head, heads in sections of two and of one
    (1, 70, 1100, 1, 64),
    (1, 1100, 1100, 1, 64),
    (1, 540, 540, 1, 128),
    (1, 200, 293, 1, 128),
    (1, 90, 90, 1, 40),
    (1, 70, 131, 1, 72),
    *((B, T, S, H, D) for B, T, S, H, D in ATTENTIONS if T > 64 and D % 8 == 0 and D <= 128),
]


@pytest.mark.parametrize(("dtype", "dropout_p"), [(torch.bfloat16, 0.0), (torch.float16, 0.25)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_attention(op, library, shape, dtype, dropout_p, seed):
    library.emulation_set_seed(ctypes.c_uint64(seed))
    B, T, S, H, D = shape
    q, k, v, grad = (random(B, n, H, D, dtype=dtype, seed=i) for i, n in enumerate([T, S, S, T]))
    compare(op, q, k, v, grad, dropout_p)


@pytest.mark.parametrize("layout", ["packed", "heads first", "cache"])
def test_attention_of_views(op, layout):
    B, T, S, H, D = 2, 70, 90, 2, 64
    q, k, v = (random(B, n, H, D, dtype=torch.bfloat16, seed=i) for i, n in enumerate([T, S, S]))
    if layout == "packed":
        q, k, v = random(B, T, 3 * H * D, dtype=torch.bfloat16).view(B, T, 3, H, D).unbind(2)
    elif layout == "heads first":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    else:
        k, v = (random(B, S + 17, H, D, dtype=torch.bfloat16, seed=i)[:, :S] for i in (1, 2))
    compare(op, q, k, v, random(B, T, H, D, dtype=torch.bfloat16, seed=7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 140, 3, 64), (1, 130, 2, 128), (2, 70, 2, 40)], ids=str)
def test_attention_of_a_packed_projection(op, shape, dtype):
    B, T, H, D = shape
    q, k, v = random(B, T, 3, H, D, dtype=dtype).unbind(2)
    grad = random(*shape, dtype=dtype, seed=7)
    starts = document_starts([[3, T - 3], [T]][:B])
    for dropout_p, documents in ((0.0, None), (0.25, None), (0.0, starts)):
        compare_attention(Packed(op), q, k, v, grad, dropout_p, document_start=documents)
        assert op.on_hopper == {"qkvpacked_forward": True, "qkvpacked_backward": True}


# The last one has a block of keys that no query sees where the queries are the last 90.
@pytest.mark.parametrize("lengths", [(200,), (100, 100), (1, 130, 69), (3,) * 66 + (2,), (200, 100)], ids=str)
def test_attention_of_documents(op, lengths):
    S, dropout_p = sum(lengths), 0.25 if lengths[-1] > 60 else 0.0
    for T in (S, 90):
        q, k, v, grad = (random(1, n, 1, 64, dtype=torch.float16, seed=i) for i, n in enumerate([T, S, S, T]))
        compare(op, q, k, v, grad, dropout_p, document_start=document_starts([lengths], T))


@pytest.mark.parametrize(("name", "T"), [(name, T) for name, T in DOCUMENT_CASES if T > 64])
def test_attention_of_shared_documents(op, name, T):
    rows = DOCUMENTS[name]
    S = sum(rows[0])
    for D, dtype in ((64, torch.bfloat16), (128, torch.float16)):
        q, k, v, grad = (random(len(rows), n, 1, D, dtype=dtype, seed=i) for i, n in enumerate([T, S, S, T]))
        compare(op, q, k, v, grad, document_start=document_starts(rows, T))


def test_attention_of_large_scores(op):
    q, k, v = (40 * random(1, 130, 1, 64, dtype=torch.bfloat16, seed=i) for i in range(3))
    out, lse = op.causal_attention_forward(q, k, v, 1.0, 0.0, None)
    exact, exact_lse = explicit(q.double(), k.double(), v.double(), 1.0)
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-4)
    assert ((out.double() - exact).abs() < 0.02 * exact.abs().max()).double().mean() > 0.99
    grads = op.causal_attention_backward(torch.ones_like(out), q, k, v, out, lse, 1.0, 0.0, None)
    assert op.on_hopper == {"forward": True, "backward": True}
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("D", [64, 128])
def test_attention_same_bits_under_every_order(op, library, D, dropout_p):
    q, k, v, grad = (random(1, 330, 1, D, dtype=torch.bfloat16, seed=i) for i in range(4))
    dropout_seed, results = torch.tensor([3]), []
    for seed in range(4):
        library.emulation_set_seed(ctypes.c_uint64(seed))
        out, lse = op.causal_attention_forward(q, k, v, 0.125, dropout_p, dropout_seed)
        grads = op.causal_attention_backward(grad, q, k, v, out, lse, 0.125, dropout_p, dropout_seed)
        results.append((out, lse, *grads))
    assert op.on_hopper == {"forward": True, "backward": True}
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_attention_elsewhere_is_the_portable_kernel(op, monkeypatch):
    """Few queries, a scale that is not positive, a stride of 0, float32, and all on request."""
    q, k, v, grad = (random(2, 80, 2, 64, dtype=torch.bfloat16, seed=i) for i in range(4))
    neither = {"forward": False, "backward": False}
    compare(op, q[:, :64], k, v, grad[:, :64], **neither)
    compare(op, q, k, v, grad, 0.0, -0.3, **neither)
    compare(op, q, k[:1].expand(k.shape), v, grad, **neither)
    compare(op, q, k, v, grad[:1].expand(grad.shape), backward=False)
    compare(op, *(x.float() for x in (q, k, v, grad)), **neither)
    monkeypatch.setenv("PYGPT_CUDA_HOPPER", "0")
    compare(op, q, k, v, grad, **neither)

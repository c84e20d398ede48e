"""The instructions behind the CUDA kernels, one small kernel for each wrapper of csrc/cuda/ptx.h, against references that
follow the PTX manual's tables of fragments. On the emulated device; the same kernels on a GPU too, where there is one.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import torch
from cuda_emulation import build

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4  # of a thread in its warp, as the manual has them
BF16, F16 = torch.bfloat16, torch.float16


class Device:
    """Calls the exported functions on copies of tensors there; the last tensor comes back with what was written to it."""

    def __init__(self, library: ctypes.CDLL, where: str) -> None:
        self.library, self.where = library, where

    def call(self, name: str, *arguments: int | torch.Tensor) -> torch.Tensor:
        given = [a.to(self.where, copy=True).contiguous() if isinstance(a, torch.Tensor) else a for a in arguments]
        status = getattr(self.library, name)(
            *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in given)
        )
        if self.where == "cuda":
            torch.cuda.synchronize()
        assert status == 0
        return next(a for a in reversed(given) if isinstance(a, torch.Tensor)).cpu()


@pytest.fixture(scope="module", params=["seed 0", "seed 1", "seed 2", "GPU"])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Device:
    if request.param == "GPU":
        return on_gpu(tmp_path_factory)
    if build.missing():
        pytest.skip(build.missing())
    (path,) = build.build("conformance.so")
    library = ctypes.CDLL(str(path))
    library.emulation_set_seed(ctypes.c_uint64(int(request.param[-1])))
    return Device(library, "cpu")


def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the instructions run on the emulated one only")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: nothing to build the kernels for the GPU with")
    out = tmp_path_factory.mktemp("conformance") / "conformance.so"
    flags = ["-std=c++20", "-arch=native", "-shared", "-Xcompiler=-fPIC", f"-I{build.ROOT / 'csrc'}"]
    subprocess.run(["nvcc", *flags, build.HERE / "conformance.cu", "-o", out], check=True)
    return Device(ctypes.CDLL(str(out)), "cuda")


def halves(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two 16-bit elements in a register."""
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


@pytest.mark.parametrize("order", ["in order", "permuted", "one row for all"])
@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix(device: Device, transposed: int, order: str):
    # Register i of a thread: two neighbours of row GROUP of matrix i, whose row r is where thread 8 i + r points.
    rng = np.random.default_rng(0)
    memory = rng.integers(2**16, size=(32, 8), dtype=np.uint16)
    rows = {"in order": LANE, "permuted": rng.permutation(32), "one row for all": np.full(32, 5)}[order]
    matrices = memory[rows].reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    wanted = np.stack([halves(m[GROUP, 2 * MEMBER], m[GROUP, 2 * MEMBER + 1]) for m in matrices], axis=1)
    out = device.call(
        "ldmatrix", transposed, torch.from_numpy(memory.view(np.int16)), torch.from_numpy(rows.astype(np.int32)),
        torch.zeros(32, 4, dtype=torch.int32),
    )  # fmt: skip
    assert np.array_equal(out.numpy().view(np.uint32), wanted)


@pytest.mark.parametrize("values", ["one-hot", "random", "large"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_mma(device: Device, dtype: torch.dtype, values: str):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*shape, generator=generator) for shape in [(16, 16), (16, 8), (16, 8)])
    if values == "one-hot":  # each element of a and b moves to a place of its own, exactly
        a, b = torch.eye(16).roll(3, 1), torch.arange(16 * 8.0).view(16, 8)
    elif values == "large":
        a, b = a * 200, b * 200  # products beyond float16
    a, b = a.to(dtype), b.to(dtype)
    bits_a, bits_b = a.view(torch.int16).numpy().view(np.uint16), b.view(torch.int16).numpy().view(np.uint16)
    # a0: A(g, 2t), a1: A(g + 8, 2t), a2: A(g, 2t + 8), a3: A(g + 8, 2t + 8); b0: B(2t, g), b1: B(2t + 8, g); + 1: high half
    fragment_a = [
        halves(bits_a[GROUP + row, 2 * MEMBER + k], bits_a[GROUP + row, 2 * MEMBER + k + 1])
        for row, k in [(0, 0), (8, 0), (0, 8), (8, 8)]
    ]
    fragment_b = [halves(bits_b[2 * MEMBER + k, GROUP], bits_b[2 * MEMBER + k + 1, GROUP]) for k in (0, 8)]
    places = [(GROUP + row, 2 * MEMBER + column) for row in (0, 8) for column in (0, 1)]
    out = device.call(
        "mma", int(dtype == BF16), *(torch.from_numpy(np.stack(f, 1).view(np.int32)) for f in (fragment_a, fragment_b)),
        torch.from_numpy(np.stack([c.numpy()[place] for place in places], 1)),
    )  # fmt: skip
    result = np.full((16, 8), np.nan)
    for i, place in enumerate(places):
        result[place] = out.numpy()[:, i]
    wanted = a.double().numpy() @ b.double().numpy() + c.double().numpy()
    # The sum of 17 terms in float32, which tensor cores truncate: 2^-23 of the largest for each.
    terms = np.abs(a.double().numpy()) @ np.abs(b.double().numpy()) + np.abs(c.double().numpy())
    assert (np.abs(result - wanted) <= 17 * 2.0**-23 * terms).all(), np.abs(result - wanted).max()


@pytest.mark.parametrize("empty", [[], [1], [0, 3], [2, 3]], ids=str)
def test_copies_are_there_after_the_wait_for_their_group(device: Device, empty: list[int]):
    rng = np.random.default_rng(0)
    data = rng.integers(2**31, size=(4, 64, 4), dtype=np.int32)
    valid = rng.integers(2, size=(4, 64), dtype=np.int32)
    valid[empty] = 2
    wanted = np.where(valid[..., None] == 1, data, np.where(valid[..., None] == 0, 0, 7))
    out = device.call(
        "copy", torch.from_numpy(data), torch.from_numpy(valid), torch.full(data.shape, -1, dtype=torch.int32)
    )
    assert np.array_equal(out.numpy(), wanted)


def extremes() -> torch.Tensor:
    """Random numbers of every size, ties of rounding to 7 and to 10 bits, and the ends of the formats."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2000,), generator=generator).int()
    near_one = torch.arange(0x3F800000, 0x3F880000, 2**11).int()
    special = [
        0.0,
        -0.0,
        torch.inf,
        -torch.inf,
        torch.nan,
        65504,
        65519.99,
        65520,
        -65520,
        3.4e38,
        3.39e38,
        6e-8,
        3e-8,
        2e-8,
    ]
    special += [6.1e-5, 6.0e-5, 1e-40, -1e-45, 1.17e-38]
    return torch.cat([bits.view(torch.float32), near_one.view(torch.float32), torch.tensor(special)])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_pack(device: Device, dtype: torch.dtype):
    low = extremes()
    high = low.flip(0).contiguous()
    out = device.call("pack", int(dtype == BF16), low, high, torch.zeros(len(low), dtype=torch.int32), len(low))
    pairs = out.view(torch.int16).view(-1, 2).view(dtype)
    for name, actual, exact in (("low", pairs[:, 0], low), ("high", pairs[:, 1], high)):
        wanted = exact.to(dtype)
        assert torch.equal(actual.isnan(), exact.isnan()), name
        same = (actual.view(torch.int16) == wanted.view(torch.int16)) | exact.isnan()
        assert same.all(), f"{name}: {exact[~same][:5]} -> {actual[~same][:5]}"


def test_exp2(device: Device):
    x = torch.cat(
        [torch.linspace(-126, 127.99, 5001), torch.linspace(-1, 1, 2001), torch.tensor([1e-38, 1e-40, -1e-45])]
    )
    y = device.call("exp2_of", x, torch.zeros_like(x), len(x)).double()
    exact = torch.exp2(x.double())
    assert ((y - exact).abs() <= 2.5 * 2.0**-23 * exact).all()  # 2 units in the last place, says the manual
    ends = torch.tensor([-torch.inf, -1e30, -150.0, -127.0, 0.0, 1.0, 128.0, 1e30, torch.inf, torch.nan])
    y = device.call("exp2_of", ends, torch.zeros_like(ends), len(ends))
    wanted = torch.tensor([0, 0, 0, 0, 1, 2, torch.inf, torch.inf, torch.inf, torch.nan])  # subnormal results are 0
    assert torch.equal(y.nan_to_num(5), wanted.nan_to_num(5))

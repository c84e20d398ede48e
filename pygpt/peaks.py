"""Peak arithmetic rates of GPUs, for MFU: what share of its device a training run uses."""

from __future__ import annotations

import re

import torch

# TFLOP/s without sparsity from NVIDIA's data sheets: bfloat16 with float32 accumulation, TF32, float32.
# A name must match whole: a laptop's or another variant's chip of the same name is slower.
_PEAKS = {
    r"B200": (2250.0, 1125.0, 75.0),
    r"H200|GH200.*|H100( SXM5)?( 80GB HBM3| 96GB HBM3| 64GB HBM2)?": (989.4, 494.7, 66.9),
    r"H100 PCIe": (756.0, 378.0, 51.2),
    r"H[12]00 NVL": (835.5, 417.5, 60.0),
    r"H20": (148.0, 74.0, 44.0),
    r"A100.*|A800.*": (312.0, 156.0, 19.5),
    r"A30": (165.0, 82.0, 10.3),
    r"A40": (149.7, 74.8, 37.4),
    r"A10": (125.0, 62.5, 31.2),
    r"A10G": (70.0, 35.0, 31.2),
    r"L4": (121.0, 60.0, 30.3),
    r"L40": (181.0, 90.5, 90.5),
    r"L40S": (362.0, 183.0, 91.6),
    r"RTX A6000": (154.8, 77.4, 38.7),
    r"RTX 6000 Ada Generation": (364.2, 182.1, 91.1),
    r"RTX 5090": (209.5, 104.8, 104.8),
    r"RTX 4090": (165.2, 82.6, 82.6),
    r"RTX 4080": (97.5, 48.7, 48.7),
    r"RTX 3090": (71.0, 35.6, 35.6),
    r"RTX 3080": (59.5, 29.8, 29.8),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations per second that `device` reaches at most in matrix products of `dtype`.

    float32 counts as TF32 where torch is set to use it. None where that is not known: a CPU, a GPU that is not in the
    table, a slice of a GPU, another dtype.
    """
    if device.type != "cuda":
        return None
    return lookup(torch.cuda.get_device_name(device), dtype, torch.get_float32_matmul_precision() != "highest")


def lookup(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """As `peak_flops`, for the name that `torch.cuda.get_device_name` gives."""
    short = re.sub(r"^(NVIDIA|GeForce|Tesla|Quadro|\s)+", "", name)
    if "MIG" in short:
        return None
    column = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 1 if tf32 else 2}.get(dtype)
    for pattern, peaks in _PEAKS.items():
        if column is not None and re.fullmatch(pattern, short):
            return peaks[column] * 1e12
    return None

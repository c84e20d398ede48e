"""The CUDA column's state is told truthfully, also where it cannot run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pygpt
from pygpt.ops import backends, choices

CUDA = {column.name: column for column in backends.columns()}["cuda"]


def test_reasons_in_the_order_they_are_found():
    assert "not built" in backends._load_cuda(None, "13.0")
    assert "without CUDA" in backends._load_cuda("/nowhere/_cuda.so", None)


@pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built, so loading stops before the library")
def test_a_library_that_does_not_load_says_why_and_warns(tmp_path: Path):
    broken = tmp_path / "_cuda.so"
    broken.write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="running without it"):
        assert "failed to load" in backends._load_cuda(str(broken), "13.0")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_a_cpu_build_of_torch_says_so():
    built = backends._cuda_spec is not None
    assert ("without CUDA" if built else "not built") in CUDA.problem
    with pytest.raises(ValueError, match=r"backend 'cuda' is not available: (built|not built)"):
        pygpt.use_backend("cuda")
    assert all(row.why_not.get("cuda") for row in backends.report())


def test_the_variable_is_an_error_where_cuda_cannot_run():
    if not CUDA.problem:
        pytest.skip("the CUDA kernels run here")
    environment = {**os.environ, "PYGPT_BACKEND": "cuda"}
    code = "import pygpt; pygpt.backends()"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "backend 'cuda' is not available" in run.stderr


def test_every_op_with_cuda_kernels_registers_the_column():
    sources = Path(__file__).resolve().parents[1].glob("csrc/cuda/*.cpp")
    compiled = {name for source in sources for name in re.findall(r'm\.impl\("(\w+)_forward"', source.read_text())}
    for name in ("bias_gelu", "causal_attention_qkvpacked"):  # other operators of gelu and of causal_attention
        compiled.remove(name)
    assert compiled == {op for op, kernels in backends._kernels.items() if "cuda" in kernels}
    for op in compiled:
        assert backends._kernels[op]["cuda"] == {torch.float32, torch.bfloat16, torch.float16}


def test_auto_prefers_a_gpu_kernel_only_where_it_was_measured(monkeypatch: pytest.MonkeyPatch):
    line = choices.Choice("layer_norm", (9, 0), 16, "cuda", "a bench result")
    monkeypatch.setattr(choices, "MEASURED", (line,))
    assert choices.preferred("layer_norm", (9, 0), 16) == ("cuda", "eager")
    assert choices.preferred("layer_norm", (8, 0), 16) == ("eager",)
    assert choices.preferred("layer_norm", (9, 0), 32) == ("eager",)
    assert choices.preferred("embedding", (9, 0), 16) == ("eager",)


def test_triton_answers_where_it_was_measured_or_is_forced(monkeypatch: pytest.MonkeyPatch):
    lines = tuple(
        choices.Choice(op, (9, 0), 32, backend, "a test") for op, backend in (("gelu", "triton"), ("embedding", "cuda"))
    )
    monkeypatch.setattr(choices, "MEASURED", lines)
    for capability, answered in (((9, 0), {"gelu"}), ((8, 0), set())):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert {op for op, takes in backends._triton_takes().items() if takes} == answered
    for forced, answered in (("triton", set(backends.TRITON_OPS)), ("cuda", set())):
        monkeypatch.setattr(backends, "_forced", forced)
        assert {op for op, takes in backends._triton_takes().items() if takes} == answered


def test_every_choice_has_one_line_and_its_widths_the_same_kernels():
    lines = [(line.op, line.capability, line.bits) for line in choices.MEASURED]
    assert len(lines) == len(set(lines))
    kernels = {(line.op, line.capability, line.backend) for line in choices.MEASURED}
    assert len(kernels) == len({(op, capability) for op, capability, _ in kernels})


@pytest.mark.skipif(backends._cuda_spec is None, reason="pygpt/_cuda.so is not built (no nvcc at install)")
@pytest.mark.skipif(backends.extension is None, reason="pygpt._C, which has the schemas, is not built")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch loads the library itself")
def test_the_library_needs_nothing_but_the_stream_from_libtorch_cuda(tmp_path: Path):
    # Everything else must resolve against a CPU build of torch: then it also does against every CUDA build.
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build a stand-in for libtorch_cuda.so")
    stub = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "link_stub.cpp"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "libtorch_cuda.so", stub], check=True)
    code = f"""
import torch
from pygpt.ops import backends, choices
assert backends._load_cuda({backends._cuda_spec.origin!r}, "13.0") == ""
print(torch._C._dispatch_dump("pygpt::layer_norm_forward"))
"""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "LD_BIND_NOW": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "CUDA: registered" in run.stdout

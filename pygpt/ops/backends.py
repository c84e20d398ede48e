"""Which kernel answers a call: the only place that decides, and the only place that knows why.

A *backend* is a column of the grid: `eager` (the reference in plain PyTorch, always there), `cpp` (compiled CPU kernels,
`pygpt._C`), `cuda` (compiled CUDA kernels, `pygpt._cuda`), `triton` (`pygpt.kernels`). By default each op takes the
first backend of its device's order that has a kernel for the dtype, else `eager`; on a GPU the order is what measured
fastest there (choices.py). Under forward-mode differentiation and torch.func's transforms, for which the kernels
have no formula, ops run the reference. `use_backend` or the variable
PYGPT_BACKEND force one: then a dtype or device it cannot serve is an error, never a silent fallback, and only ops that
have no kernel in that column at all still run the reference.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import warnings
from dataclasses import dataclass, replace
from types import ModuleType, TracebackType

import torch
from torch.autograd import forward_ad as _forward_ad

from pygpt.errors import InputError
from pygpt.ops import choices

BACKENDS = ("eager", "cpp", "cuda", "triton")
CPU_ORDER = ("cpp", "eager")
MINIMUM_CUDA_CAPABILITY = (8, 0)
# Elements below which calls of torch's own ops cost less than our kernels save (measured: bench/LOG.md).
SMALL = 65536
SMALL_IN_FLOAT32 = 1 << 18  # of LayerNorm and of an embedding's gradient, at which torch is better in float32
# The same on a GPU, where the host's time decides: ours saves 6 us of kernels a million elements of LayerNorm, and calls cost
# tens of us more (bench/LOG.md, on an H200; where they meet was not measured).
SMALL_ON_GPU = 1 << 22
# The Triton kernels take any of these dtypes, so that their column is one line here instead of one in every op.
TRITON_OPS = frozenset(
    {"embedding", "layer_norm", "add_layer_norm", "causal_attention", "gelu", "linear_cross_entropy", "adamw"}
)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Column:
    """What became of loading a backend: `problem` is empty when it is ready."""

    name: str
    device: str
    problem: str


@dataclass(frozen=True)
class Row:
    """One line of `report`: the backend in use for an op on a device, and why the preferred others are not."""

    op: str
    device: str
    backend: str
    dtypes: str
    why_not: dict[str, str]


def _load(module: str, missing: str) -> tuple[ModuleType | None, str]:
    """Import a compiled module; the second value says why it is not there. A module that exists but breaks also warns."""
    try:
        return importlib.import_module(module), ""
    except ModuleNotFoundError as error:
        if error.name == module:
            return None, missing
        problem = f"failed to load: {error}"
    except ImportError as error:
        problem = f"failed to load: {error}"
    warnings.warn(f"{module} {problem}; running without it", stacklevel=2)
    return None, problem


def _load_cuda(path: str | None, torch_cuda: str | None) -> str:
    """Load the CUDA kernels' library; returns why not, or "". Loading touches no device."""
    if path is None:
        return "not built (no nvcc at install, or PYGPT_CUDA=off)"
    if torch_cuda is None:
        return f"built, but torch {torch.__version__} is a build without CUDA"
    if extension is None:
        return "built, but it needs pygpt._C, which is not there"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        problem = f"failed to load: {error}"
        warnings.warn(f"{path} {problem}; running without it", stacklevel=2)
        return problem
    return ""


def _cuda_device_problem() -> str:
    """Why CUDA kernels cannot run on this machine. Asked late: it is the first thing that touches a device."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < MINIMUM_CUDA_CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return ""


extension, _cpp_problem = _load("pygpt._C", "not built (no C++ compiler at install, or PYGPT_BUILD_EXT=off)")
_cuda_spec = importlib.util.find_spec("pygpt._cuda")
_cuda_problem = _load_cuda(_cuda_spec.origin if _cuda_spec else None, torch.version.cuda)

_columns: dict[str, Column] = {
    "cpp": Column("cpp", "cpu", _cpp_problem),
    "cuda": Column("cuda", "cuda", _cuda_problem),
}
_kernels: dict[str, dict[str, frozenset[torch.dtype]]] = {}  # op -> backend -> dtypes
_forced: str | None = None
_environment = os.environ.get("PYGPT_BACKEND")  # looked at when it first matters: `import pygpt` never fails for it
_is_compiling = torch.compiler.is_compiling
_in_torch_func = torch._C._are_functorch_transforms_active  # as torch.autograd.Function asks it
_chosen: dict[tuple[str, torch.device, torch.dtype, str | None], str] = {}


def _load_triton() -> str:
    """Make `pygpt.kernels` answer on CUDA tensors; returns what is in the way, nothing when it is ready."""
    if device_problem := _cuda_device_problem():
        return device_problem
    if extension is None:
        return "needs pygpt._C, which holds the operators' schemas and was " + _cpp_problem
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("pygpt.kernels").serve(_triton_takes())
    except ImportError as error:
        warnings.warn(f"pygpt.kernels failed to load: {error}; running without it", stacklevel=2)
        return f"failed to load: {error}"
    return ""


def _column(name: str) -> Column:
    # Triton takes a while to import: only where someone has a use for it.
    if name == "triton" and name not in _columns:
        _columns[name] = Column(name, "cuda", _load_triton())
    return _columns[name]


def _triton_takes() -> dict[str, bool]:
    """For which ops Triton answers the operators that compiled CUDA kernels answer too."""
    if _forced is not None:
        return dict.fromkeys(TRITON_OPS, _forced == "triton")
    capability = torch.cuda.get_device_capability()
    return {op: any("triton" in choices.preferred(op, capability, bits) for bits in (16, 32)) for op in TRITON_OPS}


def _force(name: str | None) -> None:
    """Set the forced backend, and with it who answers the operators on a GPU."""
    global _forced
    change, _forced = name != _forced, name
    if change and "triton" in _columns and ready("triton"):
        importlib.import_module("pygpt.kernels").serve(_triton_takes())


def register(op: str, **dtypes: tuple[torch.dtype, ...]) -> None:
    """Declare an op and the dtypes each of its kernels serves: `register("layer_norm", cpp=(torch.float32,))`."""
    if op in TRITON_OPS:
        dtypes["triton"] = TRITON_DTYPES
    _kernels[op] = {backend: frozenset(served) for backend, served in dtypes.items()}
    _chosen.clear()


def ready(backend: str) -> bool:
    """Whether a backend can run on this machine at all."""
    return backend == "eager" or not problem(backend)


# A compiler must not trace into the loading of a backend. torch.compiler.assume_constant_result sets just this attribute,
# but imports the whole compiler for it, which takes longer than the rest of `import pygpt`, torch included.
ready._dynamo_marked_constant = True  # type: ignore[attr-defined]


def problem(backend: str) -> str:
    """Why a backend cannot run on this machine; empty where it can. Raises InputError for a bad PYGPT_CPU_CAPABILITY."""
    if backend == "cuda" and not _columns[backend].problem:
        return _cuda_device_problem()
    if backend == "cpp" and extension is not None:
        cpu_capability()
    return _column(backend).problem


def cpu_capability() -> str:
    """Instruction set of the compiled CPU kernels. Raises InputError if PYGPT_CPU_CAPABILITY names none of this machine."""
    assert extension is not None
    try:
        return str(extension.cpu_capability())
    except ValueError as error:
        raise InputError(str(error)) from None


def choose(op: str, x: torch.Tensor) -> str:
    """Name of the backend that answers `op` for tensors like `x`. Raises InputError where a forced one cannot."""
    if needs_reference():
        if forced() in _kernels[op]:
            raise InputError(
                f"{op}: backend '{_forced}' was asked for and has no formula for forward-mode differentiation or torch.func; "
                f"drop use_backend / PYGPT_BACKEND there"
            )
        return "eager"
    if _is_compiling():  # a graph would be guarded on the cache, and compiled again as soon as anyone adds to it
        return _resolve(op, x.device.type, x.dtype, forced())
    backend = _chosen.get((op, x.device, x.dtype, _forced))
    if backend is None:
        _apply_environment()
        backend = _resolve(op, x.device.type, x.dtype, _forced)
        _chosen[op, x.device, x.dtype, _forced] = backend
    return backend


def needs_reference() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func is at work, which kernels have no formula for."""
    return _forward_ad._current_level >= 0 or _in_torch_func()


def is_autocast(x: torch.Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    # To ask a device for its type takes longer than the rest.
    return not x.is_meta and torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)


def automatic_on_cpu(x: torch.Tensor, fewer_than: float = math.inf) -> bool:
    """Whether an op may hand the CPU tensor x, of 1 or more elements, to torch's own op where that measured faster: not
    where a backend is forced, nor while compiling. An op that does so says when in its docstring."""
    if _is_compiling() or _forced is not None or _environment is not None:
        return False  # asking a compiler for the number of elements would tie the result to it
    return x.is_cpu and 0 < x.numel() < fewer_than


def is_small_on_gpu(x: torch.Tensor) -> bool:
    """Whether an op may hand x to torch's own op because a call of ours would cost the host more time than the GPU saves."""
    return x.is_cuda and not _is_compiling() and _forced is None and _environment is None and x.numel() < SMALL_ON_GPU


def _resolve(op: str, device: str, dtype: torch.dtype, forced: str | None) -> str:
    kernels = _kernels[op]
    if forced is None:
        for backend in _order(op, device, dtype):
            if dtype in kernels.get(backend, ()) and ready(backend):
                return backend
        return "eager"
    if forced == "eager" or forced not in kernels:
        return "eager"
    column = _column(forced)
    if column.device != device and device != "meta":
        raise InputError(
            f"{op}: backend '{forced}' was asked for and runs on {column.device}, but the tensors are on {device}; "
            f"move them, or drop use_backend / PYGPT_BACKEND"
        )
    if dtype not in kernels[forced]:
        raise InputError(
            f"{op}: backend '{forced}' was asked for and has no {_name(dtype)} kernel (it has {_names(kernels[forced])}); "
            f"use one of these dtypes, or drop use_backend / PYGPT_BACKEND"
        )
    return forced


def _order(op: str, device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends that `auto` tries for an op on a device, best first."""
    if device == "cuda":
        return choices.preferred(op, torch.cuda.get_device_capability(), dtype.itemsize * 8)
    return CPU_ORDER if device == "cpu" else ("eager",)


class _Restore:
    """What `use_backend` returns: the choice is already made; leaving a `with` block undoes it."""

    def __init__(self, previous: str | None) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _force(self._previous)


def use_backend(name: str | None) -> _Restore:
    """Force a backend for every op: "eager", "cpp", "cuda" or "triton"; None or "auto" goes back to the default choice.

    Works as a function, `pygpt.use_backend("eager")`, and as a context manager. Raises InputError for an unknown name
    and for a backend that is not available here, saying why.
    """
    _apply_environment()
    if name == "auto":
        name = None
    if name is not None and name not in BACKENDS:
        raise InputError(f"unknown backend '{name}': choose one of auto, {', '.join(BACKENDS)}")
    if name is not None and not ready(name):
        raise InputError(f"backend '{name}' is not available: {problem(name)}")
    previous = _forced
    _force(name)
    return _Restore(previous)


def _apply_environment() -> None:
    global _environment
    if _environment is None:  # not set again: older compilers refuse to trace that
        return
    name, _environment = _environment, None
    if name:
        use_backend(name)


def forced() -> str | None:
    """The backend that use_backend or PYGPT_BACKEND forces, if any."""
    _apply_environment()
    return _forced


def devices() -> list[str]:
    """Device types of this machine that an op can run on."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def backends() -> dict[str, dict[str, str]]:
    """The backend in use: {op: {device: backend}}, for float32, on GPUs for bfloat16 (see `report` for the reasons)."""
    _apply_environment()
    return {op: {device: _in_use(op, device) for device in devices()} for op in _kernels}


def report() -> list[Row]:
    """One Row per op and device that torch knows of here, with the reason why each other backend is not in use."""
    _apply_environment()
    rows = []
    for op, kernels in _kernels.items():
        for device in devices():
            used = _in_use(op, device)
            served = _names(kernels[used]) if used in kernels else "any"
            others = [b for b in ("cpp", "cuda", "triton") if b != used]
            rows.append(Row(op, device, used, served, {other: _why_not(op, device, other) for other in others}))
    return rows


def _usual(device: str) -> torch.dtype:
    """The dtype that what is said of a device is true of."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def _in_use(op: str, device: str) -> str:
    try:
        return _resolve(op, device, _usual(device), _forced)
    except InputError:
        if _forced is None:  # a bad PYGPT_CPU_CAPABILITY
            raise
        return f"error ({_forced} forced)"


def _why_not(op: str, device: str, backend: str) -> str:
    column = _column(backend)
    if backend not in _kernels[op]:
        return "no kernel for this op"
    if problem(backend):
        return problem(backend)
    if column.device != device:
        return f"runs on {column.device}"
    if _forced:
        return f"'{_forced}' was asked for"
    if backend not in _order(op, device, _usual(device)):
        return "not measured faster on this GPU"
    return "another backend is preferred"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: frozenset[torch.dtype]) -> str:
    return ", ".join(sorted(_name(dtype) for dtype in dtypes))


def columns() -> list[Column]:
    """The compiled and just-in-time backends and what became of loading each."""
    return [replace(_column(name), problem=problem(name)) for name in BACKENDS if name != "eager"]


def tune_allocator() -> bool:
    """Let the C library keep freed memory instead of returning it to the kernel, in this process from now on.

    A training step frees and allocates the same large tensors again and again; by default glibc maps fresh pages each
    time, and on CPUs up to a third of the step goes into page faults. `pygpt pretrain` does this by itself; importing pygpt
    changes nothing. Peak memory stays about the same, but it is not given back. Returns whether it had an effect: False
    without compiled kernels or glibc.
    """
    return extension is not None and extension.tune_allocator()


def build_info() -> dict[str, str]:
    """What was built and what this machine offers it: the head of `pygpt info`."""
    info = {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
    if extension is None:
        return info | {"compiled kernels": f"none: {_cpp_problem}"}
    return info | {
        "compiled kernels": f"pygpt._C {extension.version}, built with torch {extension.built_with_torch}",
        "CPU capability": f"{cpu_capability()} (of {', '.join(extension.available_cpu_capabilities())})",
    }

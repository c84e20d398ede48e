"""A process that times calls for another: `python -m pygpt.bench.worker`, one JSON object a line in and out.

Processes of their own keep apart what a process has but once: the allocator's settings and the peak of its memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch

from pygpt.bench import model
from pygpt.bench.ops import OPS
from pygpt.bench.timing import DTYPES, disagreement, seconds
from pygpt.ops import backends


@dataclass(frozen=True)
class Case:
    """What is timed: an op at one of its shapes, or a job of the model (op "training" or "decode"; shape: preset, batch and
    tokens)."""

    op: str
    shape: tuple[Any, ...]
    dtype: str
    passes: str
    device: str = "cpu"


@dataclass(frozen=True)
class Prepared:
    """work: what one call does, in units of `unit`'s numerator; problems: by side, what keeps it from being timed."""

    work: float
    unit: str
    problems: dict[str, str]


@contextlib.contextmanager
def _bound_by_nobody() -> Iterator[None]:
    """Meanwhile a process that is started may use every processor. Where the environment binds OpenMP's threads
    (GOMP_CPU_AFFINITY, OMP_PROC_BIND), this thread is bound to one; a process that inherits that takes its machine for so small
    that its threads sleep instead of waiting for work, which costs a generation a third of its speed."""
    binds = any(name in os.environ for name in ("GOMP_CPU_AFFINITY", "OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY"))
    if not binds or not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


class WorkerError(Exception):
    """How a process ended before its time, in a line."""


class Worker:
    """The parent's end. tuned: with `pygpt.tune_allocator` in the process. Raises WorkerError from every request."""

    def __init__(self, tuned: bool, threads: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        command = [sys.executable, "-m", "pygpt.bench.worker", "tuned" if tuned else "plain", str(threads)]
        with _bound_by_nobody():
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
            )

    def prepare(self, case: Case, sides: list[str]) -> Prepared:
        """Build the sides of a case, and run each once; ours and eager's results must agree. An earlier case is dropped."""
        return Prepared(**self._ask(do="prepare", case=asdict(case), sides=sides))

    def time(self, side: str, calls: int = 1) -> float:
        """Seconds of one call of the prepared case; of several, after one that is not timed."""
        return float(self._ask(do="time", side=side, calls=calls)["seconds"])

    def peak(self) -> float | None:
        """Peak memory of the process (of its GPU, where it used one), in MiB; None where the system does not tell."""
        mib = self._ask(do="peak")["mib"]
        return None if mib is None else float(mib)

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise WorkerError(self._end())
        reply: dict[str, Any] = json.loads(answer)
        return reply

    def _end(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return f"the process ended with status {status}{' (out of memory?)' if status == -9 else ''}: {' '.join(last)}"

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # its end
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it is in the middle of a call
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- the process itself ----------------------------------------------------------------------------------------------


class _Calls:
    """The case at hand."""

    def __init__(self) -> None:
        self.calls: dict[str, Callable[[], Any]] = {}

    def prepare(self, case: dict[str, Any], sides: list[str]) -> dict[str, Any]:
        self.calls.clear()  # before the next case needs the memory
        build, work, unit = _builder(Case(**case | {"shape": tuple(case["shape"])}))
        results: dict[str, Any] = {}
        problems: dict[str, str] = {}
        for side in sides:
            try:
                self.calls[side] = build(side)
                results[side] = self.calls[side]()
            except model.NotInstalledError:
                problems[side] = "not installed"
            except Exception as error:  # a peer that cannot run is a result, and must not end the others
                problems[side] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        if case["op"] in OPS and {"pygpt", "eager"} <= results.keys():
            difference = disagreement(results["pygpt"], results["eager"], DTYPES[case["dtype"]])
            problems |= {"pygpt": difference} if difference else {}
        return {"work": work, "unit": unit, "problems": problems}

    def time(self, side: str, calls: int) -> dict[str, Any]:
        call = self.calls[side]
        if calls > 1:
            call()  # the other process has had the caches, and this one's threads sleep
        return {"seconds": seconds(call, calls) / calls}

    def peak(self) -> dict[str, Any]:
        return {"mib": _peak_mib()}


def _builder(case: Case) -> tuple[Callable[[str], Callable[[], Any]], float, str]:
    """(side -> what to call, what one call does, its unit)."""
    dtype = DTYPES[case.dtype]
    if case.op not in OPS:
        preset, batch, tokens = case.shape
        build = lambda side: model.build(case.op, side, preset, batch, tokens, dtype, case.device)  # noqa: E731
        return build, batch * tokens, "tokens/s"
    torch.manual_seed(0)
    pair = OPS[case.op].make(case.shape, dtype, case.device)
    build = lambda side: pair.call(side == "pygpt", case.passes, side == "torch.compile")  # noqa: E731
    return build, pair.work[case.passes] / 1e9, pair.unit


def _peak_mib() -> float | None:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def serve(allocator: str, threads: int) -> None:
    """Answer requests until the other end closes. Whatever a library prints goes to the error stream."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    if allocator == "tuned":
        backends.tune_allocator()
    calls = _Calls()
    for line in sys.stdin:
        request = json.loads(line)
        reply = getattr(calls, request.pop("do"))(**request)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))

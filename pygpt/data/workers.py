"""An ordered map over worker processes, with bounded memory. One worker is this process itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from pygpt.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")
OrderedMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

WORKER_BYTES = 32 << 20  # text that takes longer to encode than a process takes to start


def worker_count(asked: int, size: int) -> int:
    """`asked`; where that is 0, one per processor this process may use, but none for less than WORKER_BYTES of text."""
    if asked:
        return asked
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(processors, size // WORKER_BYTES))


@contextmanager
def workers(count: int) -> Iterator[OrderedMap]:
    """A `map` over `count` worker processes; for one worker the built-in `map`, in this process."""
    if count == 1:
        yield map
        return
    # Ctrl-C is this process's to answer. Spawned, not forked: a fork of a process with threads may hang.
    pool = ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        yield partial(_map_in_pool, pool, 4 * count)
    except BrokenProcessPool:
        raise InputError(
            "A worker process ended: there may be too little memory, or the script that called prepare does so "
            'outside of `if __name__ == "__main__":`. Use workers=1 to work without processes.'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _map_in_pool(
    pool: Executor, ahead: int, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """`map` that keeps the order and is at most `ahead` items ahead of its reader, which bounds memory."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()

"""Documents in Parquet files: one in each row of a column `text`, as FineWeb and much text on the Hub is published."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pygpt.errors import InputError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

COLUMN = "text"


def count_row_groups(path: str) -> tuple[int, str]:
    """Number of row groups, the parts of a file that can be read by themselves; and why, where there are none."""
    try:
        file = _open(path)
    except OSError:
        return 0, "unreadable, or no Parquet file"
    kinds = {field.name: str(field.type) for field in file.schema_arrow}
    if kinds.get(COLUMN) not in ("string", "large_string"):
        return 0, f"no column of text named {COLUMN!r}"
    return (file.num_row_groups, "") if file.metadata.num_rows else (0, "empty")


@functools.lru_cache(maxsize=1)  # documents are read one after the other
def read_row_group(path: str, index: int) -> tuple[memoryview, npt.NDArray[np.int64]]:
    """All texts of a row group as UTF-8, one after the other, and where each begins, then where the last one ends.

    Raises OSError for what cannot be read.
    """
    import pyarrow

    try:
        column = _open(path).read_row_group(index, columns=[COLUMN]).column(COLUMN)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error
    texts = column.cast(pyarrow.large_string()).combine_chunks()
    _, starts, text = texts.buffers()
    return memoryview(text or b""), np.frombuffer(starts, np.int64, len(texts) + 1, 8 * texts.offset)


def _open(path: str) -> ParquetFile:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"Reading {path} needs the package pyarrow: pip install 'pygpt-kernels[data]'") from error
    try:
        return ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error

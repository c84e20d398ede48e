"""Token files: one split of a corpus as raw little-endian integers, read through a memory map.

The format is nanoGPT's: `train.bin` and `val.bin`, uint16 (uint32 where the vocabulary needs it), nothing else in
the file. `meta.json` beside them says what they must hold.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pygpt.errors import InputError, MissingFileError

META_FILE = "meta.json"
META_VERSION = 1
NANOGPT_META_FILE = "meta.pkl"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one split. `numpy.asarray(file)` and the samplers take it as the 1-D array it holds.

    Attributes:
        path: the file.
        tokens: (N,) uint16 or uint32, read-only, memory-mapped.
        vocab_size: tokens are below it; None where no meta.json says so.
    """

    path: Path
    tokens: npt.NDArray[np.unsignedinteger]
    vocab_size: int | None

    def __len__(self) -> int:
        return len(self.tokens)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.tokens, dtype=dtype, copy=copy)


def load_tokens(folder: str | Path, split: str = "train") -> TokenFile:
    """Opens `{split}.bin` in a folder that `pygpt prepare` wrote, or nanoGPT (no meta.json: uint16 is assumed).

    Raises MissingFileError where there is no such file, InputError where it is not as long as it was when written, or
    where nanoGPT's meta.pkl says that the tokens have a vocabulary of their own.
    """
    folder = Path(folder)
    path = folder / f"{split}.bin"
    if not path.is_file():
        present = ", ".join(sorted(file.name for file in folder.glob("*.bin"))) or "no token files"
        where = f"{folder} holds {present}" if folder.is_dir() else f"there is no folder {folder}"
        raise MissingFileError(f"No {split}.bin: {where}. Make one with: pygpt prepare --out {folder}")
    meta = _read_meta(folder / META_FILE)
    if meta is None and (folder / NANOGPT_META_FILE).is_file():  # a pickle, which may run anything: it is not read
        raise InputError(
            f"{folder} holds nanoGPT's {NANOGPT_META_FILE}: its tokens have a vocabulary of their own, as characters do, "
            f"which pygpt does not read. Prepare the text: pygpt prepare --inputs TEXT --tokenizer char --out DIR"
        )
    dtype = DTYPES[meta["dtype"]] if meta else DTYPES["uint16"]
    size = path.stat().st_size
    if meta:
        if split not in meta["splits"]:
            raise InputError(f"{folder / META_FILE} does not describe a split {split!r}: prepare the data again")
        expected = meta["splits"][split]["tokens"] * dtype.itemsize
        if size != expected:
            raise InputError(f"{path} has {size} bytes and should have {expected}: damaged, prepare the data again")
    if size == 0 or size % dtype.itemsize:
        raise InputError(f"{path} has {size} bytes, which is not a whole number of {dtype.name} tokens: damaged")
    return TokenFile(path, np.memmap(path, dtype=dtype, mode="r"), meta["vocab_size"] if meta else None)


def _read_meta(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        known = meta["version"] == META_VERSION and meta["dtype"] in DTYPES
        complete = isinstance(meta["vocab_size"], int)
        complete = complete and all(isinstance(entry["tokens"], int) for entry in meta["splits"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        known = complete = False
    if not (known and complete):
        raise InputError(f"{path} is damaged or was not written by this version of pygpt prepare: prepare again")
    return meta

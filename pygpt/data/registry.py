"""Data sets by name: where each is, under which licence, and which bytes it must have.

pygpt data                       what there is
pygpt data get sms-spam          download it now; other commands do so when they are given its name
pygpt prepare --inputs tiny-shakespeare --out data/shakespeare

A file is downloaded once, into PYGPT_DATA or else the user's cache folder. It appears under its final name only after
its SHA-256 was checked, and is checked again at every use, so that a file placed there by hand serves as well. What an
interrupted download left (`.part`) is continued where it ended, with an HTTP range request.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from pygpt.errors import InputError, MissingFileError, PygptError

if TYPE_CHECKING:
    import requests

BLOCK = 1 << 13  # bytes; what has arrived of a block is lost when the connection breaks
TIMEOUT = 30.0  # seconds without a byte from the server


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One file that can be downloaded."""

    file: str
    """Its name in the cache; the ending says how to read it."""
    url: str
    """Its address, or that of a zip archive that holds it."""
    member: str | None = None
    """Its name in the zip archive."""
    size: int
    """Bytes of the file (not of the archive)."""
    sha256: str
    """Of the file (not of the archive)."""
    licence: str
    what: str


DATASETS = {
    "tiny-shakespeare": Dataset(
        file="tiny-shakespeare.txt",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        size=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        licence="text in the public domain",
        what="Shakespeare's plays, as A. Karpathy put them together",
    ),
    "sms-spam": Dataset(
        file="sms-spam.tsv",
        url="https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
        member="SMSSpamCollection",
        size=477_907,
        sha256="7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
        licence="CC BY 4.0",
        what="UCI SMS Spam Collection: 5,574 messages, ham or spam (Almeida and Gómez Hidalgo)",
    ),
    "instructions": Dataset(
        file="instructions.json",
        url="https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/"
        "instruction-data.json",
        size=203_524,
        sha256="7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
        licence="Apache-2.0",
        what="1,100 entries of instruction, input and output (S. Raschka)",
    ),
    # Size and hash as several projects that downloaded this revision publish them; they equal the Hub's own.
    "fineweb-edu-sample": Dataset(
        file="fineweb-edu-sample.parquet",
        url="https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu/resolve/"
        "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9/sample/10BT/000_00000.parquet",
        size=2_152_819_114,
        sha256="b1ba7b2ce4cb5ea6ef42dca40263eabb85f37700d01693a68e9b30a31d78e871",
        licence="ODC-By 1.0",
        what="FineWeb-Edu, educational web pages: the first of 14 files of its sample of 10 billion tokens",
    ),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """List the data sets that other commands take by name in place of a file, or download some now."""

    action: Annotated[Literal["list", "get"], tyro.conf.Positional] = "list"
    """list: show them all. get: download those named."""
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """With get: names of data sets."""

    def __post_init__(self) -> None:
        if (self.action == "get") != bool(self.names):
            raise InputError(f"use `pygpt data list`, or `pygpt data get` and one or more of {', '.join(DATASETS)}")


def data(config: DataConfig, console: Console) -> None:
    """Carry out `pygpt data`."""
    for name in config.names:
        console.print(str(get_dataset(name)), markup=False, highlight=False, soft_wrap=True)
    if config.action == "list":
        folder = data_folder()
        table = Table("name", "what", "size", "licence", title=f"data sets; kept in {folder}")
        for name, dataset in DATASETS.items():
            here = "\n(downloaded)" if (folder / dataset.file).is_file() else ""
            table.add_row(name + here, dataset.what, f"{dataset.size / 1e6:,.1f} MB", dataset.licence)
        console.print(table)
        for name, dataset in DATASETS.items():
            console.print(f"{name}: {dataset.url}", markup=False, highlight=False, soft_wrap=True)


def data_folder() -> Path:
    """Where data sets are kept: PYGPT_DATA, or `pygpt` in the platform's folder for caches."""
    if os.environ.get("PYGPT_DATA"):
        return Path(os.environ["PYGPT_DATA"])
    try:
        import platformdirs
    except ImportError as error:
        raise _needs_extra(error) from error
    return platformdirs.user_cache_path("pygpt", appauthor=False) / "data"


def dataset_path(name_or_path: str | Path) -> Path:
    """The file or folder that a user means: one that exists, else the data set of that name, downloaded if need be.

    Raises MissingFileError where there is neither, and what `get_dataset` raises.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    if str(name_or_path) in DATASETS:
        return get_dataset(str(name_or_path))
    raise MissingFileError(f"No such file or folder: {path}; nor is it one of the data sets {', '.join(DATASETS)}")


def get_dataset(name: str, console: Console | None = None) -> Path:
    """The checked file of a data set, from the cache or downloaded into it; progress goes to `console` (stderr).

    Raises MissingFileError where it cannot be downloaded, with the address and the path at which to place it by hand;
    InputError where the file there, or what the server sent, has another SHA-256.
    """
    if name not in DATASETS:
        raise InputError(f"Unknown data set '{name}': choose one of {', '.join(DATASETS)}")
    dataset, path = DATASETS[name], data_folder() / DATASETS[name].file
    try:
        if path.exists():
            if problem := _problem(path, dataset):
                raise InputError(f"{path} is not the data set '{name}': {problem}. Delete it to have it downloaded")
            return path
        from filelock import FileLock

        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):  # another process may be downloading the same
            if not path.exists():
                _download(name, dataset, path, console or Console(stderr=True))
    except ImportError as error:
        raise _needs_extra(error) from error
    except PygptError:
        raise
    except OSError as error:
        raise InputError(f"Cannot use {path}: {error.strerror or error}") from error
    return path


def _needs_extra(error: ImportError) -> InputError:
    return InputError(f"Data sets by name need the package {error.name}: pip install 'pygpt-kernels[data]'")


def _problem(path: Path, dataset: Dataset) -> str:
    """How a file differs from what it must be; empty if it does not."""
    size = path.stat().st_size
    if size != dataset.size:
        return f"it has {size:,} bytes and should have {dataset.size:,}"
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return "" if sha256.hexdigest() == dataset.sha256 else f"its SHA-256 is {sha256.hexdigest()}, not {dataset.sha256}"


def _download(name: str, dataset: Dataset, path: Path, console: Console) -> None:
    """Fetch, unpack and check into temporary files, then give the file its name."""
    part = path.with_name(f"{path.name}.zip.part" if dataset.member else f"{path.name}.part")
    _fetch(name, dataset, path, part, console)
    whole, problem = part, ""
    if dataset.member:
        whole = path.with_name(f"{path.name}.unpacked")
        try:
            with zipfile.ZipFile(part) as archive, archive.open(dataset.member) as source, whole.open("wb") as target:
                shutil.copyfileobj(source, target)
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
            problem = f"not a whole zip archive with {dataset.member} in it ({error})"
    if problem := problem or _problem(whole, dataset):
        part.unlink()
        whole.unlink(missing_ok=True)
        raise InputError(
            f"What {dataset.url} sent is not the data set '{name}': {problem}. It was deleted; try again, "
            f"or place the right file at {path}"
        )
    os.replace(whole, path)
    part.unlink(missing_ok=True)


def _fetch(name: str, dataset: Dataset, path: Path, part: Path, console: Console) -> None:
    """Download all that `part` lacks. A connection that breaks is taken up again as long as each brings something."""
    import requests

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress, requests.Session() as session:
        task = progress.add_task(name, total=None if dataset.member else dataset.size)
        while True:
            before = _size(part)
            try:
                _append(session, dataset.url, part, partial(progress.update, task))
                if dataset.member or _size(part) >= dataset.size:
                    return
                problem = "the server sends only a part of it"
            except requests.RequestException as error:
                response = error.response
                problem = type(error).__name__ if response is None else f"{response.status_code} {response.reason}"
            if _size(part) <= before:
                raise MissingFileError(_by_hand(name, dataset, path, part, problem))


def _append(session: requests.Session, url: str, part: Path, show: Callable[..., None]) -> None:
    """Ask for the bytes after those that `part` has, and append them. Raises RequestException where that breaks off."""
    import requests

    done = _size(part)
    headers = {"Accept-Encoding": "identity"}  # a range of a compressed answer would be another range
    if done:
        headers["Range"] = f"bytes={done}-"
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # there is nothing after what we have: the SHA-256 will tell whether that is the file
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            done = 0  # the server starts at the beginning
        total = done + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        with part.open("ab" if done else "wb") as file:
            for block in response.iter_content(BLOCK):
                file.write(block)
                done += len(block)
                show(completed=done, total=total)
        if total is not None and done < total:  # older versions of urllib3 do not raise
            raise requests.ConnectionError("the connection ended early")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _by_hand(name: str, dataset: Dataset, path: Path, part: Path, problem: str) -> str:
    """What to do where a download does not work."""
    file = f"the file {dataset.member} in it" if dataset.member else "it"
    kept = f", or try again: {_size(part) / 1e6:,.1f} MB are here already" if _size(part) else ""
    return (
        f"The data set '{name}' is not on this machine and cannot be downloaded ({problem}).\n"
        f"Fetch {dataset.url} elsewhere and save {file} as {path}{kept}"
    )

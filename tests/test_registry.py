"""Data sets by name: downloads from a real server on this machine, which breaks off, lies or is not there."""

from __future__ import annotations

import hashlib
import io
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pygpt.cli import main
from pygpt.data import load_tokens
from pygpt.data.registry import DATASETS, Dataset, data_folder, dataset_path, get_dataset
from pygpt.errors import InputError, MissingFileError, PygptError
from pygpt.tokenizer import load_tokenizer

CONTENT = np.random.default_rng(0).bytes(1_000_003)


@dataclass
class Site:
    """What the server answers with, and what it was asked."""

    content: bytes = CONTENT
    url: str = ""
    drop_after: list[int] = field(default_factory=list)
    """Per answer: how many bytes are sent before the connection is closed."""
    ranges: bool = True
    chunked: bool = False
    status: int = 0
    asked: list[str | None] = field(default_factory=list)
    """The range header of each request."""


def handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wanted = self.headers["Range"]
            site.asked.append(wanted)
            assert self.headers["Accept-Encoding"] == "identity"
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and site.ranges else 0
            if site.status or start >= len(site.content):
                self.send_response(site.status or 416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = site.content[start:]
            self.send_response(206 if start else 200)
            if site.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(len(body)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}")
            self.end_headers()
            sent = body[: site.drop_after.pop(0)] if site.drop_after else body
            if site.chunked:
                self.wfile.write(f"{len(sent):x}\r\n".encode() + sent + b"\r\n")
                self.wfile.write(b"0\r\n\r\n" if len(sent) == len(body) else b"")
            else:
                self.wfile.write(sent)
            self.close_connection = len(sent) < len(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(site))
    site.url = f"http://127.0.0.1:{server.server_port}/some/file"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYGPT_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("PYGPT_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def dataset(site: Site, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A data set `test`, whose content is the server's."""
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    entry = Dataset(file="test.bin", url=site.url, size=len(CONTENT), sha256=sha256, licence="none", what="noise")
    monkeypatch.setitem(DATASETS, "test", entry)
    return entry


def only(folder: Path, *names: str) -> bool:
    """Whether these are all files of a folder, the lock aside."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")} == set(names)


def test_download_then_cache(site: Site, dataset: Dataset, cache: Path) -> None:
    path = get_dataset("test")
    assert path == cache / "test.bin"
    assert path.read_bytes() == CONTENT
    assert get_dataset("test") == dataset_path("test") == path
    assert site.asked == [None]
    assert only(cache, "test.bin")


def test_progress_is_shown(dataset: Dataset) -> None:
    shown = Console(file=io.StringIO(), force_terminal=True, width=100)
    get_dataset("test", shown)
    assert "1.0/1.0 MB" in shown.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    chunked: bool, site: Site, dataset: Dataset, cache: Path
) -> None:
    site.chunked, site.drop_after = chunked, [300_000, 400_000, 10_000]
    assert get_dataset("test").read_bytes() == CONTENT
    assert site.asked[0] is None
    starts = [int(str(asked).removeprefix("bytes=").removesuffix("-")) for asked in site.asked[1:]]
    assert starts == sorted(set(starts))  # each request goes on after what is there, none starts anew
    assert 0 < starts[0] <= 300_000
    assert 650_000 < starts[-1] <= 710_000
    assert only(cache, "test.bin")


def test_a_later_run_goes_on_where_an_interrupted_one_ended(site: Site, dataset: Dataset, cache: Path) -> None:
    site.drop_after = [500_000, 0]
    with pytest.raises(MissingFileError, match=r"try again: 0\.\d MB are here already"):
        get_dataset("test")
    assert not (cache / "test.bin").exists()  # what is incomplete never has the final name
    kept = (cache / "test.bin.part").read_bytes()
    assert 400_000 < len(kept) <= 500_000
    assert kept == CONTENT[: len(kept)]
    site.asked.clear()
    assert get_dataset("test").read_bytes() == CONTENT
    assert site.asked == [f"bytes={len(kept)}-"]


def test_a_server_without_ranges_starts_again(site: Site, dataset: Dataset, cache: Path) -> None:
    cache.mkdir()
    (cache / "test.bin.part").write_bytes(b"x" * 100_000)
    site.ranges = False
    assert get_dataset("test").read_bytes() == CONTENT
    # and one that always breaks off does not keep us for ever
    (cache / "test.bin").unlink()
    site.drop_after = [200_000] * 50
    with pytest.raises(MissingFileError, match="cannot be downloaded"):
        get_dataset("test")
    assert len(site.drop_after) >= 45


def test_complete_but_for_the_name(site: Site, dataset: Dataset, cache: Path) -> None:
    cache.mkdir()
    (cache / "test.bin.part").write_bytes(CONTENT)
    assert get_dataset("test").read_bytes() == CONTENT
    assert site.asked == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (CONTENT[:-1] + b"?", "its SHA-256 is [0-9a-f]{64}, not [0-9a-f]{64}"),
        (CONTENT + b"?", "it has 1,000,004 bytes and should have 1,000,003"),
    ],
    ids=["changed", "longer"],
)
def test_another_content_is_refused_and_deleted(
    content: bytes, problem: str, site: Site, dataset: Dataset, cache: Path
) -> None:
    site.content = content
    with pytest.raises(InputError, match=problem):
        get_dataset("test")
    assert only(cache)
    site.content = CONTENT
    assert get_dataset("test").read_bytes() == CONTENT


def test_a_shorter_content_is_not_taken_for_whole(site: Site, dataset: Dataset, cache: Path) -> None:
    site.content = CONTENT[:-1]
    with pytest.raises(MissingFileError, match="the server sends only a part of it"):
        get_dataset("test")
    assert only(cache, "test.bin.part")
    site.content = CONTENT
    assert get_dataset("test").read_bytes() == CONTENT


def test_a_part_of_something_else_is_noticed(site: Site, dataset: Dataset, cache: Path) -> None:
    cache.mkdir()
    (cache / "test.bin.part").write_bytes(b"x" * 1000)
    with pytest.raises(InputError, match=r"its SHA-256 is .* It was deleted; try again"):
        get_dataset("test")
    assert get_dataset("test").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [404, 503])
def test_a_refusal_is_told(status: int, site: Site, dataset: Dataset, cache: Path) -> None:
    site.status = status
    with pytest.raises(MissingFileError, match=f"cannot be downloaded \\({status} ") as caught:
        get_dataset("test")
    assert f"Fetch {site.url} elsewhere and save it as {cache / 'test.bin'}" in str(caught.value)
    assert len(site.asked) == 1


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_file_in_an_archive(
    chunked: bool, site: Site, dataset: Dataset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "test", replace(dataset, member="inside"))
    site.content, site.chunked, site.drop_after = zipped(readme=b"x", inside=CONTENT), chunked, [70_000]
    assert get_dataset("test").read_bytes() == CONTENT
    assert len(site.asked) == 2
    assert only(cache, "test.bin")


@pytest.mark.parametrize(
    ("archive", "problem"),
    [
        (zipped(other=b"x"), "not a whole zip archive with inside in it"),
        (zipped(inside=CONTENT)[:-30], "not a whole zip archive"),
        (b"<html>Sorry</html>", "File is not a zip file"),
        (zipped(inside=b"x").replace(b"inside", b"inside"), "it has 1 bytes and should have 1,000,003"),
        (zipped(inside=CONTENT)[:5000] + b"!!!!" + zipped(inside=CONTENT)[5004:], "Bad CRC-32"),
    ],
    ids=["no-member", "cut", "page", "small", "damaged"],
)
def test_a_wrong_archive(
    archive: bytes, problem: str, site: Site, dataset: Dataset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "test", replace(dataset, member="inside"))
    site.content = archive
    with pytest.raises(InputError, match=problem):
        get_dataset("test")
    assert only(cache)


def test_without_a_network_a_file_placed_by_hand_serves(
    site: Site, dataset: Dataset, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:1/nobody/listens.zip"
    monkeypatch.setitem(DATASETS, "test", replace(dataset, url=nowhere, member="inside"))
    assert main(["data", "get", "test"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-2:]
    assert message[0].startswith("pygpt: The data set 'test' is not on this machine and cannot be downloaded (Connect")
    assert message[1] == f"Fetch {nowhere} elsewhere and save the file inside in it as {cache / 'test.bin'}"
    (cache / "test.bin").write_bytes(CONTENT[:-1])
    with pytest.raises(InputError, match=r"test\.bin is not the data set 'test': it has 1,000,002 bytes.*Delete it"):
        get_dataset("test")
    (cache / "test.bin").write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(InputError, match="its SHA-256 is"):
        dataset_path("test")
    (cache / "test.bin").write_bytes(CONTENT)
    assert main(["data", "get", "test"]) == 0
    assert capsys.readouterr().out.strip() == str(cache / "test.bin")


def test_paths_come_before_names(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "test").write_text("mine")
    assert dataset_path("test") == Path("test")
    assert dataset_path(tmp_path) == tmp_path
    with pytest.raises(MissingFileError, match=r"No such file or folder: tset; nor .* tiny-shakespeare, sms-spam"):
        dataset_path("tset")
    with pytest.raises(InputError, match="Unknown data set 'tset': choose one of"):
        get_dataset("tset")


def test_cache_that_cannot_be_written(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYGPT_DATA", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"Cannot use .*file/cache/test\.bin: Not a directory"):
        get_dataset("test")


def test_two_at_once(site: Site, dataset: Dataset, cache: Path) -> None:
    site.drop_after = [400_000]
    results: list[Path | PygptError] = []
    threads = [threading.Thread(target=lambda: results.append(get_dataset("test"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [cache / "test.bin"] * 3
    assert len(site.asked) == 2  # one download, in two pieces


def test_default_cache_is_the_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYGPT_DATA")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert data_folder() == tmp_path / "xdg" / "pygpt" / "data"
    else:
        assert data_folder().name == "data"


@pytest.mark.parametrize("missing", ["platformdirs", "requests", "filelock"])
def test_missing_package_names_the_extra(missing: str, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "platformdirs":
        monkeypatch.delenv("PYGPT_DATA")
    monkeypatch.setitem(sys.modules, missing, None)  # importing it then fails as if it were not installed
    with pytest.raises(InputError, match=rf"need the package {missing}: pip install 'pygpt-kernels\[data\]'"):
        get_dataset("test")


def test_list_names_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["data"]) == 0
    listed = capsys.readouterr().out
    for name, dataset in DATASETS.items():
        assert name in listed
        assert dataset.url in listed
        assert dataset.licence in listed
    assert "2,152.8 MB" in listed


@pytest.mark.parametrize("arguments", [["get"], ["list", "sms-spam"], ["fetch"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["data", *arguments])
    except SystemExit as error:  # what the parser itself refuses
        status = int(str(error.code))
    assert status == 2
    assert "get" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("tiny-shakespeare", "tiny_shakespeare.txt"),
        ("sms-spam", "sms_spam_collection.tsv"),
        ("instructions", "instruction_data.json"),
    ],
)
def test_registered_hashes_are_those_of_the_real_files(name: str, file: str, shared_data: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / DATASETS[name].file).write_bytes((shared_data / file).read_bytes())
    assert get_dataset(name) == cache / DATASETS[name].file


def test_prepare_takes_a_name(shared_data: Path, cache: Path) -> None:
    cache.mkdir()
    text = (shared_data / "tiny_shakespeare.txt").read_bytes()
    (cache / "tiny-shakespeare.txt").write_bytes(text)
    assert main(["prepare", "--inputs", "tiny-shakespeare", "--out", "out", "--tokenizer", "char"]) == 0
    tokens = np.concatenate([np.asarray(load_tokens("out", split)) for split in ("train", "val")])
    assert load_tokenizer("out").decode(tokens) == text.decode()

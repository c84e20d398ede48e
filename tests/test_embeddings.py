"""Token vectors: neighbours, maps, word2vec's text format, and embeddings that start from pretrained vectors."""

from __future__ import annotations

import html
import json
import re
import sys
from pathlib import Path
from typing import Any

import gensim
import numpy as np
import pytest
import sklearn.decomposition
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from pygpt import GPT, GPTConfig, get_tokenizer
from pygpt.cli import main
from pygpt.embeddings import EmbeddingsConfig, find_word, load_vectors, neighbours
from pygpt.errors import InputError, MissingFileError
from pygpt.maps import FAR, map_figure, pca, tsne
from pygpt.tokenizer import CharTokenizer
from pygpt.train import resolve_checkpoint
from pygpt.train.checkpoint import checkpoints, read_training
from pygpt.word2vec import Vectors, escape, init_embeddings, read_word2vec, token_vectors, unescape, write_word2vec

ODD = [b" king", b"king", b" ", b"  ", b"\n", b"\t", b"\r\n", b"\\", b"\\x20", "▁".encode(), b"\xc3", b"\xa9", "é".encode(),
       " 东京".encode(), "🙂".encode(), "\u2003".encode(), "\xa0".encode(), "\u200b".encode(), b"\0", b"\x7f", b"-0.5", b"=",
       b"<|endoftext|>", b"[bold]", b"$x$", b""]  # fmt: skip


def random_vectors(tokens: list[bytes], size: int = 7, seed: int = 0) -> Vectors:
    return Vectors(tokens, np.random.default_rng(seed).standard_normal((len(tokens), size)).astype(np.float32))


def small_model(vocab_size: int = 50257, n_embd: int = 16, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=vocab_size, n_embd=n_embd, n_layer=1, n_head=2, block_size=8))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYGPT_TRACEBACK", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with GPT-2's vocabulary."""
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    get_tokenizer("gpt2").save(folder)
    return folder


# word2vec's format


def test_escape_is_reversible_and_fit_for_the_format() -> None:
    written = [escape(token) for token in ODD]
    assert [unescape(text) for text in written] == ODD
    assert len(set(written)) == len(ODD)
    assert not [text for text in written if re.search(r"\s", text) or not text.isprintable()]
    assert written[:4] == ["▁king", "king", "▁", "▁▁"]
    assert [escape(token) for token in ("naïve".encode(), b"\n", b"\xc3", b"a\\b")] == [
        "naïve",
        "\\x0a",
        "\\xc3",
        "a\\x5cb",
    ]
    every_byte = bytes(range(256))
    assert unescape(escape(every_byte)) == every_byte


def test_escape_of_every_gpt2_token() -> None:
    tokenizer = get_tokenizer("gpt2")
    tokens = [tokenizer.decode_bytes([i]) for i in range(50257)]
    written = [escape(token) for token in tokens]
    assert [unescape(text) for text in written] == tokens
    assert len(set(written)) == 50257


def test_gensim_reads_our_file_and_we_gensims(tmp_path: Path) -> None:
    vectors = random_vectors(ODD)
    write_word2vec(tmp_path / "ours.txt", vectors)
    assert (tmp_path / "ours.txt").read_bytes().splitlines()[0] == b"26 7"
    theirs = gensim.models.KeyedVectors.load_word2vec_format(tmp_path / "ours.txt")
    assert [unescape(key) for key in theirs.index_to_key] == ODD
    np.testing.assert_array_equal(theirs.vectors, vectors.table)
    theirs.save_word2vec_format(tmp_path / "theirs.txt")
    back = read_word2vec(tmp_path / "theirs.txt")
    assert back.tokens == ODD
    np.testing.assert_array_equal(back.table, vectors.table)


def test_values_come_back_exactly(tmp_path: Path) -> None:
    info = np.finfo(np.float32)
    values = np.array([[0.1, -0.0, info.max, info.tiny, info.smallest_subnormal, 1 + info.eps, 1 / 3]], np.float32)
    write_word2vec(tmp_path / "v.txt", Vectors([b"x"], values))
    assert read_word2vec(tmp_path / "v.txt").table.tobytes() == values.tobytes()


def test_reading_part_of_a_file_and_files_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    path.write_bytes(b"4 2\r\nthe 1 2 \r\n. . . 3 4 \r\nthe 5 6\r\nC:\\x 7e0 -8\r\n")
    vectors = read_word2vec(path)
    assert vectors.tokens == [b"the", b". . .", b"C:\\x"]
    assert vectors.table.tolist() == [[1, 2], [3, 4], [7, -8]]
    assert vectors.row == {b"the": 0, b". . .": 1, b"C:\\x": 2}
    part = read_word2vec(path, {b"C:\\x", b"missing"})
    assert (part.tokens, part.table.tolist()) == ([b"C:\\x"], [[7, -8]])
    none = read_word2vec(path, set())
    assert (none.tokens, none.table.shape) == ([], (0, 2))
    write_word2vec(tmp_path / "none.txt", none)
    assert (tmp_path / "none.txt").read_text() == "0 2\n"
    assert read_word2vec(tmp_path / "none.txt").table.shape == (0, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: expected the number of vectors"),
        (b"the 0.1 0.2\n", "line 1: expected .* GloVe has no such line"),
        (b"1 0\nthe\n", "line 1: expected"),
        (b"2 2\na 1 2\nb 1\n", r"line 3: a token and 2 values expected, got 2 fields"),
        (b"2 2\na 1 2\n\n", "line 3: a token and 2 values expected, got 1 fields"),
        (b"2 2\na 1 2\nb 1 x\n", "line 3: could not convert string to float: b?'x'"),
        (b"2 2\na 1 2\nb 1 nan\n", "line 3: a value is infinite or not a number"),
        (b"2 2\na 1 2\nb 1 1e39\n", "line 3: a value is infinite"),
        (b"1 2\na 1 2\nb 1 2\n", "line 3: more than the 1 vectors that line 1 announces"),
        (b"3 2\na 1 2\nb 1 2\n", "ends after line 3: line 1 announces 3 vectors, it has 2"),
        (b"1 2\n\xff 1 2\n", r"line 2: the token is not UTF-8 text \(invalid start byte\)"),
    ],
)
def test_what_is_not_in_the_format(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(InputError, match=f"bad.txt,? {message}"):
        read_word2vec(tmp_path / "bad.txt")


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="No file of vectors at"):
        read_word2vec(tmp_path / "missing.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot write"):
        write_word2vec(tmp_path / "file" / "v.txt", random_vectors([b"a"]))


# Vectors of a model


def test_vectors_of_a_model_are_its_embedding(run: Path) -> None:
    vectors, tokenizer = load_vectors(run)
    assert tokenizer is not None
    weight = GPT.from_pretrained(run).transformer.wte.weight
    for text in (" king", "\n", "<|endoftext|>"):
        (token,) = tokenizer.encode(text, allowed_special="all")
        np.testing.assert_array_equal(vectors.table[vectors.row[text.encode()]], weight[token].detach().numpy())


def test_rows_without_a_token_are_left_out() -> None:
    model, tokenizer = small_model(vocab_size=50304).bfloat16(), get_tokenizer("gpt2")
    vectors = token_vectors(model, tokenizer)
    assert len(vectors.tokens) == len(vectors.table) == 50257
    assert vectors.table.dtype == np.float32
    cut = token_vectors(small_model(vocab_size=100), tokenizer)
    assert cut.tokens == vectors.tokens[:100]


# Words and neighbours


def test_a_word_stands_for_its_tokens_in_running_text(run: Path) -> None:
    vectors, tokenizer = load_vectors(run)
    assert find_word(vectors, tokenizer, "king").tokens == [b" king"]
    assert find_word(vectors, tokenizer, "=king").tokens == [b"king"]
    assert find_word(vectors, tokenizer, "=▁king").tokens == [b" king"]
    assert find_word(vectors, tokenizer, "=\\x0a").tokens == [b"\n"]
    assert find_word(vectors, tokenizer, "=\\xc3").tokens == [b"\xc3"]
    assert find_word(vectors, tokenizer, "=<|endoftext|>").tokens == [b"<|endoftext|>"]
    assert find_word(vectors, tokenizer, ",").tokens == [b","]
    assert find_word(vectors, tokenizer, "=").tokens == [b"="]
    word = find_word(vectors, tokenizer, "Tokyoite")
    assert b"".join(word.tokens) == b" Tokyoite"
    assert len(word.tokens) > 1
    expected = np.mean([vectors.table[vectors.row[token]] for token in word.tokens], axis=0)
    np.testing.assert_allclose(word.vector, expected, rtol=1e-6)
    with pytest.raises(InputError, match="there is no vector for ▁kinggg"):
        find_word(vectors, tokenizer, "=▁kinggg")
    with pytest.raises(InputError, match="an empty word"):
        find_word(vectors, tokenizer, "")


def test_words_of_a_character_tokenizer_and_of_a_file() -> None:
    tokenizer = CharTokenizer("abcé ", end_of_text=True)
    vectors = token_vectors(small_model(vocab_size=tokenizer.vocab_size), tokenizer)
    assert find_word(vectors, tokenizer, "baé").tokens == [b"b", b"a", "é".encode()]
    with pytest.raises(InputError, match="Character 'x'"):
        find_word(vectors, tokenizer, "x")
    file = random_vectors([b" king", b"king", b"queen"])
    assert find_word(file, None, "king").tokens == [b" king"]
    assert find_word(file, None, "queen").tokens == [b"queen"]
    with pytest.raises(InputError, match="'prince': there is no vector for prince"):
        find_word(file, None, "prince")


def test_neighbours_are_gensims(run: Path, tmp_path: Path) -> None:
    vectors, tokenizer = load_vectors(run)
    write_word2vec(tmp_path / "v.txt", vectors)
    keyed = gensim.models.KeyedVectors.load_word2vec_format(tmp_path / "v.txt")
    for text in ("king", "=\\x0a", "=é"):
        word = find_word(vectors, tokenizer, text)
        ours = neighbours(vectors, word, 20)
        theirs = keyed.most_similar(escape(word.tokens[0]), topn=20)
        assert [escape(token) for token, _ in ours] == [key for key, _ in theirs]
        np.testing.assert_allclose([cosine for _, cosine in ours], [cosine for _, cosine in theirs], atol=1e-6)
    word = find_word(vectors, tokenizer, "Tokyoite")
    theirs = [pair for pair in keyed.similar_by_vector(word.vector, topn=30) if unescape(pair[0]) not in word.tokens][
        :20
    ]
    ours = neighbours(vectors, word, 20)
    assert [escape(token) for token, _ in ours] == [key for key, _ in theirs]
    np.testing.assert_allclose([cosine for _, cosine in ours], [cosine for _, cosine in theirs], atol=1e-6)


def test_neighbours_of_large_small_and_no_vectors() -> None:
    table = np.array([[3e18, 0], [1e-18, 1e-18], [0, 0], [0, -2e18]], np.float32)
    vectors = Vectors([b"a", b"b", b"c", b"d"], table)
    found = neighbours(vectors, find_word(vectors, None, "a"), 10)  # more than there are
    assert [token for token, _ in found] == [b"b", b"c", b"d"]
    np.testing.assert_allclose([cosine for _, cosine in found], [0.5**0.5, 0, 0], atol=1e-6)
    with pytest.raises(InputError, match="'c' has the vector 0"):
        neighbours(vectors, find_word(vectors, None, "c"), 1)
    alone = Vectors([b"a"], table[:1])
    assert neighbours(alone, find_word(alone, None, "a"), 5) == []


# Maps


@pytest.mark.parametrize("shape", [(50, 12), (5, 40), (3, 2)])
def test_pca_is_scikit_learns(shape: tuple[int, int]) -> None:
    table = (np.random.default_rng(1).standard_normal(shape) * 10 + 100).astype(np.float32)
    points, shares = pca(table)
    reference = sklearn.decomposition.PCA(2, svd_solver="full")
    expected = reference.fit_transform(table.astype(np.float64))
    sign = np.sign((points * expected).sum(0))
    np.testing.assert_allclose(points * sign, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_, rtol=1e-4)
    again, _ = pca(np.asfortranarray(table))
    np.testing.assert_allclose(again, points, rtol=1e-4, atol=1e-5)


def test_pca_of_one_dimension_and_of_equal_vectors() -> None:
    points, shares = pca(np.array([[1], [2], [6]], np.float32))
    np.testing.assert_allclose(points, [[-2, 0], [-1, 0], [3, 0]], atol=1e-6)
    np.testing.assert_allclose(shares, [1, 0], atol=1e-6)
    points, shares = pca(np.ones((4, 5), np.float32))
    assert not points.any()
    assert not shares.any()


def test_tsne_keeps_neighbourhoods() -> None:
    rng = np.random.default_rng(0)
    directions = np.eye(8)[:3]
    table = np.concatenate([10 ** rng.uniform(-3, 1, (20, 1)) * (d + rng.normal(0, 0.05, (20, 8))) for d in directions])
    points = tsne(table.astype(np.float32), seed=3)
    group = np.repeat(np.arange(3), 20)
    distance = np.linalg.norm(points[:, None] - points, axis=-1) + np.diag(np.full(60, np.inf))
    assert (group[distance.argmin(1)] == group).mean() > 0.95
    np.testing.assert_array_equal(points, tsne(table.astype(np.float32), seed=3))
    assert np.isfinite(tsne(table[:3].astype(np.float32))).all()


@pytest.mark.parametrize("count", [3, 60, 300])
def test_labels_do_not_cover_each_other(count: int) -> None:
    points = np.random.default_rng(0).standard_normal((count, 2)).astype(np.float32)
    labels = [f"$word_{i}$" if i % 2 else f"a longer label {i}" for i in range(count)]
    figure, hidden = map_figure(points, labels, ("x", "y"))
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    plot = figure.axes[0]
    boxes = np.array([text.get_window_extent().extents for text in plot.texts])
    assert len(boxes) == count - hidden
    assert hidden <= count // 5
    overlap = (boxes[:, None, :2] < boxes[:, 2:] - 0.01).all(-1) & (boxes[:, None, 2:] > boxes[:, :2] + 0.01).all(-1)
    assert overlap.sum() == len(boxes)  # each with itself
    # and each label is beside its own point
    centres = dict(zip(labels, plot.transData.transform(points), strict=True))
    for text, box in zip(plot.texts, boxes, strict=True):
        x, y = centres[text.get_text()]
        assert max(box[0] - x, x - box[2], box[1] - y, y - box[3]) <= max(FAR) + 1


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_map_files(method: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["king", "queen", "=<|endoftext|>", "$x^$", "<b>bold</b>", "Tokyoite", "king"]
    (tmp_path / "words.txt").write_text("\n\nÉtat\n  东京 \nking\n", encoding="utf-8")
    arguments = ["--map", *words, "--map-file", "words.txt", "--method", method, "--out", "maps"]
    assert main(["embeddings", str(run), *arguments]) == 0
    told = capsys.readouterr().out
    assert f"map of 8 words: maps/map_{method}.png" in told.replace("\n", "")
    assert f"map_{method}.png shows boxes for characters that its font lacks" in " ".join(told.split())
    picture = imread(tmp_path / "maps" / f"map_{method}.png")
    assert min(picture.shape[:2]) > 500
    assert 0.001 < (picture[..., :3].mean(-1) < 0.5).mean() < 0.2  # something is drawn, mostly background
    page = (tmp_path / "maps" / f"map_{method}.html").read_text(encoding="utf-8")
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)\s*=[^>]*>", page)  # no network is needed
    assert "Plotly.newPlot" in page
    assert len(page) > 1_000_000  # plotly's script is in it
    (dots,) = traces(page)
    labels = [html.unescape(label) for label in dots["text"]]
    assert labels == ["king", "queen", "<|endoftext|>", "$x^$", "<b>bold</b>", "Tokyoite", "État", "东京"]
    assert not [label for label in dots["text"] + dots["hovertext"] if "<" in label]  # plotly would take it for markup
    assert dots["hovertext"][0] == "▁king"
    assert dots["hovertext"][5].startswith("▁Tokyo ite, the mean of 2 tokens")
    vectors, tokenizer = load_vectors(run)
    table = np.stack([find_word(vectors, tokenizer, word).vector for word in dict.fromkeys([*words, "État", "东京"])])
    expected = pca(table)[0] if method == "pca" else tsne(table, 0)
    np.testing.assert_allclose(np.array([dots["x"], dots["y"]]).T, expected, rtol=1e-5, atol=1e-6)


def traces(page: str) -> list[dict[str, Any]]:
    """What a page made by plotly draws."""
    start = re.search(r'Plotly\.newPlot\(\s*"[^"]*",\s*', page)
    assert start
    return json.JSONDecoder().raw_decode(page[start.end() :])[0]


def prepare_words(folder: Path) -> None:
    (folder / "text.txt").write_text("the cat and the dog and the bird. " * 20, encoding="utf-8")
    assert main(["prepare", "--inputs", "text.txt", "--out", "data"]) == 0


def test_the_most_frequent_tokens(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_words(tmp_path)
    assert main(["embeddings", str(run), "--map-top", "3", "--data", "data", "--out", "maps"]) == 0
    page = (tmp_path / "maps" / "map_pca.html").read_text(encoding="utf-8")
    (dots,) = traces(page)
    assert dots["text"][:2] == ["▁the", "▁and"]
    assert dots["text"][2:] in (["▁cat"], ["▁dog"], ["▁bird"])
    assert main(["embeddings", str(run), "--map-top", "9", "--data", "data", "--out", "maps"]) == 0
    assert "map of 6 words" in capsys.readouterr().out  # not "." and no token that does not occur
    assert main(["embeddings", str(run), "--map-top", "40", "--out", "maps"]) == 0
    assert "map of 40 words" in capsys.readouterr().out


# The command


def test_neighbours_among_the_tokens_of_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_words(tmp_path)
    capsys.readouterr()
    assert main(["embeddings", str(run), "--near", "the", "--data", "data", "--count", "20"]) == 0
    shown = set(re.findall(r"│ (\S+) +│ +-?\d\.\d{4}", capsys.readouterr().out))
    assert shown == {"the", "▁cat", "▁and", "▁dog", "▁bird", ".", "▁"}  # the text is cut after a space


def test_neighbours_are_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embeddings", str(run), "--near", "Tokyoite", "=[", "--count", "3"]) == 0
    shown = capsys.readouterr().out
    assert "nearest to ▁Tokyo ite" in " ".join(shown.split())
    assert "the mean of 2 tokens" in " ".join(shown.split())
    assert len(re.findall(r"0\.\d{4}", shown)) == 6


def test_export_and_a_file_in_place_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embeddings", str(run), "--export", "out/v.txt"]) == 0
    assert "50,257 vectors of dimension 16: out/v.txt" in capsys.readouterr().out.replace("\n", " ")
    assert main(["embeddings", str(run), "--near", "king"]) == 0
    of_model = capsys.readouterr().out
    assert main(["embeddings", "out/v.txt", "--near", "king"]) == 0
    assert capsys.readouterr().out == of_model
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["v.txt"]
    assert EmbeddingsConfig(run=tmp_path / "out" / "v.txt", map=("a",)).folder == tmp_path / "out" / "embeddings"
    assert EmbeddingsConfig(run=tmp_path / "out", map=("a",)).folder == tmp_path / "out" / "embeddings"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to do: ask for --near"),
        ({"near": ("x",), "count": 0}, "count must be at least 1, got 0"),
        ({"map_top": 0}, "map_top must be at least 1, got 0"),
        ({"map": ("x",), "seed": 2**32}, "seed must be from 0 to 4294967295, got 4294967296"),
        ({"map": ("x",), "data": Path("data")}, "data is for near and map_top"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EmbeddingsConfig(run=Path("run"), **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--map", "one", "two", "one"], "a map needs at least 3 different words, got 2"),
        (["--map-file", "missing.txt"], "No file of words at missing.txt"),
        (["--map-file", "latin.txt"], "latin.txt is not UTF-8 text"),
        (["--near", "=▁nosuchtoken"], "'=▁nosuchtoken': there is no vector for ▁nosuchtoken"),
        (["--map-top", "5", "--data", "nowhere"], "there is no folder nowhere"),
        (["--map-top", "5", "--data", "chars"], "'chars' was prepared with another tokenizer"),
    ],
)
def test_errors(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    if "chars" in arguments:
        (tmp_path / "text.txt").write_text("some words " * 20)
        main(["prepare", "--inputs", "text.txt", "--out", "chars", "--tokenizer", "char"])
        capsys.readouterr()
    assert main(["embeddings", str(run), *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("pygpt: ")
    assert message in told
    assert len(told.strip().splitlines()) <= 2


@pytest.mark.parametrize(
    ("missing", "method"), [("plotly", "pca"), ("matplotlib.backends.backend_agg", "pca"), ("sklearn.manifold", "tsne")]
)
def test_missing_package_names_the_extra(
    missing: str, method: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # importing it then fails as if it were not installed
    assert main(["embeddings", str(run), "--map", "a", "b", "c", "--method", method, "--out", "maps"]) == 2
    assert f"needs the package {missing}: pip install 'pygpt-kernels[embeddings]'" in capsys.readouterr().err
    assert not Path("maps").exists()


# Embeddings that start from pretrained vectors


def test_init_embeddings_copies_the_vectors_of_matching_tokens(tmp_path: Path) -> None:
    tokenizer = get_tokenizer("gpt2")
    vectors = random_vectors([b" queen", b"king", b"\n", b"no such token", b" the"], 16)
    write_word2vec(tmp_path / "v.txt", vectors)
    model = small_model()
    before = model.transformer.wte.weight.detach().clone()
    assert init_embeddings(model, tokenizer, tmp_path / "v.txt", rescale=False) == 5
    after = model.lm_head.weight.detach()  # the head shares the table
    expected = {" queen": 0, " king": 1, "king": 1, "\n": 2, " the": 4}  # " king" has no vector of its own, king has
    rows = {tokenizer.encode(text)[0]: row for text, row in expected.items()}
    for token, row in rows.items():
        assert torch.equal(after[token], torch.from_numpy(vectors.table[row]))
    others = [token for token in range(50257) if token not in rows]
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rescaled_vectors_keep_angles_and_have_the_size_of_those_they_replace(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tokenizer = get_tokenizer("gpt2")
    tokens = [tokenizer.decode_bytes([i]) for i in range(300, 700)]
    vectors = random_vectors(tokens, 16)
    write_word2vec(tmp_path / "v.txt", Vectors(tokens, vectors.table * 50 + 3))
    model = small_model().to(dtype)
    before = model.transformer.wte.weight.detach().float().clone()
    count = init_embeddings(model, tokenizer, tmp_path / "v.txt")
    after = model.transformer.wte.weight.detach().float()
    changed = (before != after).any(1)
    assert count == changed.sum() >= 400
    size = (after[changed].square().mean() / before[changed].square().mean()).sqrt()
    assert abs(size - 1) < 5e-3
    cosine = torch.cosine_similarity(after[300:700], torch.from_numpy(vectors.table * 50 + 3))
    assert cosine.min() > (1 - 1e-6 if dtype == torch.float32 else 0.9999)


def test_a_model_starts_from_its_own_export(tmp_path: Path) -> None:
    tokenizer = get_tokenizer("gpt2")
    source, target = small_model(seed=1), small_model(seed=2)
    write_word2vec(tmp_path / "v.txt", token_vectors(source, tokenizer))
    assert init_embeddings(target, tokenizer, tmp_path / "v.txt", rescale=False) == 50257
    assert torch.equal(target.transformer.wte.weight, source.transformer.wte.weight)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (random_vectors([b" king"], 15), "has vectors of dimension 15; the model needs n_embd of them, 16"),
        (random_vectors([b"no such token"], 16), "no vector for any of the 50,257 tokens of 'gpt2'"),
        (Vectors([b" king"], np.zeros((1, 16), np.float32)), "only zeros for the tokens"),
    ],
)
def test_vectors_that_do_not_fit(vectors: Vectors, message: str, tmp_path: Path) -> None:
    write_word2vec(tmp_path / "v.txt", vectors)
    model = small_model()
    before = model.transformer.wte.weight.detach().clone()
    with pytest.raises(InputError, match=message):
        init_embeddings(model, get_tokenizer("gpt2"), tmp_path / "v.txt")
    assert torch.equal(model.transformer.wte.weight, before)


def test_pretrain_from_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh " * 300)
    assert main(["prepare", "--inputs", "text.txt", "--out", "data", "--tokenizer", "char"]) == 0
    vectors = random_vectors([b"a", b"b", b"c", b"not a character"], 16)
    write_word2vec(tmp_path / "v.txt", vectors)
    sizes = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "2"]
    # a learning rate too small to change a float32 shows what training started from
    arguments = ["--data", "data", "--steps", "1", "--device", "cpu", "--learning-rate", "1e-20", *sizes]
    weights: dict[str, Any] = {}
    for out, more in (("with", ["--init-embeddings", "v.txt"]), ("without", [])):
        assert main(["pretrain", "--out", out, *arguments, *more]) == 0
        weights[out] = GPT.from_pretrained(resolve_checkpoint(out)).transformer.wte.weight.detach()
    assert "3 of 9 tokens start from their vectors in v.txt" in capsys.readouterr().out
    tokens = CharTokenizer.from_text("abcdefgh ").encode("abc")
    others = [token for token in range(9) if token not in tokens]
    assert torch.equal(weights["with"][others], weights["without"][others])
    ratio = weights["with"][tokens] / torch.from_numpy(vectors.table[:3])
    assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-4)
    # going on keeps what was trained
    assert (
        main(["pretrain", "--out", "with", *arguments, "--init-embeddings", "v.txt", "--steps", "2", "--resume"]) == 0
    )
    assert read_training(checkpoints(Path("with"))[-1])["step"] == 2
    assert torch.equal(GPT.from_pretrained(resolve_checkpoint("with")).transformer.wte.weight, weights["with"])
    assert main(["pretrain", "--out", "bad", *arguments, "--init-embeddings", "text.txt"]) == 2
    assert "text.txt, line 1: expected" in capsys.readouterr().err

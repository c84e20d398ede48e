"""Maps of vectors: two dimensions of many (PCA, t-SNE), drawn with a label at each point."""

from __future__ import annotations

import html
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rich.console import Console

from pygpt.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float32]

NEAR, FAR = 4, (20, 40)  # pixels between a point and its label
SIDES = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))  # right, up
PLACES = [(gap, *side) for gap in (NEAR, *FAR) for side in SIDES]


def pca(table: Floats) -> tuple[Floats, Floats]:
    """Principal components: (N, C) -> coordinates (N, 2) on the two, and the share of the variance that each explains."""
    centered = table.astype(np.float64) - table.mean(0, dtype=np.float64)
    u, s, components = np.linalg.svd(centered, full_matrices=False)
    signs = np.sign(components[np.arange(len(s)), np.abs(components).argmax(1)])  # else they are arbitrary
    shares = s**2 / max((s**2).sum(), np.finfo(np.float64).tiny)
    missing = max(0, 2 - len(s))
    coordinates = np.pad((u * s * signs)[:, :2], ((0, 0), (0, missing)))
    return coordinates.astype(np.float32), np.pad(shares[:2], (0, missing)).astype(np.float32)


def tsne(table: Floats, seed: int = 0) -> Floats:
    """t-SNE (van der Maaten and Hinton, 2008) of the angles between vectors: (N, C) -> (N, 2)."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise _needs_extra("t-SNE", error) from error
    perplexity = min(30.0, (len(table) - 1) / 3)  # neighbours that count; scikit-learn's default where there are enough
    return TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=seed).fit_transform(table)


def _needs_extra(what: str, error: ImportError) -> InputError:
    return InputError(f"{what} needs the package {error.name}: pip install 'pygpt-kernels[embeddings]'")


def draw_map(
    table: Floats, labels: Sequence[str], hover: Sequence[str], folder: Path, method: str, seed: int, console: Console
) -> list[Path]:
    """Write map_{method}.png and map_{method}.html, which needs no network, into `folder`; returns their paths.

    table: (N, C) float32, N at least 3. labels, hover: N texts to show beside the points and when pointed at.
    """
    axes = ("", "")
    if method == "pca":
        points, (first, second) = pca(table)
        axes = (f"component 1 ({first:.1%} of the variance)", f"component 2 ({second:.1%})")
    else:
        points = tsne(table, seed)
    png, page = folder / f"map_{method}.png", folder / f"map_{method}.html"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            figure, hidden = map_figure(points, labels, axes)
            interactive = _interactive(points, labels, hover, axes)
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(png)
        page.write_text(interactive, encoding="utf-8")
    except ImportError as error:
        raise _needs_extra("A map", error) from error
    except OSError as error:
        raise InputError(f"Cannot write to {folder}: {error.strerror or error}") from error
    others = [warning for warning in caught if "missing from font" not in str(warning.message)]
    for warning in others:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if len(others) < len(caught):
        console.print(f"{png.name} shows boxes for characters that its font lacks; {page.name} shows them")
    if hidden:
        console.print(f"{hidden} of {len(labels)} labels have no room in {png.name}; {page.name} shows them all")
    return [png, page]


def map_figure(points: Floats, labels: Sequence[str], axes: tuple[str, str]) -> tuple[Figure, int]:
    """A matplotlib figure of labelled points (N, 2), and how many labels were left out as they would cover others.

    A label goes to the first of 8 sides of its point, then of 8 places farther away, with a line, that is still free.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = min(8 + len(points) / 20, 30)  # inches
    figure = Figure(figsize=(width, 0.75 * width), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    plot = figure.add_subplot(xlabel=axes[0], ylabel=axes[1])
    plot.plot(*points.T, "o", markersize=3)
    plot.margins(0.08)
    plot.grid(alpha=0.2)
    canvas.draw()  # decides where the axes are, and with them the points
    renderer, taken, hidden = canvas.get_renderer(), np.empty((0, 4)), 0
    for label, (x, y) in zip(labels, plot.transData.transform(points), strict=True):
        text = plot.text(0, 0, label, fontsize=9, parse_math=False, transform=None, va="bottom")
        size = text.get_window_extent(renderer)
        for gap, right, up in PLACES:
            left = x - size.width / 2 + right * (size.width / 2 + gap)
            bottom = y - size.height / 2 + up * (size.height / 2 + gap)
            box = np.array([left, bottom, left + size.width, bottom + size.height])
            if not ((taken[:, :2] < box[2:]) & (taken[:, 2:] > box[:2])).all(1).any():
                text.set_position((left, bottom))
                taken = np.vstack([taken, box])
                if gap > NEAR:
                    ends = [x, x + right * gap], [y, y + up * gap]
                    plot.plot(*ends, color="0.6", linewidth=0.5, transform=None, scalex=False, scaley=False)
                break
        else:
            text.remove()
            hidden += 1
    figure.set_layout_engine("none")  # drawing again must not move the points away from their labels
    return figure, hidden


def _interactive(points: Floats, labels: Sequence[str], hover: Sequence[str], axes: tuple[str, str]) -> str:
    """A page with everything in it: plotly's script too."""
    from plotly import graph_objects

    x, y = points.T.tolist()
    text = [html.escape(label) for label in labels]
    hovertext = [html.escape(line) for line in hover]
    dots = graph_objects.Scatter(
        x=x, y=y, text=text, hovertext=hovertext, hoverinfo="text", mode="markers+text", textposition="middle right"
    )
    figure = graph_objects.Figure(dots)
    figure.update_layout(xaxis_title=axes[0], yaxis_title=axes[1], template="plotly_white", dragmode="pan")
    return figure.to_html(include_plotlyjs=True, config={"scrollZoom": True, "displaylogo": False})

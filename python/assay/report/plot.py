"""Pictures of a calibration and of what techniques bring, drawn by matplotlib (the `plot` extra) from plain rows.

Colours are Okabe and Ito's, which people with colour-blindness tell apart; every series has a mark of its own as well. SVG keeps
its text as text, so that a page's own font serves and a reader can search it.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from ..errors import UnsupportedError
from .table import bandwidth, op_rate, percent, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
P = ParamSpec("P")
R = TypeVar("R")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#8a8f98"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "assay",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def _styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Runs `draw` in this module's style, and leaves matplotlib's settings as they were."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            import matplotlib
        except ImportError as exc:
            raise UnsupportedError("pictures need matplotlib: pip install 'assay[plot]'") from exc
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


def _axes(width: float = 7.2, height: float = 4.4) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _series(rows: Sequence[Row], key: str) -> list[tuple[str, str, str, list[Row]]]:
    """(name, colour, mark, rows) by the values of a key, in alphabetical order."""
    names = sorted({str(row[key]) for row in rows})
    return [
        (
            name,
            COLOURS[i % len(COLOURS)],
            MARKS[(i + i // len(COLOURS)) % len(MARKS)],
            [row for row in rows if str(row[key]) == name],
        )
        for i, name in enumerate(names)
    ]


def _scatter(axes: "Axes", rows: Sequence[Row], x: str, y: str) -> None:
    """One mark a row by op; held-out ones hollow."""
    for name, colour, mark, members in _series(rows, "op"):
        for held_out in (False, True):
            chosen = [row for row in members if bool(row["held_out"]) == held_out]
            axes.plot(
                [row[x] for row in chosen], [row[y] for row in chosen], mark, linestyle="none", markersize=5,
                markerfacecolor="none" if held_out else colour, markeredgecolor=colour, alpha=0.8,
                label=None if held_out else name,
            )  # fmt: skip


@_styled
def roofline(roofs: Sequence[Row], points: Sequence[Row]) -> "Figure":
    """Operations a second over operations a byte, under the measured roofs of one number of threads.

    Parameters
    ----------
    roofs
        Rows `roof` and `median`; those of reading ("..._read") and of peaks ("..._peak") are drawn.
    points
        Rows `op`, `ops_per_byte`, `ops_per_s`, `held_out`.
    """
    figure, axes = _axes()
    # What is written, atomics and latencies bound no point here.
    lines = [(r["roof"], r["median"]) for r in roofs if str(r["roof"]).endswith("_read")]
    peaks = [(r["roof"], r["median"]) for r in roofs if str(r["roof"]).endswith("_peak")]
    xs = [p["ops_per_byte"] for p in points] or [1.0]
    low, high = min(xs) / 2, max(xs) * 3
    top = max((value for _, value in peaks), default=math.inf)
    for name, value in lines:
        end = min(high, top / value)
        axes.plot([low, end], [low * value, end * value], color=GREY, linewidth=1.4)
        above = value == max(v for _, v in lines)
        at = end / 4 if above else min(6 * low, end)  # points crowd under the ridge, and few lie near the left end
        axes.annotate(
            f"{name} {bandwidth(value)}", (at, at * value), xytext=(-4, 6) if above else (6, -10),
            textcoords="offset points", ha="right" if above else "left", fontsize=8, color="#444",
        )  # fmt: skip
    slowest = min((value for _, value in lines), default=1.0)
    for name, value in peaks:
        axes.plot(
            [max(low, value / max((v for _, v in lines), default=slowest)), high],
            [value, value],
            color=GREY,
            linewidth=1.4,
        )
        axes.annotate(
            f"{name} {op_rate(value)}", (high, value), xytext=(4, -3), textcoords="offset points", fontsize=8,
            color="#444", annotation_clip=False,
        )  # fmt: skip
    _scatter(axes, points, "ops_per_byte", "ops_per_s")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second", xlim=(low, high))
    axes.legend(loc="lower right", title="hollow: held out", title_fontsize=8)
    return figure


@_styled
def accuracy(points: Sequence[Row], band: float = 0.1) -> "Figure":
    """Predicted over measured time, with a band of 10% either way; held-out points outside it are named.

    Parameters
    ----------
    points
        Rows `op`, `label`, `measured_s`, `predicted_s`, `error`, `held_out`.
    """
    figure, axes = _axes(height=5.2)
    times = [p["measured_s"] for p in points] or [1e-6, 1.0]
    low, high = min(times) / 2, max(times) * 2
    axes.fill_between([low, high], [low * (1 - band), high * (1 - band)], [low * (1 + band), high * (1 + band)],
                      color="#dfe7f2", linewidth=0, label=f"within {percent(band)}")  # fmt: skip
    axes.plot([low, high], [low, high], color=GREY, linewidth=0.8)
    _scatter(axes, points, "measured_s", "predicted_s")
    missed = sorted((p for p in points if p["held_out"] and abs(p["error"]) > band), key=lambda p: -abs(p["error"]))
    for p in missed[:6]:
        axes.annotate(
            f"{p['label']} {p['error']:+.0%}", (p["measured_s"], p["predicted_s"]), xytext=(6, -3),
            textcoords="offset points", fontsize=7, color="#333",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="measured", ylabel="predicted", xlim=(low, high), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: seconds(value))
    axes.legend(loc="upper left", title="hollow: held out", title_fontsize=8)
    return figure


@_styled
def errors(points: Sequence[Row]) -> "Figure":
    """Signed error of every held-out point by op, misses included: the band is 10% either way."""
    held_out = [p for p in points if p["held_out"]]
    figure, axes = _axes(height=3.6)
    groups = _series(held_out, "op")
    axes.axhspan(-0.1, 0.1, color="#dfe7f2", linewidth=0)
    axes.axhline(0, color=GREY, linewidth=0.8)
    for i, (_, colour, mark, members) in enumerate(groups):
        ordered = sorted(members, key=lambda p: p["measured_s"])
        step = 0.7 / max(len(ordered) - 1, 1)
        axes.plot([i - 0.35 + j * step for j in range(len(ordered))], [p["error"] for p in ordered], mark,
                  linestyle="none", color=colour, markersize=5, alpha=0.8)  # fmt: skip
    axes.set_xticks(range(len(groups)), [name for name, *_ in groups])
    axes.set(ylabel="predicted / measured - 1")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    axes.set_xlabel("held-out points, short calls on the left")
    return figure


@_styled
def widths(points: Sequence[Row]) -> "Figure":
    """Time over rows M on each weight shape: marks are measured, lines predicted.

    Parameters
    ----------
    points
        Rows `shape`, `m`, `measured_s`, `predicted_s`, of one op and one number of threads.
    """
    figure, axes = _axes()
    for name, colour, mark, members in _series(points, "shape"):
        ordered = sorted(members, key=lambda p: p["m"])
        axes.plot([p["m"] for p in ordered], [p["predicted_s"] for p in ordered], color=colour, linewidth=1.2)
        axes.plot([p["m"] for p in ordered], [p["measured_s"] for p in ordered], mark, linestyle="none", color=colour,
                  markersize=5, label=name)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="rows M (tokens in the batch)", ylabel="time of a call")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: seconds(value))
    axes.legend(title="N x K", title_fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


@_styled
def speedups(rows: Sequence[Row]) -> "Figure":
    """Speed-up of every set of techniques, with its interval; the product of the members' own is a hollow mark.

    Parameters
    ----------
    rows
        Rows `techniques` (names), `speedup`, `speedup_low`, `speedup_high`, `product` or None.
    """
    chosen = sorted((row for row in rows if row["techniques"]), key=lambda row: row["speedup"])
    figure, axes = _axes(height=max(2.4, 0.34 * len(chosen) + 1.0))
    for y, row in enumerate(chosen):
        colour = COLOURS[min(len(row["techniques"]) - 1, 2)]
        axes.plot([row["speedup_low"], row["speedup_high"]], [y, y], color=colour, linewidth=5, alpha=0.35,
                  solid_capstyle="butt")  # fmt: skip
        axes.plot(row["speedup"], y, "o", color=colour, markersize=6)
        if row["product"] is not None:
            axes.plot(row["product"], y, "D", markerfacecolor="none", markeredgecolor="#333", markersize=6)
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(chosen)), [" + ".join(row["techniques"]) for row in chosen])
    axes.set(xscale="log", xlabel="speed-up (90% interval); diamond: the product of the members' own")
    ends = [row[key] or 1.0 for row in chosen for key in ("speedup_low", "speedup_high", "product")]
    low, high = min([0.95, *(0.95 * v for v in ends)]), max([2.0, *(1.05 * v for v in ends)])
    axes.set_xlim(low, high)
    steps = (1, 1.5, 2, 3, 4, 6) if high / low < 20 else (1, 2, 5)
    ticks = [value * 10.0**power for power in range(-3, 6) for value in steps]
    axes.set_xticks([v for v in ticks if low <= v <= high], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    return figure


@_styled
def interactions(rows: Sequence[Row]) -> "Figure":
    """Heat map of the interaction index of every pair: below 1 they get in each other's way.

    Parameters
    ----------
    rows
        Rows `techniques` (names), `interaction`, `interaction_low`, `interaction_high`; those of two are drawn.
    """
    pairs = {tuple(row["techniques"]): row for row in rows if len(row["techniques"]) == 2}
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    figure, axes = _axes(height=max(2.6, 0.8 * len(names) + 1.2), width=max(4.2, 1.3 * len(names) + 1.6))
    from matplotlib.colors import TwoSlopeNorm

    grid = [[math.nan] * len(names) for _ in names]
    for (a, b), row in pairs.items():
        if row["interaction"] is not None:
            i, j = names.index(a), names.index(b)
            grid[max(i, j)][min(i, j)] = row["interaction"]
    known = [value for line in grid for value in line if not math.isnan(value)]
    spread = max([abs(math.log(value)) for value in known] + [0.1])
    norm = TwoSlopeNorm(1.0, math.exp(-spread), math.exp(spread))
    edges = [i - 0.5 for i in range(len(names) + 1)]
    axes.pcolormesh(edges, edges, np.ma.masked_invalid(grid), cmap="PuOr", norm=norm, edgecolors="white", linewidth=2)
    axes.grid(visible=False)
    for (a, b), row in pairs.items():
        i, j = names.index(a), names.index(b)
        if row["interaction"] is not None:
            text = f"{row['interaction']:.2f}\n[{row['interaction_low']:.2f}, {row['interaction_high']:.2f}]"
            dark = abs(math.log(row["interaction"])) > 0.6 * spread
            axes.text(
                min(i, j), max(i, j), text, ha="center", va="center", fontsize=9, color="white" if dark else "black"
            )
    axes.set_xticks(range(len(names) - 1), names[:-1])
    axes.set_yticks(range(1, len(names)), names[1:])
    axes.set(xlim=(-0.5, len(names) - 1.5), ylim=(len(names) - 0.5, 0.5))
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    return figure


@_styled
def svg(figure: "Figure") -> str:
    """The picture as an `<svg>` element that scales with its page: no prolog, no date, no fixed size."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    kept = [part for part in head.split("\n") if part.strip()]
    head = " ".join(kept)
    for name in ("width", "height"):
        at = head.index(f' {name}="')
        head = head[:at] + head[head.index('"', at + len(name) + 3) + 1 :]
    return f'{head} role="img">{rest}'.strip()


@_styled
def save(figure: "Figure", path: Path) -> None:
    """Writes SVG, PNG or PDF by the file's suffix, by rename.

    Raises
    ------
    ValueError
        Another suffix.
    """
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("svg", "png", "pdf"):
        raise ValueError(f"picture: expected a file name that ends in .svg, .png or .pdf, got {path.name!r}")
    partial = path.with_name(f".{path.name}.partial")
    metadata = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else {}
    figure.savefig(partial, format=kind, dpi=160, metadata=metadata)
    partial.replace(path)

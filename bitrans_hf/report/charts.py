"""Curves of a training log, and a chart of confusion counts."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from ..hub.errors import InputError
from .drawing import drawable


@dataclass(frozen=True)
class Curve:
    """Values (n,) over steps (n,)."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Curves in one frame. A noisy curve is drawn with its running mean."""

    title: str
    curves: Sequence[Curve]
    log_scale: bool = False
    smooth: bool = False


def charts_from_log(path: str | Path) -> list[Chart]:
    """Read the curves of a training log.

    Args:
        path: `log.jsonl`, one JSON object for each line with "step" and any of "loss", "class", "patch", "scc", "pac",
            "background", "foreground", "negative", "lr" (training) or "map_class", "map_patch", "map", "miou"
            (validation, in percent). If a step occurs twice, as after a resume, the later line counts. An incomplete
            last line is ignored.

    Returns:
        The charts that have data.
    """
    series: dict[str, dict[float, float]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        step = record.get("step", record.get("epoch"))
        for name, value in record.items():
            if step is not None and isinstance(value, int | float):
                series.setdefault(name, {})[float(step)] = float(value)

    def curves(names: Mapping[str, str]) -> list[Curve]:
        found = [(title, sorted(series[name].items())) for name, title in names.items() if name in series]
        return [Curve(title, [s for s, _ in points], [v for _, v in points]) for title, points in found]

    branches = {"class": "class tokens", "patch": "patch tokens"}
    pairs = {"background": "background pairs", "foreground": "object pairs", "negative": "unlike pairs"}
    terms = {**branches, "scc": "SCC", "pac": "PAC", **pairs}
    charts = [
        Chart("Loss", curves({"loss": "total"}), smooth=True),
        Chart("Terms of the loss", curves(terms), log_scale=True, smooth=True),
        Chart("Validation mAP (%)", curves({**{f"map_{key}": name for key, name in branches.items()}, "map": "tags"})),
        Chart("Validation mIoU (%)", curves({"miou": "one scale"})),
        Chart("Learning rate", curves({"lr": "learning rate"})),
    ]
    return [chart for chart in charts if chart.curves]


def confusion_picture(counts: npt.NDArray[np.integer], rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Draw confusion counts as shares of each true label; the diagonal shows correct pixels.

    Args:
        counts: Pixel counts (R, C), rows are true labels.
        rows: Names of the R true labels.
        columns: Names of the C predicted labels.

    Returns:
        An RGB image. With up to 25 labels the shares stand in the cells, in percent; a label that is in no target
        has an empty row.

    Raises:
        ValueError: the numbers of names and of counts differ.
    """
    if counts.shape != (len(rows), len(columns)):
        raise InputError(f"counts have shape {counts.shape}, expected {(len(rows), len(columns))} for these names.")
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(100.0 * counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
    few = len(columns) <= 25
    side = max(3.5, 1.6 + 0.36 * len(columns)) if few else 2.0 + 0.17 * len(columns)
    figure = Figure(figsize=(side, side), dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    # The root of a share, because most confusions are below ten percent and would all look like none.
    axes.imshow(np.sqrt(shares / 100.0), cmap="Blues", vmin=0, vmax=1)
    size = 8 if few else 6
    axes.set_xticks(range(len(columns)), [_plot_text(name) for name in columns], fontsize=size, rotation=90)
    axes.set_yticks(range(len(rows)), [_plot_text(name) for name in rows], fontsize=size)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted", fontsize=size + 1)
    axes.set_ylabel("true", fontsize=size + 1)
    axes.set_title("Share of each true label, %", loc="left", fontsize=size + 2, fontweight="bold")
    for (row, column), share in np.ndenumerate(shares):
        if few and share >= 0.5:
            color = "white" if share > 40 else "#1d2329"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color=color)
    for edge in axes.spines.values():
        edge.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def draw_chart(chart: Chart, *, dark: bool) -> Image.Image:
    """Draw a chart of 800 x 480 pixels without pyplot, which keeps global state and may need a display."""
    ink, soft, paper = ("#e6e9ec", "#3a424a", "#14171a") if dark else ("#1d2329", "#e2e6ea", "#ffffff")
    colors = ["#4c86f0", "#e8853a", "#2fa577", "#c05fb0"]
    figure = Figure(figsize=(5, 3), dpi=160, facecolor=paper, layout="constrained")
    axes = figure.add_subplot(facecolor=paper)
    for index, curve in enumerate(chart.curves):
        color = colors[index % len(colors)]
        steps, values = np.asarray(curve.steps, dtype=float), np.asarray(curve.values, dtype=float)
        window = max(1, values.size // 30)
        if chart.smooth and window > 1:
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.35)
            steps, values = (np.convolve(a, np.full(window, 1 / window), "valid") for a in (steps, values))
        marker = "o" if values.size <= 30 and not chart.smooth else ""
        axes.plot(steps, values, color=color, linewidth=1.6, marker=marker, markersize=3.5, label=curve.name)
    if chart.log_scale and any(value > 0 for curve in chart.curves for value in curve.values):
        axes.set_yscale("log")
    axes.set_title(chart.title, loc="left", fontsize=10, fontweight="bold", color=ink)
    axes.set_xlabel("step", fontsize=8, color=ink)
    axes.tick_params(labelsize=8, colors=ink, length=0, which="both")
    axes.grid(color=soft, linewidth=0.6)
    for side in axes.spines.values():
        side.set_visible(False)
    if len(chart.curves) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=ink)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _plot_text(text: str) -> str:
    """Escape a text for matplotlib, which reads text between dollar signs as a formula."""
    return drawable(text).replace("$", r"\$")

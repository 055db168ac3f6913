"""The plots of a report, drawn with matplotlib as PNG. Their colours are readable on white and on black."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from analysis.report.calibration import BINS, Calibration
from analysis.report.decomposition import Part

WIDTH = 6.0  # inches; narrow, so that its text is readable on a phone
BLUE, ORANGE, GREY = "#4c8fd0", "#d9822b", "#8a8f94"


def new_figure(height: float, *, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure with a transparent background and grey text, and its axes in a row."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for each in axes:
        each.patch.set_alpha(0)
        each.tick_params(colors=GREY, labelsize=8)
        each.spines[:].set_color(GREY)
        for label in (each.xaxis.label, each.yaxis.label, each.title):
            label.set_color(GREY)
            label.set_fontsize(9)
        each.grid(alpha=0.3, color=GREY)
    return figure, axes


def data_url(figure: Figure, *, dpi: int = 160) -> str:
    """Return a figure as a data URL of a PNG image."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def learning_curves(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Return loss and accuracy of train and val over the epochs, from the lines of metrics.jsonl."""
    figure, axes = new_figure(2.6, columns=2)
    for each, name in zip(axes, ("loss", "accuracy"), strict=True):
        for split, colour, style in (("train", BLUE, "--"), ("val", ORANGE, "-"), ("train_dev", GREY, "-.")):
            points = [
                (line["epoch"], line[f"{split}/{name}"])
                for line in lines
                if isinstance(line.get(f"{split}/{name}"), int | float)
            ]
            if points:
                each.plot(*zip(*points, strict=True), style, color=colour, label=split, marker=".", markersize=3)
        each.set(xlabel="epoch", ylabel=name)
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
        if each.get_legend_handles_labels()[0]:
            legend = each.legend(fontsize=8, framealpha=0)
            for text in legend.get_texts():
                text.set_color(GREY)
    return figure


def error_parts(parts: Sequence[Part]) -> Figure:
    """Return the parts of the error as horizontal bars with their 95% intervals."""
    figure, (axes,) = new_figure(0.7 + 0.4 * len(parts))
    names = [part.name for part in parts][::-1]
    sizes = [part.size for part in parts][::-1]
    margins = [part.margin for part in parts][::-1]
    axes.barh(names, sizes, xerr=margins, color=BLUE, ecolor=GREY, capsize=3)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.set_xlabel("share of the images")
    return figure


def metric_of_seeds(values: Mapping[str, Mapping[int, float]], metric: str) -> Figure:
    """Return a metric of each run: one row per experiment, one dot per seed, and the mean as a line."""
    figure, (axes,) = new_figure(0.9 + 0.4 * len(values))
    for row, by_seed in enumerate(values.values()):
        axes.plot(list(by_seed.values()), [row] * len(by_seed), "o", color=BLUE, alpha=0.7)
        axes.plot([sum(by_seed.values()) / len(by_seed)] * 2, [row - 0.3, row + 0.3], color=ORANGE, linewidth=2)
    axes.set_yticks(range(len(values)), [name[:40] for name in values], parse_math=False)
    axes.set(xlabel=metric, ylim=(len(values) - 0.5, -0.5))
    return figure


def reliability_diagram(calibration: Calibration) -> Figure:
    """Return accuracy over predicted probability: bars on the diagonal are calibrated."""
    figure, (axes,) = new_figure(3.2)
    centres = (np.arange(BINS) + 0.5) / BINS
    axes.bar(centres, np.nan_to_num(calibration.accuracy), width=0.9 / BINS, color=BLUE)
    axes.plot([0, 1], [0, 1], "--", color=GREY)
    axes.set(xlabel="probability of the predicted class", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    return figure


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Return counts (K, K) as an image: one row per label, one column per predicted class; numbers up to 20 classes."""
    count = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(WIDTH, 2.5 + 0.3 * count)
    figure, (axes,) = new_figure(side)
    axes.grid(visible=False)
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="label")
    if count <= 20:
        names = [name[:14] for name in class_names]
        axes.set_xticks(range(count), names, rotation=90, parse_math=False)
        axes.set_yticks(range(count), names, parse_math=False)
        for row, column in zip(*counts.nonzero(), strict=True):
            colour = "white" if shares[row, column] > 0.3 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=7)
    return figure


def contact_sheet(images: np.ndarray, titles: Sequence[str]) -> Figure:
    """Return images, uint8 (N, H, W, C) with C = 1 or 3, in rows of six, each below its title."""
    columns = 6
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(WIDTH, 1.4 * rows), layout="constrained")
    figure.patch.set_alpha(0)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, image, title in zip(panels, images, titles, strict=False):
        axes.imshow(image.squeeze(2) if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=6.5, color=GREY, parse_math=False)
    return figure

"""Figures of runs and of data, drawn with matplotlib. Each function returns a figure; `save` writes it to a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

WIDTH = 9.0  # inches


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file. The suffix of the path selects the format: .png, .svg or .pdf."""
    figure.savefig(path, dpi=100, facecolor="white")


def learning_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> Figure:
    """Draw the metrics train/NAME (dashed) and val/NAME (solid) of runs over their steps.

    `runs` maps the label of a run to the lines of its metrics.jsonl. Lines without the metric are skipped.
    """
    figure = Figure(figsize=(WIDTH, 5), layout="constrained")
    axes = figure.subplots()
    for index, (run, lines) in enumerate(runs.items()):
        for split, style in (("train", {"linewidth": 1, "linestyle": "--"}), ("val", {"linewidth": 2})):
            points = [(line["step"], line[key]) for line in lines if (key := f"{split}/{name}") in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=f"C{index % 10}", label=f"{run} {split}", **style)
    axes.set(xlabel="step", ylabel=name)
    axes.grid(alpha=0.3)
    axes.legend(ncols=2 if len(runs) > 1 else 1, fontsize="small")
    return figure


def image_table(images: np.ndarray, *, rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """Draw images, uint8 (R, K, H, W, C) with C = 1 or 3, as a table of R named rows and K named columns."""
    count = len(columns)
    side = WIDTH / (count + 1)
    figure = Figure(figsize=(WIDTH, side * len(rows) + 0.4), layout="constrained")
    for row, axes_of_row in enumerate(figure.subplots(len(rows), count, squeeze=False)):
        for column, axes in enumerate(axes_of_row):
            image = images[row, column]  # (H, W, C)
            axes.imshow(
                image if image.shape[2] == 3 else image[:, :, 0],
                cmap="gray",
                vmin=0,
                vmax=255,
                interpolation="nearest",
            )
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(columns[column], fontsize="small")
        name = axes_of_row[0].set_ylabel(rows[row][:16], rotation=0, ha="right", va="center", fontsize="small")
        name.set_parse_math(False)  # a dollar sign in a name must not start a formula
    return figure


def class_counts(counts: Mapping[str, Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Draw the number of samples of each class as bars, one panel per split. `counts` maps a split to K numbers."""
    figure = Figure(figsize=(WIDTH, 1.8 * len(counts) + 0.6), layout="constrained")
    panels = figure.subplots(len(counts), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (split, numbers) in zip(panels, counts.items(), strict=True):
        axes.bar(range(len(numbers)), numbers)
        axes.set(ylabel=split, ylim=(0, None))
        axes.grid(alpha=0.3, axis="y")
    if len(class_names) <= 20:
        labels = [name[:12] for name in class_names]
        panels[-1].set_xticks(range(len(labels)), labels, rotation=30, ha="right", parse_math=False)
    else:
        panels[-1].set_xlabel("class")
    return figure


def learning_rate_curves(curves: Mapping[str, Sequence[float]], *, steps_per_epoch: int) -> Figure:
    """Draw the learning rate of each parameter group over the epochs. `curves` has one value per step of the run."""
    figure = Figure(figsize=(WIDTH, 3), layout="constrained")
    axes = figure.subplots()
    for group, values in curves.items():
        axes.plot(np.arange(len(values)) / steps_per_epoch, values, label=group)
    axes.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize="small")
    return figure

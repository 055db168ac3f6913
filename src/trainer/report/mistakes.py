"""Figures for TensorBoard at the end of a run: the confusion matrix of the test split and its worst mistakes."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.inference.evaluation import Predictions, count_confusions, worst_mistakes
from trainer.interfaces import EvalBatches
from trainer.report.recorder import Recorder

MAX_CLASSES = 100  # of a confusion matrix: a cell of a larger one is hardly visible
MAX_NUMBERS = 20  # classes up to which the cells have numbers, and the names are shown
MAX_MISTAKES = 24


def record_mistakes(
    predictions: Predictions, loader: EvalBatches, class_names: Sequence[str], recorder: Recorder, *, step: int
) -> None:
    """Write `test/confusion_matrix` and `test/worst_mistakes` to TensorBoard.

    The worst mistakes are the wrong predictions with the highest probabilities. If a figure cannot be drawn, a warning
    is recorded: the run is complete without it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of matplotlib, about characters that its font lacks
            figures = figures_of(predictions, loader, class_names)
        for name, figure in figures.items():
            recorder.figure(f"test/{name}", figure, step=step)
    except Exception as exception:
        text = f"no figures of the mistakes in TensorBoard: {type(exception).__name__}: {exception}"
        recorder.warn(text, step=step)


def figures_of(predictions: Predictions, loader: EvalBatches, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the figures by name; no confusion matrix of more than MAX_CLASSES, and no mistakes if there are none."""
    figures = {}
    predicted, probability, labels = predictions.read()
    count = len(class_names)
    if count <= MAX_CLASSES:
        figures["confusion_matrix"] = confusion_matrix(count_confusions(labels, predicted, count), class_names)
    worst = worst_mistakes(predicted, probability, labels, most=MAX_MISTAKES)
    if len(worst):
        titles = [
            f"{class_names[label][:14]}\nnot {class_names[guess][:14]} ({share:.0%})"
            for label, guess, share in zip(labels[worst], predicted[worst], probability[worst].tolist(), strict=True)
        ]
        pixels = loader.read_pixels(worst).float().round().clamp(0, 255).to(torch.uint8).cpu()  # (R, C, H, W)
        figures["worst_mistakes"] = contact_sheet(pixels, titles)
    return figures


def confusion_matrix(counts: Tensor, class_names: Sequence[str]) -> Any:
    """Return a figure of counts (K, K): one row per label, one column per predicted class.

    The colour of a cell is the square root of its share of the row, so that rare mistakes are visible.
    """
    from matplotlib.colors import PowerNorm  # only here: importing matplotlib takes half a second
    from matplotlib.figure import Figure

    count = len(counts)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = 4 + 0.3 * min(count, MAX_NUMBERS)  # inches
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    axes.set(xlabel="predicted class", ylabel="label")
    if count <= MAX_NUMBERS:
        names = [name[:16] for name in class_names]
        axes.set_xticks(range(count), names, rotation=90, parse_math=False)
        axes.set_yticks(range(count), names, parse_math=False)
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.4 else "black"
            text = str(int(counts[row, column]))
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize="small")
    return figure


def contact_sheet(images: Tensor, titles: Sequence[str]) -> Any:
    """Return a figure of images, uint8 (N, C, H, W) with C = 1 or 3, in rows of six, each below its title."""
    from matplotlib.figure import Figure

    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.9 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, title in zip(figure.axes, images, titles, strict=False):
        axes.imshow(image.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize="small", parse_math=False)
    return figure

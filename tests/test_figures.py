"""Figures: drawn from plain arrays and dicts, for any names and sizes."""

import numpy as np
from PIL import Image

from analysis.figures import class_counts, image_table, learning_curves, learning_rate_curves, save


def test_every_figure_is_drawn_for_unusual_names(tmp_path):
    names = [r"cost $\foo$", "[red]a", "plain"]
    lines = [{"step": step, "train/loss": 1 / step, "val/loss": 2 / step} for step in (1, 2, 3)]
    figures = {
        "table": image_table(np.zeros((3, 2, 1, 1, 3), dtype=np.uint8), rows=names, columns=["original", "epoch 0"]),
        "grey": image_table(np.zeros((3, 2, 5, 5, 1), dtype=np.uint8), rows=names, columns=["original", "epoch 0"]),
        "counts": class_counts({"train": [3, 0, 1], "test": [1, 1, 1]}, names),
        "many": class_counts({"train": [1] * 100}, [str(number) for number in range(100)]),
        "curves": learning_curves({"one": lines, "two": lines[:1]}, "loss"),
        "learning rates": learning_rate_curves({"all": [0.1, 0.2], "no_decay": [0.1, 0.1]}, steps_per_epoch=2),
    }
    for name, figure in figures.items():
        save(figure, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 100
            assert len(image.convert("L").getcolors(2**16)) > 1  # not blank


def test_learning_curves_contain_the_logged_metrics():
    lines = [{"step": 10, "train/loss": 0.5, "val/loss": 0.7}, {"step": 20, "train/loss": 0.25, "val/loss": 0.6}]
    (axes,) = learning_curves({"run": [*lines, {"step": 30, "train/loss": 0.2}]}, "loss").axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {"run train": [[10, 0.5], [20, 0.25], [30, 0.2]], "run val": [[10, 0.7], [20, 0.6]]}


def test_image_table_shows_the_pixels():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, 3, 4, 4, 3), dtype=np.uint8)
    figure = image_table(images, rows=["a", "b"], columns=["x", "y", "z"])
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert all(np.array_equal(array, image) for array, image in zip(shown, images.reshape(6, 4, 4, 3)))

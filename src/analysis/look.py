"""Preview of a training, without training: class counts, layers, augmented images and the learning rate.

config -> objects of a training -> table and figures -> folder with image files and a TensorBoard event file
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from analysis.figures import class_counts, image_table, learning_rate_curves, save
from analysis.layers import Layer, csv_of, layers_of, table_of, total_of
from core.config import Config
from core.durable import write_durably
from core.errors import StorageError
from core.options.declarations import TrainConfig
from data.loading.loaders import TrainLoader
from data.sources.pixels import resize
from data.sources.splits import Splits
from trainer.build.training import build
from trainer.device import configure_torch
from trainer.storage.run_folder import chosen_path
from trainer.training import Training

EPOCHS = 9  # augmented versions of each image
MAX_CLASSES = 20  # classes with a row of images
MAX_POINTS = 1000  # points of a learning rate curve in TensorBoard, approximately


def look_at(config: Config[TrainConfig]) -> None:
    """Build the training of a config, write figures of its input to a new folder, and print the class counts.

    Raises ConfigError for the config of a resumed run, and StorageError if the folder exists or cannot be created.
    """
    values = config.values
    config.require_new_run("look.py")
    configure_torch(values["trainer"])
    training, splits = build(config)
    loader = training.train_loader
    assert isinstance(loader, TrainLoader)
    counts = splits.class_counts
    curves = learning_rates(training)
    figures = {
        "images": image_table(**augmented_images(loader, splits, image_size=values["data"]["image_size"])),
        "classes": class_counts(counts, splits.class_names),
        "lr": learning_rate_curves(curves, steps_per_epoch=loader.steps_per_epoch),
    }
    layers = layers_of(training.state.model, (values["data"]["channels"], *[values["data"]["image_size"]] * 2))
    folder = chosen_path(config, name=f"look-{values['choices']['data']}")
    write(figures, curves, folder)
    write_durably(folder / "layers.csv", csv_of(layers).encode())
    show(counts, splits.class_names)
    show_layers(training.state.model, layers)
    print(f"{', '.join(f'{name}.png' for name in figures)}, layers.csv and a TensorBoard event file are in {folder}")


def write(figures: Mapping[str, Figure], curves: Mapping[str, list[float]], folder: Path) -> None:
    """Create a folder with the figures as PNG files, and with figures and learning rates for TensorBoard.

    `curves` maps a parameter group to its learning rate at each step. Raises StorageError if the folder exists or
    cannot be created.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise StorageError(str(folder), "exists already; choose another run_dir") from None
    except OSError as exception:
        raise StorageError(str(folder), f"cannot be created: {exception.strerror}") from None
    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            save(figure, folder / f"{name}.png")
            writer.add_figure(f"look/{name}", figure, close=False)
        for group, curve in curves.items():
            for step in range(0, len(curve), max(1, len(curve) // MAX_POINTS)):
                writer.add_scalar(f"lr/{group}", curve[step], step)


def learning_rates(training: Training) -> dict[str, list[float]]:
    """Return the learning rate of each parameter group at every step: {group: one value per step}.

    Schedules that react to a metric get none, so their curves show no reaction.
    """
    state, optimizer = training.state, training.state.optimizer
    curves: dict[str, list[float]] = {group["name"]: [] for group in optimizer.param_groups}
    for step in range(training.settings.total_steps):
        state.schedule.apply(optimizer, step)
        for group in optimizer.param_groups:
            curves[group["name"]].append(group["lr"])
    return curves


def augmented_images(loader: TrainLoader, splits: Splits, *, image_size: int) -> dict[str, Any]:
    """Return the arguments of `image_table`: images, uint8 (classes, 1 + EPOCHS, H, W, C), names of rows and columns.

    A row shows the first training image of a class, without augmentation and as augmented in each of the first epochs.
    """
    labels = splits.train.labels
    present = labels.unique().tolist()[:MAX_CLASSES]
    chosen = torch.tensor([int((labels == label).nonzero()[0]) for label in present])
    versions = [resize(splits.train.read(chosen), image_size=image_size, fit="resize")]  # each (classes, C, H, W)
    for epoch in range(EPOCHS):
        (batch,) = loader.read_augmented([chosen], epoch)
        versions.append(batch.images.float().round().clamp(0, 255).to(torch.uint8).cpu())
    images = torch.stack(versions, dim=1)  # (classes, 1 + EPOCHS, C, H, W)
    return {
        "images": images.permute(0, 1, 3, 4, 2).numpy(),
        "rows": [splits.class_names[label] for label in present],
        "columns": ["original", *(f"epoch {epoch + 1}" for epoch in range(EPOCHS))],
    }


def show_layers(model: nn.Module, layers: list[Layer]) -> None:
    """Print the table of layers, and how many parameters evaluation does not use."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table_of(layers))
    parameters, unused = total_of(model, layers)
    if unused:
        console.print(f"{unused:,} of {parameters:,} parameters are those of auxiliary heads, used in training only")


def show(counts: Mapping[str, list[int]], class_names: list[str]) -> None:
    """Print a table of the number of samples: one row per class, one column per split."""
    table = Table("class", title="Samples", title_justify="left")
    for split in counts:
        table.add_column(split, justify="right")
    for index, name in enumerate(class_names):
        table.add_row(escape(name), *(f"{numbers[index]:,}" for numbers in counts.values()))
    table.add_section()
    table.add_row("all", *(f"{sum(numbers):,}" for numbers in counts.values()))
    Console().print(table)

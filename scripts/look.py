"""Look at what a training would see, without training: the same command line as train.py's.

    scripts/look.py data=cifar10 augment=[crop_flip,mixup] schedule=one_cycle

Prints the class counts of each split, and writes into run_dir (null: outputs/<date>_<time>-look-<data>)

    pictures.png   a row a class: a training picture as it is, then as the first epochs show it
    classes.png    the class counts
    rate.png       the learning rate over the run

and the same for TensorBoard.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from core.command_line import launch
from core.config import Config
from core.errors import ConfigError, StorageError
from core.schema import SPLITS, TRAIN

if TYPE_CHECKING:
    from data.sources.splits import Splits
    from trainer.loop import Trainer

EPOCHS = 9  # augmented versions of each picture
MAX_CLASSES = 20  # rows of pictures
MAX_CURVE = 1000  # points of the learning rate in TensorBoard


def look(config: Config) -> None:
    """Assemble the training, draw what it would see, print where."""
    from torch.utils.tensorboard import SummaryWriter

    from analysis.figures import class_counts, picture_table, rate_curve, save
    from trainer.build.training import assemble
    from trainer.storage.run_folder import chosen_path

    values = config.values
    if config.from_run:
        raise ConfigError("resume", "is for train.py; look takes the config of a new run", value=values["resume"])
    trainer, splits, _ = assemble(config)
    counts = count_classes(splits)
    rates = learning_rates(trainer)
    figures = {
        "pictures": picture_table(**augmented_pictures(trainer, splits)),
        "classes": class_counts(counts, splits.class_names),
        "rate": rate_curve(rates, steps_per_epoch=trainer.train_loader.steps_per_epoch),
    }

    folder = chosen_path(values["run_dir"], job=config.job, names=("look", values["choices"]["data"]))
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise StorageError(str(folder), "exists already; choose another run_dir") from None
    except OSError as exception:
        raise StorageError(str(folder), f"cannot be made: {exception.strerror}") from None
    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            save(figure, folder / f"{name}.png")
            writer.add_figure(f"look/{name}", figure, close=False)
        for group, curve in rates.items():
            for step in range(0, len(curve), max(1, len(curve) // MAX_CURVE)):
                writer.add_scalar(f"rate/{group}", curve[step], step)
    show(counts, splits.class_names)
    print(f"{', '.join(f'{name}.png' for name in figures)} and TensorBoard's events in {folder}")


def count_classes(splits: "Splits") -> dict[str, list[int]]:
    """Samples of each class, by split."""
    count = len(splits.class_names)
    parts = {split: getattr(splits, split) for split in SPLITS}
    return {split: part.labels.bincount(minlength=count).tolist() for split, part in parts.items() if part}


def learning_rates(trainer: "Trainer") -> dict[str, list[float]]:
    """The rate of each group of parameters at every step; a schedule that watches a metric sees none here."""
    rates: dict[str, list[float]] = {group["name"]: [] for group in trainer.optimizer.param_groups}
    for step in range(trainer.settings.total_steps):
        trainer.schedule.apply(trainer.optimizer, step)
        for group in trainer.optimizer.param_groups:
            rates[group["name"]].append(group["lr"])
    return rates


def augmented_pictures(trainer: "Trainer", splits: "Splits") -> dict[str, Any]:
    """The first picture of each class, and what the epochs make of it: (classes, 1 + EPOCHS, H, W, C), and names."""
    import torch

    from data.loading.loaders import TrainLoader
    from data.sources.splits import resize

    loader = cast(TrainLoader, trainer.train_loader)
    labels = splits.train.labels
    present = labels.unique().tolist()[:MAX_CLASSES]
    chosen = torch.tensor([int((labels == label).nonzero()[0]) for label in present])
    size = trainer.record["data"]["image_size"]
    versions = [resize(splits.train.read(chosen), image_size=size, fit="resize")]  # each (classes, C, H, W)
    for epoch in range(EPOCHS):
        (batch,) = loader.show([chosen], epoch)
        versions.append(batch.images.float().round().clamp(0, 255).to(torch.uint8).cpu())
    pictures = torch.stack(versions, dim=1)  # (classes, 1 + EPOCHS, C, H, W)
    return {
        "pictures": pictures.permute(0, 1, 3, 4, 2).numpy(),
        "rows": [splits.class_names[label] for label in present],
        "columns": ["as it is", *(f"epoch {epoch}" for epoch in range(EPOCHS))],
    }


def show(counts: Mapping[str, list[int]], class_names: list[str]) -> None:
    """The counts as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("class", title="Samples", title_justify="left")
    for split in counts:
        table.add_column(split, justify="right")
    for index, name in enumerate(class_names):
        table.add_row(escape(name), *(f"{numbers[index]:,}" for numbers in counts.values()))
    table.add_section()
    table.add_row("all", *(f"{sum(numbers):,}" for numbers in counts.values()))
    Console().print(table)


if __name__ == "__main__":
    launch(look, config_name="train", rules=TRAIN)

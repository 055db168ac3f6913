"""Benchmarks `loader`, `folder` and `evaluation`: batches without training."""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from contenders import DATA, Seen, assembled, data_loader
from tables import Line
from turns import BATCH, CASES, CPU, epoch_of, in_turns, race

AUGMENTATIONS = ("none", "flip", "crop_flip", "affine", "color_shift", "erasing", "mixup", "cutmix")


def loading(loader: Any) -> Callable[[Seen], object]:
    """Return a contender that reads the batches of one epoch after another."""

    def read(seen: Seen) -> None:
        for epoch in itertools.count():
            for step in loader.steps(epoch):
                for batch in step:
                    seen(len(batch.labels))

    return read


def repeating(batches: Any) -> Callable[[Seen], object]:
    """Return a contender that reads a DataLoader again and again."""

    def read(seen: Seen) -> None:
        while True:
            for _, labels in batches:
                seen(len(labels))

    return read


def bench_loader(options: argparse.Namespace) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for name in AUGMENTATIONS:
        training = assembled("data=cifar10", "model=mlp", f"augment={name}", *CPU)
        readings = {"ours": loading(training.train_loader)}
        if name == "crop_flip":
            readings["DataLoader, 2 workers"] = repeating(data_loader(training, augment=True, workers=2))
        lines[f"CIFAR-10, {name}"] = race(readings, of="ours", rounds=options.rounds, seconds=options.seconds)
    return lines


def bench_folder(options: argparse.Namespace) -> dict[str, Line]:
    import torch

    from data.sources.image_folder import image_folder
    from data.sources.images import Images, with_cache

    root = DATA / "imagenette-mini"
    if not root.exists():
        return {}
    train = image_folder(root=str(root), image_size=112, channels=3, test_fraction=0, empty_class="error").train
    rows = torch.randperm(len(train)).split(BATCH)
    with tempfile.TemporaryDirectory() as folder:
        cached = Images(with_cache(train.pixels, Path(folder)), train.labels)  # type: ignore[arg-type]
        kinds = {"decoded by threads": train.load, "cached": lambda: [cached.fetch(batch) for batch in rows]}
        turns = {kind: partial(epoch_of, len(train), read) for kind, read in kinds.items()}
        throughput = in_turns(turns, rounds=min(options.rounds, 5), seconds=0)
    return {f"{len(train):,} photographs at 112 pixels": {"unit": "samples/s", "of": "cached", **throughput}}


def bench_evaluation(options: argparse.Namespace) -> dict[str, Line]:
    import torch

    from trainer.inference.evaluation import evaluate

    lines: dict[str, Line] = {}
    for name, overrides in CASES.items():
        if "crop_flip" in name or options.only.lower() not in name.lower():
            continue
        training = assembled(*overrides)
        images = next(iter(training.val_loader)).images

        def forward(seen: Seen, model: Any = training.state.model, images: Any = images) -> None:
            model.eval()
            while True:
                model(images)
                seen(len(images))

        def evaluating(seen: Seen, training: Any = training) -> None:
            def counted_batches() -> Any:
                for batch in training.val_loader:
                    yield batch
                    seen(len(batch.labels))

            while True:
                evaluate(training.state.model, training.loss_function, counted_batches(), autocast=training.autocast)

        contenders: dict[str, Callable[[Seen], object]] = {"limit": forward, "ours": evaluating}
        with torch.inference_mode():  # around both: a mode that one contender sets would also apply to the other
            lines[name] = race(contenders, of="ours", rounds=options.rounds, seconds=options.seconds)
    return lines

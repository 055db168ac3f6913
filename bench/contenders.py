"""Contenders of `bench/bench.py`: the trainer, its limit, a plain loop, Lightning and fastai.

Each contender is a function that trains without end and calls `seen(samples)` after each step. `turns.Contender` lets
the contenders alternate.
"""

import io
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("PRECEPTOR_DATA", "datasets"))
Seen = Callable[[int], None]  # called with the number of samples of each step


# Preceptor


def composed(*overrides: str) -> Any:
    """Return a config as the command line composes it, with synthetic data if the official data set is missing."""
    from core.composition import compose_config
    from core.options.declarations import TrainConfig

    folders = {"data=mnist": "MNIST", "data=cifar10": "cifar-10-batches-py"}
    sizes = {"data=mnist": ("28", "1"), "data=cifar10": ("32", "3")}
    name, *others = overrides
    arguments = [name]
    if name in folders and not (DATA / folders[name]).exists():
        size, channels = sizes[name]
        arguments = [
            "data=synthetic",
            f"data.image_size={size}",
            f"data.channels={channels}",
            "data.train_samples=2000",
        ]
    arguments += ["trainer.log_graph=false", "trainer.log_images=false", "trainer.checkpoint.monitor=null"]
    arguments += [
        "trainer.evaluate_every=1000 epochs",
        "trainer.early_stopping.patience=null",
        "trainer.max_epochs=1000",
    ]
    return compose_config("train", [*arguments, *others], TrainConfig)


def assembled(*overrides: str) -> Any:
    """Build a training that has no run folder."""
    from trainer.build.training import build
    from trainer.device import configure_torch

    config = composed(*overrides)
    configure_torch(config.values["trainer"])
    return build(config)[0]


@contextmanager
def whole_run(*overrides: str) -> Iterator[Any]:
    """Yield a run; its folder is removed at the end."""
    from trainer.run import Run

    with tempfile.TemporaryDirectory() as folder:
        config, path = composed(*overrides), {"run_dir": f"{folder}/run"}
        with redirect_stdout(io.StringIO()):
            run = Run.create(replace(config, values=config.values | path, record=config.record | path))
        run.recorder.display.console.quiet = True
        with run:
            yield run


def preceptor(run: Any) -> Callable[[Seen], object]:
    """Return the contender that is the trainer itself, with run folder and logs."""
    conclude, clock = run.loop.conclude, run.state.clock

    def train(seen: Seen) -> None:
        last_count = 0

        def conclude_and_count() -> str | None:
            nonlocal last_count
            reason: str | None = conclude()
            samples, last_count = clock.samples - last_count, clock.samples
            seen(samples)
            return reason

        run.loop.conclude = conclude_and_count
        run.loop.fit()

    return train


def bare(training: Any, *, one_batch: bool) -> Callable[[Seen], object]:
    """Return a bare loop over Preceptor's batches, with its model, loss and optimizer.

    With `one_batch`, the loop repeats the first batch: this is the limit.
    """
    model, optimizer = training.state.model, training.state.optimizer

    def train(seen: Seen) -> None:
        model.train()
        for epoch in itertools.count():
            steps = training.train_loader.steps(epoch)
            for step in itertools.repeat(next(iter(steps))) if one_batch else steps:
                for images, labels, _ in step:
                    with training.autocast:
                        loss = training.loss_function(training.step.forward(images), labels)
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                seen(len(labels))

    return train


# Other frameworks, with the usual data pipeline: a Dataset of images, torchvision's transforms, a DataLoader


def data_loader(training: Any, *, augment: bool, workers: int) -> Any:
    """Return a DataLoader of the train split of a training; the split must be in memory."""
    source = training.train_loader.source
    images = source.pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    batch_size, pin_memory = training.train_loader.batch_size, training.device.type == "cuda"
    return loader_of(
        images, source.labels.tolist(), batch_size=batch_size, augment=augment, workers=workers, pin_memory=pin_memory
    )


def loader_of(
    images: Any, labels: list[int], *, batch_size: int, augment: bool, workers: int, pin_memory: bool = False
) -> Any:
    """Return a DataLoader of uint8 images (N, H, W, C)."""
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    size, channels = images.shape[1], images.shape[3]
    crop = [transforms.RandomCrop(size, padding=size // 8), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose(
        [
            transforms.ToPILImage(),
            *(crop if augment else []),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * channels, (0.25,) * channels),
        ]
    )

    class ImageSet(Dataset[Any]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> Any:
            return transform(images[index]), labels[index]

    return DataLoader(
        ImageSet(),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


def plain(model: Any, batches: Any, *, compiled: bool = False) -> Callable[[Seen], object]:
    """Return a plain training loop over a DataLoader, on the device of the model."""
    import torch

    device = next(model.parameters()).device
    forward = torch.compile(model) if compiled else model

    def train(seen: Seen) -> None:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        while True:
            for images, labels in batches:
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(forward(images), labels).backward()
                optimizer.step()
                seen(len(labels))

    return train


def lightning(model: Any, batches: Any) -> Callable[[Seen], object]:
    """Return a training by Lightning's Trainer, without logs and checkpoints."""
    import logging
    import warnings

    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> Any:
            images, labels = batch
            return torch.nn.functional.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    class SampleCounter(Callback):
        def __init__(self, seen: Seen) -> None:
            self.seen = seen

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.seen(len(batch[1]))

    def train(seen: Seen) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning")
        trainer = Trainer(
            max_epochs=-1,
            accelerator="gpu" if next(model.parameters()).is_cuda else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[SampleCounter(seen)],
        )
        trainer.fit(Module(), batches)

    return train


def fastai(model: Any, batches: Any) -> Callable[[Seen], object]:
    """Return a training by fastai's Learner, without a progress bar."""
    import torch
    from fastai.callback.core import Callback, CancelValidException
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import SGD

    class SampleCounter(Callback):
        def __init__(self, seen: Seen) -> None:
            self.seen = seen

        def after_batch(self) -> None:
            self.seen(len(self.y))

        def before_validate(self) -> None:
            raise CancelValidException

    def train(seen: Seen) -> None:
        loss = torch.nn.functional.cross_entropy
        update = partial(SGD, mom=0.9, wd=1e-4, decouple_wd=False)
        learner = Learner(DataLoaders(batches, batches, device="cpu"), model, loss_func=loss, opt_func=update)
        learner.fit(10**6, lr=0.01, cbs=[SampleCounter(seen)])

    return train


PEERS = {"Lightning": lightning, "fastai": fastai}  # the extra `bench`; left out if not installed

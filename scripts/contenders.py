"""Who `scripts/bench.py` lets run against each other: ours, its limit, a plain loop, Lightning and fastai.

Each is a function that trains for ever and calls `seen(samples)` after each step. A `Contender` is a greenlet: it moves
only in its turns, so that short turns of all of them alternate in one thread, and what a busy machine does to one it
does to all. (Threads of their own would each have OpenMP threads of their own, more than there are cores.)
"""

import io
import itertools
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("PRECEPTOR_DATA", "datasets"))
Seen = Callable[[int], None]


class Contender:
    """One that moves in its turns only; within `with`, which ends it.

    So do its workers: between its turns they are stopped, or they would go on at the cost of the others, and begin the
    next turn with batches made for nothing.
    """

    def __init__(self, train: Callable[[Seen], object]) -> None:
        from greenlet import greenlet

        self._running = greenlet(lambda: train(self._seen))
        self._workers: set[BaseProcess] = set()

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGCONT)
        self._running.throw()

    def turn(self, seconds: float) -> float:
        """Go on for so long, to the end of a step; returns samples a second."""
        others = set(multiprocessing.active_children()) - self._workers
        self._signal(signal.SIGCONT)
        self._seconds, self._samples, self._began = seconds, 0, time.perf_counter()
        reached = self._running.switch()
        self._workers = set(multiprocessing.active_children()) - others
        self._signal(signal.SIGSTOP)
        return reached

    def _signal(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.pid is not None and worker.is_alive():
                os.kill(worker.pid, number)

    def _seen(self, samples: int) -> None:
        self._samples += samples
        if time.perf_counter() - self._began >= self._seconds:
            wait_for_device()
            took = time.perf_counter() - self._began
            assert self._running.parent is not None
            self._running.parent.switch(self._samples / took)


def wait_for_device() -> None:
    """Until it has done what it was asked to: the next contender is not to pay for it."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# Ours


def composed(*overrides: str) -> Any:
    """A config as the command line composes it; made-up data where the official one is missing."""
    from hydra import compose, initialize_config_dir

    from core.config import settle
    from core.schema import TRAIN

    places = {"data=mnist": "MNIST", "data=cifar10": "cifar-10-batches-py"}
    sizes = {"data=mnist": ("28", "1"), "data=cifar10": ("32", "3")}
    name, *rest = overrides
    given = [name]
    if name in places and not (DATA / places[name]).exists():
        size, channels = sizes[name]
        given = ["data=synthetic", f"data.image_size={size}", f"data.channels={channels}", "data.train_samples=2000"]
    given += ["trainer.log_graph=false", "trainer.log_images=false", "trainer.checkpoint.monitor=null"]
    given += ["trainer.evaluate_every=1000 epochs", "trainer.early_stopping.patience=null", "trainer.max_epochs=1000"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        choices = {"model": "bench", "data": name.removeprefix("data=")}
        return settle(compose("train", [*given, *rest]), TRAIN, choices=choices)


def assembled(*overrides: str) -> Any:
    """A trainer without a folder."""
    from trainer.build.training import assemble

    return assemble(composed(*overrides))[0]


@contextmanager
def whole_trainer(*overrides: str) -> Iterator[Any]:
    """A trainer with its run folder, which is removed at the end."""
    from trainer.build.training import build

    with tempfile.TemporaryDirectory() as place:
        config, path = composed(*overrides), {"run_dir": f"{place}/run"}
        with redirect_stdout(io.StringIO()):
            trainer = build(replace(config, values=config.values | path, record=config.record | path))
        assert trainer is not None
        trainer.display.console.quiet = True
        with trainer.closing:
            yield trainer


def ours(trainer: Any) -> Callable[[Seen], object]:
    """The trainer itself, run folder, logs and all."""
    conclude = trainer.conclude

    def train(seen: Seen) -> None:
        before = 0

        def watched() -> None:
            nonlocal before
            conclude()
            samples, before = trainer.clock.samples - before, trainer.clock.samples
            seen(samples)

        trainer.conclude = watched
        trainer.fit()

    return train


def bare(trainer: Any, *, one_batch: bool) -> Callable[[Seen], object]:
    """A loop over our batches with our network, loss and optimizer; or over one of them, again and again: the limit."""

    def train(seen: Seen) -> None:
        trainer.model.train()
        for epoch in itertools.count():
            steps = trainer.train_loader.steps(epoch)
            for step in itertools.repeat(next(iter(steps))) if one_batch else steps:
                for images, targets, _ in step:
                    with trainer.autocast:
                        loss = trainer.loss_function(trainer.forward(images), targets)
                    loss.backward()
                trainer.optimizer.step()
                trainer.optimizer.zero_grad(set_to_none=True)
                seen(len(targets))

    return train


# Others. What most people write: a Dataset of pictures, torchvision's transforms, a DataLoader.


def data_loader(trainer: Any, *, augment: bool, workers: int) -> Any:
    """The training part of a trainer of ours that holds it in memory."""
    source = trainer.train_loader.source
    pictures = source.pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    batch_size = trainer.train_loader.batch_size
    return loader_of(pictures, source.labels.tolist(), batch_size=batch_size, augment=augment, workers=workers)


def loader_of(pictures: Any, labels: list[int], *, batch_size: int, augment: bool, workers: int) -> Any:
    """A DataLoader of uint8 pictures (N, H, W, C)."""
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    size, channels = pictures.shape[1], pictures.shape[3]
    crop = [transforms.RandomCrop(size, padding=size // 8), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose(
        [
            transforms.ToPILImage(),
            *(crop if augment else []),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * channels, (0.25,) * channels),
        ]
    )

    class Pictures(Dataset[Any]):
        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, index: int) -> Any:
            return transform(pictures[index]), labels[index]

    return DataLoader(
        Pictures(),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )


def plain(model: Any, batches: Any) -> Callable[[Seen], object]:
    """A loop over these."""
    import torch

    def train(seen: Seen) -> None:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        while True:
            for images, labels in batches:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
                seen(len(labels))

    return train


def lightning(model: Any, batches: Any) -> Callable[[Seen], object]:
    """Lightning's Trainer, without its logs and checkpoints."""
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

    class Watch(Callback):
        def __init__(self, seen: Seen) -> None:
            self.seen = seen

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.seen(len(batch[1]))

    def train(seen: Seen) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning")
        trainer = Trainer(
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Watch(seen)],
        )
        trainer.fit(Module(), batches)

    return train


def fastai(model: Any, batches: Any) -> Callable[[Seen], object]:
    """fastai's Learner, without a progress bar."""
    import torch
    from fastai.callback.core import Callback, CancelValidException
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import SGD

    class Watch(Callback):
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
        learner.fit(10**6, lr=0.01, cbs=[Watch(seen)])

    return train


PEERS = {"Lightning": lightning, "fastai": fastai}  # the extra `bench`; left out where they are not installed

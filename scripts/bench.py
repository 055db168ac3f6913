"""Measures, side by side: what a step could do, what training does, and what a plain loop over a DataLoader does.

    python scripts/bench.py                        everything, as a table, and as outputs/bench.json
    python scripts/bench.py step loader            some parts of: step, loader, folder, start
    python scripts/bench.py step --rounds 9        more rounds: on a busy machine the medians need them

    step     samples a second in training steps: `limit` repeats one batch that lies ready, with the same network,
             layout and optimizer; `ours` is the trainer itself; `plain` is a loop over torchvision's transforms and a
             DataLoader
    loader   samples a second from uint8 to augmented, normalised batches, no network; against a DataLoader, 2 workers
    folder   an epoch of a folder of photographs: decoded each time, and read from its cache
    start    seconds from the command to the end of a first step, and of `import torch` alone

Contenders take turns within a round, and ratios are medians of rounds: machines are noisy. MNIST, CIFAR-10 and the
folder `imagenette-mini` are read from PRECEPTOR_DATA; where they are missing, made-up pictures of that size stand in.
"""

import argparse
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("PRECEPTOR_DATA", "datasets"))
BATCH = 128
CASES = {
    "MLP 784-256-256-10, MNIST": ("data=mnist", "model=mlp", "model.hidden=[256,256]"),
    "LeNet 20C5-50C5-FC256, MNIST": ("data=mnist", "model=lenet"),
    "LeNet 20C5-50C5-FC256, MNIST, crop_flip": ("data=mnist", "model=lenet", "augment=crop_flip"),
    "ResNet-20, CIFAR-10": ("data=cifar10", "model=resnet20"),
    "ResNet-20, CIFAR-10, crop_flip": ("data=cifar10", "model=resnet20", "augment=crop_flip"),
}
AUGMENTATIONS = ("none", "flip", "crop_flip", "affine", "color_shift", "erasing", "mixup", "cutmix")
Contender = Callable[[], float]  # one turn: what it reached


def composed(*overrides: str) -> Any:
    """A config as the command line composes it; made-up data where the official one is missing."""
    from hydra import compose, initialize_config_dir

    from core.config import settle
    from core.schema import TRAIN

    places = {"data=mnist": "MNIST", "data=cifar10": "cifar-10-batches-py"}
    sizes = {"data=mnist": ("28", "1"), "data=cifar10": ("32", "3")}
    given = list(overrides)
    name = given[0]
    if not (DATA / places[name]).exists():
        size, channels = sizes[name]
        given[0] = "data=synthetic"
        given += [f"data.image_size={size}", f"data.channels={channels}", "data.train_samples=2000"]
    given += [f"data.batch_size={BATCH}", "trainer.device=cpu", "trainer.log_graph=false", "trainer.log_images=false"]
    given += ["trainer.evaluate_every=1000 epochs", "trainer.early_stopping.patience=null", "trainer.max_epochs=1000"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        choices = {"model": "bench", "data": name.removeprefix("data=")}
        return settle(compose("train", [*given, "trainer.checkpoint.monitor=null"]), TRAIN, choices=choices)


def rate(steps: Iterator[int], *, seconds: float) -> float:
    """Samples a second of steps that each yield how many they saw; the first few are not counted."""
    for _ in itertools.islice(steps, 3):
        pass
    samples, start = 0, time.perf_counter()
    for count in steps:
        samples += count
        if time.perf_counter() - start > seconds:
            break
    return samples / (time.perf_counter() - start)


def limit(trainer: Any) -> Iterator[int]:
    """One batch that lies ready, again and again."""
    images, targets, _ = next(iter(trainer.train_loader.steps(0)))[0]
    trainer.model.train()
    while True:
        trainer.loss_function(trainer.model(images), targets).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        yield len(targets)


def ours(overrides: tuple[str, ...], *, seconds: float) -> float:
    """The trainer itself, run folder, logs and all, stopped after a while; from step to step, as its clock counts."""
    from dataclasses import replace
    from signal import SIGTERM

    from core.errors import StopSignal
    from trainer.build import build

    folder = Path(tempfile.mkdtemp())
    config = composed(*overrides)
    place = {"run_dir": str(folder / "run")}
    started: list[float] = []
    with redirect_stdout(io.StringIO()), suppress(StopSignal):
        trainer = build(replace(config, values=config.values | place, record=config.record | place))
        assert trainer is not None
        conclude = trainer.conclude

        def watch() -> None:
            if trainer.step == 3:
                started[:] = [time.perf_counter(), trainer.clock.samples]
            elif len(started) == 2 and time.perf_counter() - started[0] > seconds:
                started.append((trainer.clock.samples - started[1]) / (time.perf_counter() - started[0]))
                trainer.interrupts.received = SIGTERM
            conclude()

        trainer.conclude = watch  # type: ignore[method-assign]
        trainer.run()
    shutil.rmtree(folder)
    return started[2]


def plain_batches(trainer: Any, *, augment: bool, workers: int) -> Any:
    """What most people write: a Dataset of pictures, torchvision's transforms, a DataLoader."""
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    source = trainer.train_loader.source
    pictures = source.pixels.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C)
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
            return transform(pictures[index]), int(source.labels[index])

    return DataLoader(Pictures(), batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True)


def plain(trainer: Any, batches: Any) -> Iterator[int]:
    """A loop over these."""
    import torch

    model = trainer.model.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    while True:
        for images, labels in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            yield len(labels)


def in_turns(contenders: Mapping[str, Contender], *, rounds: int) -> dict[str, list[float]]:
    """What each reached in each round."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(contenders[name]())
    return found


def bench_step(rounds: int, seconds: float) -> dict[str, Any]:
    from trainer.build import assemble

    results: dict[str, Any] = {}
    for name, overrides in CASES.items():
        augment = "augment=crop_flip" in overrides
        limited, loop = (assemble(composed(*overrides))[0] for _ in range(2))
        contenders: dict[str, Contender] = {
            "limit": partial(rate, limit(limited), seconds=seconds),
            "ours": partial(ours, overrides, seconds=seconds),
        }
        for count in (0, 2):
            batches = plain_batches(loop, augment=augment, workers=count)
            contenders[f"plain, {count} workers"] = partial(rate, plain(loop, batches), seconds=seconds)
        results[name] = {"unit": "samples/s", "of": "ours", **in_turns(contenders, rounds=rounds)}
    return results


def loaded(loader: Any) -> Iterator[int]:
    """The batches of one epoch after the other."""
    for epoch in itertools.count():
        for step in loader.steps(epoch):
            yield from (len(batch.labels) for batch in step)


def repeated(batches: Any) -> Iterator[int]:
    """The same of a DataLoader."""
    while True:
        yield from (len(labels) for _, labels in batches)


def bench_loader(rounds: int, seconds: float) -> dict[str, Any]:
    from trainer.build import assemble

    results: dict[str, Any] = {}
    for name in AUGMENTATIONS:
        trainer = assemble(composed("data=cifar10", "model=mlp", f"augment={name}"))[0]
        contenders: dict[str, Contender] = {"ours": partial(rate, loaded(trainer.train_loader), seconds=seconds)}
        if name == "crop_flip":
            batches = plain_batches(trainer, augment=True, workers=2)
            contenders["plain, 2 workers"] = partial(rate, repeated(batches), seconds=seconds)
        results[f"CIFAR-10, {name}"] = {"unit": "samples/s", "of": "ours", **in_turns(contenders, rounds=rounds)}
    return results


def bench_folder(rounds: int, seconds: float) -> dict[str, Any]:
    import torch

    from data.cache import with_cache
    from data.datasets import image_folder
    from data.images import Images

    root = DATA / "imagenette-mini"
    if not root.exists():
        return {}
    train = image_folder(root=str(root), image_size=112, channels=3, test_fraction=0, empty_class="error").train
    rows = torch.randperm(len(train)).split(BATCH)
    with tempfile.TemporaryDirectory() as place:
        cached = Images(with_cache(train.pixels, Path(place)), train.labels)  # type: ignore[arg-type]

        def turn(read: Callable[[], object]) -> float:
            start = time.perf_counter()
            read()
            return len(train) / (time.perf_counter() - start)

        kinds = {"decoded by threads": train.load, "cached": lambda: [cached.fetch(part) for part in rows]}
        found = in_turns({kind: partial(turn, read) for kind, read in kinds.items()}, rounds=rounds)
    return {f"{len(train):,} photographs at 112 pixels": {"unit": "samples/s", "of": "cached", **found}}


def bench_start(rounds: int, seconds: float) -> dict[str, Any]:
    def turn(*command: str) -> float:
        with tempfile.TemporaryDirectory() as place:
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=place)
            return time.perf_counter() - start

    train = (str(ROOT / "scripts/train.py"), "trainer.max_steps=1", "trainer.log_graph=false", "run_dir=run")
    contenders = {"train.py, one step": partial(turn, *train), "import torch": partial(turn, "-c", "import torch")}
    found = in_turns(contenders, rounds=min(rounds, 3))
    return {"LeNet-5 on digits": {"unit": "s", "of": "train.py, one step", **found}}


PARTS = {"step": bench_step, "loader": bench_loader, "folder": bench_folder, "start": bench_start}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures training, loading and starting, side by side.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all, if none is named")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench.json"), help="where the figures go")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as core.entry

    import torch
    from rich.console import Console
    from rich.table import Table

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "batch": BATCH, "rounds": arguments.rounds}
    report: dict[str, Any] = {"facts": facts}
    console = Console(width=140)
    for part in arguments.parts or PARTS:
        report[part] = PARTS[part](arguments.rounds, arguments.seconds)
        table = Table("contender", title=part, title_justify="left")
        for title in ("median", "unit", "to it"):
            table.add_column(title, justify="right")
        for name, result in report[part].items():
            unit, reference = result.pop("unit"), result.pop("of")
            table.add_section()
            table.add_row(f"[bold]{name}[/]")
            for contender, values in result.items():
                ratio = median(ours / other for ours, other in zip(result[reference], values, strict=True))
                shown = f"{median(values):,.0f}" if median(values) >= 100 else f"{median(values):.2f}"
                table.add_row(f"  {contender}", shown, unit, "" if contender == reference else f"{ratio:.2f}x")
            result |= {"unit": unit, "of": reference}
        console.print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"figures of each round: {arguments.output}")


if __name__ == "__main__":
    main()

"""Measures, side by side: what a step could do, what training does, and what others do.

    python scripts/bench.py                        everything, as a table, outputs/bench.json and outputs/bench.png
    python scripts/bench.py step loader            some of its parts, below
    python scripts/bench.py step --rounds 40       more rounds: on a busy machine the medians need them
    python scripts/bench.py step --only lenet      only the networks with this in their name

    step        samples a second in training steps. `limit` repeats one batch that lies ready, with the same network,
                layout and optimizer; `ours` is the trainer itself, with its logs; `plain` is a loop over torchvision's
                transforms and a DataLoader; Lightning and fastai (the extra `bench`) get the same DataLoader. These
                three have torch's defaults: SGD not fused, pictures not channels_last
    own         microseconds a step that are the trainer's own: less a bare loop over the same batches
    loader      samples a second from uint8 to augmented, normalised batches, no network; against a DataLoader
    folder      an epoch of a folder of photographs: decoded each time, and read from its cache
    evaluation  samples a second in evaluation, against the forward pass of one batch that lies ready
    logs        what logging at every step and saving at every fifth cost, against neither
    growth      microseconds a sample in training, as data, batches and networks grow
    memory      peak memory of a process that trains; the others hold as many pictures, as an array
    start       seconds from the command to the end of a first step, and of `import torch, torchvision`
    cuda        images a second of large networks in bf16 on a GPU, against a bare compiled loop: pictures on the
                device, and photographs that workers read from their cache; then `experiment=cifar10_gpu`

All contenders of a line take short turns in one process, and ratios are medians over rounds: machines are noisy. MNIST,
CIFAR-10 and the folder `imagenette-mini` are read from PRECEPTOR_DATA; where the first two are missing, made-up
pictures of that size stand in, and what needs the folder is left out.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from bench_figures import Line, plot, table_of
from contenders import DATA, PEERS, ROOT, Contender, Seen, assembled, bare, data_loader, ours, plain, whole_trainer

BATCH = 128
CPU = ("trainer.device=cpu", f"data.batch_size={BATCH}")
CASES = {
    "MLP 784-256-256-10, MNIST": ("data=mnist", "model=mlp", "model.hidden=[256,256]", *CPU),
    "LeNet 20C5-50C5-FC256, MNIST": ("data=mnist", "model=lenet", *CPU),
    "LeNet 20C5-50C5-FC256, MNIST, crop_flip": ("data=mnist", "model=lenet", "augment=crop_flip", *CPU),
    "ResNet-20, CIFAR-10": ("data=cifar10", "model=resnet20", *CPU),
    "ResNet-20, CIFAR-10, crop_flip": ("data=cifar10", "model=resnet20", "augment=crop_flip", *CPU),
}
AUGMENTATIONS = ("none", "flip", "crop_flip", "affine", "color_shift", "erasing", "mixup", "cutmix")
LARGE = ("resnet18", "resnet50", "vgg16")
Turn = Callable[[float], float]  # seconds -> what it reached


def in_turns(turns: Mapping[str, Turn], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """What each reached in each round, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(-1, rounds):
        for name in random.Random(number).sample(names, len(names)):  # whoever comes before leaves the caches
            reached = turns[name](seconds)
            if number >= 0:
                found[name].append(reached)
    return found


def race(
    trainings: Mapping[str, Callable[[Seen], object]], *, of: str, rounds: int, seconds: float, unit: str = "samples/s"
) -> Line:
    """A line of contenders that run until all have had their turns."""
    with ExitStack() as stack:
        turns = {name: stack.enter_context(Contender(train)).turn for name, train in trainings.items()}
        return {"unit": unit, "of": of, **in_turns(turns, rounds=rounds, seconds=seconds)}


def bench_step(options: argparse.Namespace) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for name, overrides in CASES.items():
        if options.only.lower() not in name.lower():
            continue
        augment = "augment=crop_flip" in overrides
        with whole_trainer(*overrides) as trainer:
            trainings = {"limit": bare(assembled(*overrides), one_batch=True), "ours": ours(trainer)}
            for workers in (0, 2):
                other = assembled(*overrides, "trainer.channels_last=false")
                batches = data_loader(other, augment=augment, workers=workers)
                trainings[f"plain, {workers} workers"] = plain(other.model, batches)
            for (peer, make), workers in itertools.product(PEERS.items(), (0, 2)):
                other = assembled(*overrides, "trainer.channels_last=false")
                with suppress(ImportError):
                    batches = data_loader(other, augment=augment, workers=workers)
                    trainings[f"{peer}, {workers} workers"] = make(other.model, batches)
            lines[name] = race(trainings, of="ours", rounds=options.rounds, seconds=options.seconds)
    return lines


def bench_own(options: argparse.Namespace) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for hidden in ("[32]", "[256,256]"):
        given = ("data=mnist", "model=mlp", f"model.hidden={hidden}", *CPU)
        with whole_trainer(*given) as trainer:
            trainings = {"ours": ours(trainer), "bare": bare(assembled(*given), one_batch=False)}
            line = race(trainings, of="own", rounds=options.rounds, seconds=options.seconds, unit="us a step")
        for name in trainings:
            line[name] = [BATCH * 1e6 / reached for reached in line[name]]
        line["own"] = [mine - theirs for mine, theirs in zip(line["ours"], line["bare"], strict=True)]
        lines[f"MLP of {hidden}, MNIST"] = line
    return lines


def loading(loader: Any) -> Callable[[Seen], object]:
    """The batches of one epoch after the other."""

    def read(seen: Seen) -> None:
        for epoch in itertools.count():
            for step in loader.steps(epoch):
                for batch in step:
                    seen(len(batch.labels))

    return read


def repeating(batches: Any) -> Callable[[Seen], object]:
    """The same of a DataLoader."""

    def read(seen: Seen) -> None:
        while True:
            for _, labels in batches:
                seen(len(labels))

    return read


def bench_loader(options: argparse.Namespace) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for name in AUGMENTATIONS:
        trainer = assembled("data=cifar10", "model=mlp", f"augment={name}", *CPU)
        readings = {"ours": loading(trainer.train_loader)}
        if name == "crop_flip":
            readings["DataLoader, 2 workers"] = repeating(data_loader(trainer, augment=True, workers=2))
        lines[f"CIFAR-10, {name}"] = race(readings, of="ours", rounds=options.rounds, seconds=options.seconds)
    return lines


def bench_folder(options: argparse.Namespace) -> dict[str, Line]:
    import torch

    from data.sources.cache import with_cache
    from data.sources.datasets import image_folder
    from data.sources.images import Images

    root = DATA / "imagenette-mini"
    if not root.exists():
        return {}
    train = image_folder(root=str(root), image_size=112, channels=3, test_fraction=0, empty_class="error").train
    rows = torch.randperm(len(train)).split(BATCH)
    with tempfile.TemporaryDirectory() as place:
        cached = Images(with_cache(train.pixels, Path(place)), train.labels)  # type: ignore[arg-type]
        kinds = {"decoded by threads": train.load, "cached": lambda: [cached.fetch(part) for part in rows]}
        turns = {kind: partial(epoch_of, len(train), read) for kind, read in kinds.items()}
        found = in_turns(turns, rounds=min(options.rounds, 5), seconds=0)
    return {f"{len(train):,} photographs at 112 pixels": {"unit": "samples/s", "of": "cached", **found}}


def epoch_of(samples: int, read: Callable[[], object], _: float) -> float:
    """Samples a second of reading them all once."""
    start = time.perf_counter()
    read()
    return samples / (time.perf_counter() - start)


def bench_evaluation(options: argparse.Namespace) -> dict[str, Line]:
    import torch

    from trainer.monitor.metrics import evaluate

    lines: dict[str, Line] = {}
    for name, overrides in CASES.items():
        if "crop_flip" in name or options.only.lower() not in name.lower():
            continue
        trainer = assembled(*overrides)
        images = next(iter(trainer.val_loader)).images

        def forward(seen: Seen, trainer: Any = trainer, images: Any = images) -> None:
            trainer.model.eval()
            while True:
                trainer.model(images)
                seen(len(images))

        def evaluating(seen: Seen, trainer: Any = trainer) -> None:
            def watched() -> Any:
                for batch in trainer.val_loader:
                    yield batch
                    seen(len(batch.labels))

            while True:
                evaluate(trainer.model, trainer.loss_function, watched(), autocast=trainer.autocast)

        contenders: dict[str, Callable[[Seen], object]] = {"limit": forward, "ours": evaluating}
        with torch.inference_mode():  # around both: a mode that one sets and leaves in its turns is the other's too
            lines[name] = race(contenders, of="ours", rounds=options.rounds, seconds=options.seconds)
    return lines


def bench_logs(options: argparse.Namespace) -> dict[str, Line]:
    given = CASES["LeNet 20C5-50C5-FC256, MNIST"]
    kinds = {
        "logs every 50 steps": (),
        "logs at every step": ("trainer.log_every=1 steps",),
        "saves at every fifth": ("trainer.checkpoint.every_steps=5",),
    }
    with ExitStack() as stack:
        trainings = {
            name: ours(stack.enter_context(whole_trainer(*given, *overrides))) for name, overrides in kinds.items()
        }
        line = race(trainings, of="logs every 50 steps", rounds=options.rounds, seconds=options.seconds)
    return {"LeNet 20C5-50C5-FC256, MNIST": line}


def bench_growth(options: argparse.Namespace) -> dict[str, Line]:
    """Each line's contenders differ in one size alone."""
    made_up = ("data=synthetic", "data.image_size=28", "data.channels=1", "trainer.device=cpu")
    sizes: dict[str, list[tuple[str, ...]]] = {
        "samples": [(f"{n:,}", f"data.train_samples={n}", "model=mlp") for n in (4000, 16000, 64000)],
        "batch": [(str(n), f"data.batch_size={n}", "data.train_samples=8000", "model=mlp") for n in (32, 128, 512)],
        "hidden units": [(f"2 x {n}", f"model.hidden=[{n},{n}]", "model=mlp") for n in (128, 256, 512)],
    }
    lines: dict[str, Line] = {}
    for what, kinds in sizes.items():
        with ExitStack() as stack:
            trainings = {name: ours(stack.enter_context(whole_trainer(*made_up, *given))) for name, *given in kinds}
            line = race(trainings, of=kinds[0][0], rounds=options.rounds, seconds=options.seconds, unit="us a sample")
        for name in trainings:
            line[name] = [1e6 / reached for reached in line[name]]
        lines[f"MLP, by {what}"] = line
    return lines


MEMORY = """
import re, sys
sys.path[:0] = [{scripts!r}]
import contenders as c
given = {given!r}
class Enough(BaseException): pass
seen_so_far = 0
def seen(samples):
    global seen_so_far
    seen_so_far += samples
    if seen_so_far > 30 * 128: raise Enough
def peer(name):
    import numpy
    from trainer.build.training import build_model
    values = c.composed(*given).values
    data = values["data"]
    count = 60000 if given[0] == "data=mnist" else 50000
    pictures = numpy.random.randint(0, 256, (count, *[data["image_size"]] * 2, data["channels"]), numpy.uint8)
    batches = c.loader_of(pictures, [0] * count, batch_size=data["batch_size"], augment=False, workers=0)
    return getattr(c, name)(build_model(values, init_seed=0), batches)
try:
    if {name!r} == "ours":
        with c.whole_trainer(*given) as trainer: c.ours(trainer)(seen)
    else:
        peer({name!r})(seen)
except Enough:
    # Linux hands a parent's peak on to its child in ru_maxrss, and not in this.
    print(int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024)
"""


def bench_memory(options: argparse.Namespace) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for name in ("LeNet 20C5-50C5-FC256, MNIST", "ResNet-20, CIFAR-10"):
        line: Line = {"unit": "MiB", "of": "ours"}
        for contender in ("ours", "plain", "lightning", "fastai"):
            code = MEMORY.format(scripts=str(ROOT / "scripts"), given=CASES[name], name=contender)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                line[contender] = [float(done.stdout)]
        lines[name] = line
    return lines


def bench_start(options: argparse.Namespace) -> dict[str, Line]:
    def turn(command: tuple[str, ...], _: float) -> float:
        with tempfile.TemporaryDirectory() as place:
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=place)
            return time.perf_counter() - start

    train = str(ROOT / "scripts/train.py")
    commands = {
        "train.py, one step": (train, "trainer.max_steps=1", "trainer.log_graph=false", "run_dir=run"),
        "import torch, torchvision": ("-c", "import torch, torchvision"),
        "train.py --help": (train, "--help"),
    }
    turns = {name: partial(turn, command) for name, command in commands.items()}
    found = in_turns(turns, rounds=min(options.rounds, 5), seconds=0)
    return {"LeNet-5 on digits": {"unit": "s", "of": "train.py, one step", **found}}


def bench_cuda(options: argparse.Namespace) -> dict[str, Line]:
    import torch

    if not torch.cuda.is_available():
        return {}
    given = ("trainer.device=cuda", "trainer.precision=bf16", "trainer.compile=true", "optimizer.lr=0.001")
    lines = bench_large(options, LARGE, size=224, batch=128, given=given)
    return lines | (bench_recipe("cifar10_gpu") if (DATA / "cifar-10-batches-py").exists() else {})


def bench_large(
    options: argparse.Namespace, networks: Sequence[str], *, size: int, batch: int, given: tuple[str, ...]
) -> dict[str, Line]:
    """Each network on pictures that lie on the device, and on photographs that workers read while it computes."""
    import torch

    # With drop_last they are compiled for one size.
    sizes = [f"data.image_size={size}", f"data.batch_size={batch}", "data.drop_last=true"]
    sizes += ["data.channels=3", "data.num_classes=10"]
    sources = {"resident": ["data=synthetic", "data.train_samples=4000", *sizes]}
    lines: dict[str, Line] = {}
    with tempfile.TemporaryDirectory() as cache:
        if (root := DATA / "imagenette-mini").exists():
            place = [f"data.root={root}", f"data.cache_dir={cache}", "data.memory_budget=0"]
            sources["streamed"] = ["data=image_folder", *place, *sizes]
        for network, (kind, data) in itertools.product(networks, sources.items()):
            config = (*data, f"model={network}", *given)
            torch.compiler.reset()  # or what one network has taught it would hold for the next
            with whole_trainer(*config) as trainer:
                trainings = {
                    "limit": bare(assembled(*config), one_batch=True),
                    "ours": ours(trainer),
                    "bare loop": bare(assembled(*config), one_batch=False),
                }
                line = race(trainings, of="ours", rounds=options.rounds, seconds=options.seconds)
            lines[f"{network}, {kind}"] = line
    return lines


def bench_recipe(experiment: str, *overrides: str) -> dict[str, Line]:
    """A card from the command to its tested network: seconds of the run, of the whole command, and test accuracy."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        script = str(ROOT / "scripts/train.py")
        command = [sys.executable, script, f"experiment={experiment}", f"run_dir={run}", *overrides]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        whole = time.perf_counter() - start
        summary = json.loads((run / "summary.json").read_text())
    return {
        f"{experiment}, time": {"unit": "s", "of": "run", "run": [summary["seconds"]], "command": [whole]},
        f"{experiment}, test": {"unit": "%", "of": "accuracy", "accuracy": [100 * summary["test"]["accuracy"]]},
    }


PARTS = {
    "step": bench_step,
    "own": bench_own,
    "loader": bench_loader,
    "folder": bench_folder,
    "evaluation": bench_evaluation,
    "logs": bench_logs,
    "growth": bench_growth,
    "memory": bench_memory,
    "start": bench_start,
    "cuda": bench_cuda,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures training, loading and starting, side by side.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all, if none is named")
    parser.add_argument("--only", default="", help="of step and evaluation: the lines with this in their name")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each turn, which ends with a step")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench.json"), help="the figures; a plot beside it")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as core.command_line

    import torch
    from rich.console import Console

    from trainer.device import keep_freed_memory

    keep_freed_memory()  # for all of them alike
    if options.threads:
        torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": options.rounds}
    console = Console(width=120)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for part in options.parts or PARTS:
        report[part] = PARTS[part](options)
        console.print(table_of(part, report[part]))
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    told = str(options.output)
    if report.get("step") and options.rounds > 1:
        plot(report["step"], options.output.with_suffix(".png"))
        told += f", {options.output.with_suffix('.png')}"
    console.print(f"figures of each round: {told}")


if __name__ == "__main__":
    main()

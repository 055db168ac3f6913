"""Benchmarks that run in separate processes: `memory`, `start`, `listing`, and the time of a recipe."""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from contenders import ROOT
from tables import Line
from turns import CASES, in_turns

FILE_COUNTS = (10_000, 100_000)  # a million files take half an hour, most of it to create their cache

MEMORY = """
import re, sys
sys.path[:0] = [{bench!r}]
import contenders as c
overrides = {overrides!r}
class Enough(BaseException): pass
seen_so_far = 0
def seen(samples):
    global seen_so_far
    seen_so_far += samples
    if seen_so_far > 30 * 128: raise Enough
def peer(name):
    import numpy
    from trainer.build.model import build_model
    values = c.composed(*overrides).values
    data = values["data"]
    count = 60000 if overrides[0] == "data=mnist" else 50000
    images = numpy.random.randint(0, 256, (count, *[data["image_size"]] * 2, data["channels"]), numpy.uint8)
    batches = c.loader_of(images, [0] * count, batch_size=data["batch_size"], augment=False, workers=0)
    return getattr(c, name)(build_model(values, init_seed=0), batches)
try:
    if {name!r} == "ours":
        with c.whole_run(*overrides) as run: c.preceptor(run)(seen)
    else:
        peer({name!r})(seen)
except Enough:
    # Not ru_maxrss: on Linux, a child process inherits its parent's peak there.
    print(int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024)
"""


def bench_memory(options: argparse.Namespace) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for name in ("LeNet 20C5-50C5-FC256, MNIST", "ResNet-20, CIFAR-10"):
        line: Line = {"unit": "MiB", "of": "ours"}
        for contender in ("ours", "plain", "lightning", "fastai"):
            code = MEMORY.format(bench=str(ROOT / "bench"), overrides=CASES[name], name=contender)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                line[contender] = [float(done.stdout)]
        lines[name] = line
    return lines


def bench_start(options: argparse.Namespace) -> dict[str, Line]:
    def turn(command: tuple[str, ...], _: float) -> float:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=folder)
            return time.perf_counter() - start

    train = str(ROOT / "scripts/train.py")
    commands = {
        "train.py, one step": (train, "trainer.max_steps=1", "trainer.log_graph=false", "run_dir=run"),
        "import torch, torchvision": ("-c", "import torch, torchvision"),
        "train.py --help": (train, "--help"),
    }
    turns = {name: partial(turn, command) for name, command in commands.items()}
    seconds = in_turns(turns, rounds=min(options.rounds, 5), seconds=0)
    return {"LeNet-5 on digits": {"unit": "s", "of": "train.py, one step", **seconds}}


LISTING = """
import resource, sys, time
from data.sources.image_folder import image_folder  # before the measurement, like torchvision
from torchvision.datasets import ImageFolder
def resident():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS"))) / 1024
memory, start = resident(), time.perf_counter()
if {name!r} == "torchvision":
    data = ImageFolder({root!r})
else:
    arguments = dict(image_size=8, channels=1, test_fraction=0.0, empty_class="error")
    data = image_folder(root={root!r}, cache_dir={cache!r}, **arguments)
print(time.perf_counter() - start, resident() - memory)
"""


def bench_listing(options: argparse.Namespace) -> dict[str, Line]:
    """Seconds and memory until a folder of images is listed, against `ImageFolder`; `cached` also opens the cache."""
    lines: dict[str, Line] = {}
    for count in FILE_COUNTS:
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch) / "images"
            write_images(root, count)
            caches = {"ours": None, "cached": f"{scratch}/cache", "torchvision": None}
            seconds: Line = {"unit": "s", "of": "ours", **{name: [] for name in caches}}
            memory: Line = {"unit": "bytes per file", "of": "ours", **{name: [] for name in caches}}
            for number in range(1 + min(options.rounds, 5)):
                for name, cache in caches.items():
                    code = LISTING.format(name=name, root=str(root), cache=cache)
                    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
                    if number > 0:  # the first round creates the cache and reads the folders from the disk
                        elapsed, size = map(float, done.stdout.split())
                        seconds[name].append(elapsed)
                        memory[name].append(size * 2**20 / count)
            lines |= {f"{count:,} files, time": seconds, f"{count:,} files, memory": memory}
    return lines


def write_images(root: Path, count: int) -> None:
    """Write images of 8 x 8 pixels into one folder for every thousand."""
    from PIL import Image

    content = io.BytesIO()
    Image.new("L", (8, 8), 90).save(content, "PNG")
    for first in range(0, count, 1000):
        folder = root / f"n{first // 1000:08d}"
        folder.mkdir(parents=True)
        for number in range(first, min(first + 1000, count)):
            (folder / f"{folder.name}_{number}.png").write_bytes(content.getvalue())


def bench_recipe(experiment: str, *overrides: str, seeds: int) -> dict[str, Line]:
    """Run a recipe with several seeds.

    Returns the seconds of the training steps, of the run (with compilation and test) and of the whole command, and the
    test accuracy.
    """
    seconds: dict[str, list[float]] = {"training steps": [], "run": [], "command": []}
    accuracies: list[float] = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            script = str(ROOT / "scripts/train.py")
            command = [sys.executable, script, f"experiment={experiment}", f"run_dir={run}", f"seed={seed}", *overrides]
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds["command"].append(time.perf_counter() - start)
            summary = json.loads((run / "summary.json").read_text())
        seconds["training steps"].append(summary["training_seconds"])
        seconds["run"].append(summary["seconds"])
        accuracies.append(100 * summary["test"]["accuracy"])
    return {
        f"{experiment}, time": {"unit": "s", "of": "training steps", **seconds},
        f"{experiment}, test": {"unit": "%", "of": "accuracy", "accuracy": accuracies},
    }

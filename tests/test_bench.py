"""`bench/bench.py` runs for a moment on synthetic data."""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
from PIL import Image

pytest.importorskip("greenlet")
BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import commands  # noqa: E402
import contenders  # noqa: E402
import gpu  # noqa: E402
import turns  # noqa: E402


def test_contenders_take_turns_and_are_timed_by_their_steps():
    order: list[str] = []

    def training(name: str, pause: float) -> Callable[[contenders.Seen], object]:
        def train(seen: contenders.Seen) -> None:
            while True:
                time.sleep(pause)
                order.append(name)
                seen(10)

        return train

    line = turns.race(
        {"slow": training("slow", 0.02), "fast": training("fast", 0.002)}, of="fast", rounds=4, seconds=0.05
    )
    assert len(line["slow"]) == len(line["fast"]) == 4
    begun = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert begun.count("slow") > 2 and begun.count("fast") > 2  # in turns, whichever begins a round
    assert median(line["slow"]) <= 500 and median(line["fast"]) <= 5000  # no step is shorter than its pause
    assert median(line["fast"]) > 3 * median(line["slow"])


def test_short_benchmark_writes_its_tables(tmp_path):
    """On synthetic images; in a process of its own, as DataLoaders with workers leave a handler of signals behind."""
    given = ["step", "own", "--only", "MLP", "--rounds", "2", "--seconds", "0.01", "--output", "found/bench.json"]
    command = [sys.executable, str(BENCH / "bench.py"), *given]
    environment = os.environ | {"PRECEPTOR_DATA": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "found/bench.json").read_text())
    (line,) = report["step"].values()
    assert {"limit", "ours", "plain, 0 workers", "plain, 2 workers"} <= set(line) and all(map(len, line.values()))
    own = report["own"]["MLP of [32], MNIST"]
    assert own["own"] == [ours - bare for ours, bare in zip(own["ours"], own["bare"], strict=True)]
    assert "us a step" in done.stdout and "of it" in done.stdout
    assert (tmp_path / "found/bench.png").stat().st_size > 10_000


def test_gpu_benchmark_runs_on_a_cpu(tmp_path, monkeypatch):
    """The part `cuda`, on a CPU with a small model and synthetic photographs."""
    for number in range(120):
        file = tmp_path / "imagenette-mini" / f"class {number % 10}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (number, 0, 0)).save(file)
    monkeypatch.setattr(gpu, "DATA", tmp_path)
    options = argparse.Namespace(rounds=2, seconds=0.001)
    given = ("trainer.device=cpu", "data.num_workers=1")
    found = gpu.bench_large(options, ["mlp"], size=8, batch=4, given=given)
    assert set(found) == {"mlp, resident", "mlp, streamed"}
    assert all(len(line[name]) == 2 for line in found.values() for name in ("limit", "ours", "bare loop"))
    assert not (tmp_path / "imagenette-mini" / ".preceptor").exists()


def test_samples_of_the_trainer_are_counted_one_by_one():
    """44 of them, in batches of 8: the last of an epoch has 4."""
    data = ("data=synthetic", "data.train_samples=55", "data.val_fraction=0.2", "data.image_size=8", "model=mlp")
    seen: list[int] = []
    with contenders.whole_run(*data, "data.batch_size=8", "trainer.device=cpu", "trainer.max_epochs=1") as run:
        contenders.ours(run)(seen.append)
    assert seen == [8, 8, 8, 8, 8, 4]


def test_workers_are_stopped_between_turns():
    """They would work at the cost of the others."""
    counted = multiprocessing.get_context("fork").RawValue("q", 0)

    def count() -> None:
        while True:
            counted.value += 1

    def train(seen: contenders.Seen) -> None:
        worker = multiprocessing.get_context("fork").Process(target=count, daemon=True)
        worker.start()
        try:
            while True:
                time.sleep(0.001)
                seen(1)
        finally:
            worker.kill()
            worker.join()

    with turns.Contender(train) as contender:
        while not counted.value:
            contender.turn(0.05)
        time.sleep(0.02)
        before = counted.value
        time.sleep(0.05)
        assert before == counted.value
        contender.turn(0.2)
        assert counted.value > before


def test_recipe_benchmark_reports_time_and_accuracy(monkeypatch):
    """Any card will do."""
    given = ("model=mlp", "data=digits", "data.limit_train=100", "trainer.max_epochs=1", "trainer.threads=1")
    found = commands.bench_recipe("mnist_mlp", *given, "data.image_size=8", "trainer.device=cpu")
    (run,), (command,) = (found["mnist_mlp, time"][name] for name in ("run", "command"))
    assert 0 < run < command
    assert 0 <= found["mnist_mlp, test"]["accuracy"][0] <= 100

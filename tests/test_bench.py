"""`bench/bench.py` on synthetic data, with a few short rounds."""

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
from matplotlib.axes import Axes
from PIL import Image

pytestmark = pytest.mark.thorough

pytest.importorskip("greenlet")
BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import commands  # noqa: E402
import contenders  # noqa: E402
import gpu  # noqa: E402
import tables  # noqa: E402
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
    turn_starts = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert (
        turn_starts.count("slow") > 2 and turn_starts.count("fast") > 2
    )  # they alternate, independent of which one starts a round
    assert median(line["slow"]) <= 500 and median(line["fast"]) <= 5000  # no step is shorter than its pause
    assert median(line["fast"]) > 3 * median(line["slow"])


def test_short_benchmark_writes_its_tables(tmp_path):
    """Uses synthetic images and a subprocess: DataLoaders with workers leave a signal handler installed."""
    arguments = ["step", "own", "--only", "MLP", "--rounds", "2", "--seconds", "0.01", "--output", "results/bench.json"]
    command = [sys.executable, str(BENCH / "bench.py"), *arguments]
    environment = os.environ | {"PRECEPTOR_DATA": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "results/bench.json").read_text())
    (line,) = report["step"].values()
    assert {"limit", "ours", "plain, 0 workers", "plain, 2 workers"} <= set(line) and all(map(len, line.values()))
    own = report["own"]["MLP of [32], MNIST"]
    assert own["own"] == [total - bare for total, bare in zip(own["ours"], own["bare"], strict=True)]
    assert "us/step" in done.stdout and "relative to this row" in done.stdout and "Preceptor = " in done.stdout
    assert (tmp_path / "results/bench.png").stat().st_size > 10_000


def test_plot_highlights_preceptor_and_draws_the_others_in_grey():
    line = {"unit": "samples/s", "of": "ours", "limit": [100, 100, 200], "ours": [80, 90, 200]}
    line |= {f"{name}, {workers} workers": [30, 40, 60] for name in ("plain", "fastai") for workers in (0, 2)}
    (axes,) = tables.draw(tables.shares_of_limit({"MLP": line, "LeNet": line})).axes
    bars = {group.get_label(): list(group) for group in axes.containers if group.get_label() in legend_of(axes)}
    assert list(bars) == ["Preceptor", *(name for name in line if "workers" in name)]
    assert [bar.get_width() for bar in bars["Preceptor"]] == [0.9, 0.9]  # the median of 0.8, 0.9 and 1
    styles = {name: {(bar.get_facecolor()[:3], bar.get_hatch()) for bar in group} for name, group in bars.items()}
    assert all(len(group) == 1 for group in styles.values()) and len(set.union(*styles.values())) == len(styles)
    has_colour = {name for name, group in styles.items() if len(set(next(iter(group))[0])) > 1}
    assert has_colour == {"Preceptor"}


def legend_of(axes: Axes) -> list[str]:
    """Return the texts of the legend."""
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_gpu_benchmark_runs_on_a_cpu(tmp_path, monkeypatch):
    """Runs the section `cuda` on a CPU with a small model and synthetic images."""
    for number in range(120):
        file = tmp_path / "imagenette-mini" / f"class {number % 10}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (number, 0, 0)).save(file)
    monkeypatch.setattr(gpu, "DATA", tmp_path)
    options = argparse.Namespace(rounds=2, seconds=0.001)
    overrides = ("trainer.device=cpu", "data.num_workers=1")
    results = gpu.bench_large(options, ["mlp"], size=8, batch=4, overrides=overrides)
    small = {"MLP": ("data=mnist", "model=mlp", "model.hidden=[8]", "trainer.device=cpu", "data.batch_size=64")}
    options.only = ""
    [line] = gpu.bench_small(options, small, variants={"large": "model.hidden=[64]"}, workers=0).values()
    assert {"limit", "ours", "ours, large", "plain, compiled, 0 workers"} <= line.keys()
    assert set(results) == {"mlp, resident", "mlp, streamed"}
    assert all(len(line[name]) == 2 for line in results.values() for name in ("limit", "ours", "bare loop"))
    assert not (tmp_path / "imagenette-mini" / ".preceptor").exists()


def test_trainer_contender_counts_the_samples_of_each_batch():
    """44 samples in batches of 8: the last batch of an epoch has 4."""
    data = ("data=synthetic", "data.train_samples=55", "data.val_fraction=0.2", "data.image_size=8", "model=mlp")
    seen: list[int] = []
    with contenders.whole_run(*data, "data.batch_size=8", "trainer.device=cpu", "trainer.max_epochs=1") as run:
        contenders.preceptor(run)(seen.append)
    assert seen == [8, 8, 8, 8, 8, 4]


def test_workers_are_stopped_between_turns():
    """Running workers would slow down the other contenders."""
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
        count_before = counted.value
        time.sleep(0.05)
        assert count_before == counted.value
        contender.turn(0.2)
        assert counted.value > count_before


def test_recipe_benchmark_reports_time_and_accuracy(monkeypatch):
    """Checked with a small recipe; any recipe would do."""
    overrides = ("model=mlp", "data=digits", "data.limit_train=100", "trainer.max_epochs=1", "trainer.threads=1")
    results = commands.bench_recipe("mnist_mlp", *overrides, "data.image_size=8", "trainer.device=cpu", seeds=2)
    times = (results["mnist_mlp, time"][name] for name in ("training steps", "run", "command"))
    assert all(0 < steps < run < command for steps, run, command in zip(*times, strict=True))
    assert 0 <= results["mnist_mlp, test"]["accuracy"][0] <= 100

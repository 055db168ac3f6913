"""The scripts as a user calls them, from training to predictions.

The first training and the signalled one are new processes; the others are forked, with torch already imported.
"""

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import run_script
from PIL import Image
from sklearn import metrics
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from core.run_config import read_run_config
from data.sources.datasets import digits
from data.sources.pixels import resize
from trainer.inference.load_run import load_run

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, *arguments: str, cwd: Path) -> str:
    """Run a script to its end and return its stdout."""
    done = run_script(ROOT / "scripts" / f"{name}.py", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with the default run and a grid of two seeds of a small model."""
    path = tmp_path_factory.mktemp("work")
    arguments = ("run_dir=outputs/digits", "trainer.threads=1", "trainer.histograms_every=10 epochs")
    command = [sys.executable, str(ROOT / "scripts/train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=path, timeout=300)
    assert done.returncode == 0, done.stderr
    (path / "printed").write_text(done.stdout)
    small = ("model=mlp", "model.hidden=[16]", "trainer.max_epochs=3", "trainer.threads=1")
    script("train", "-m", *small, "seed=0,1", "run_dir=outputs/grid", cwd=path)
    return path


@pytest.fixture(scope="module")
def run_folder(folder) -> Path:
    return folder / "outputs/digits"


def test_default_run_learns_digits(folder, run_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["status"] in ("finished", "stopped_early")
    assert summary["stop_reason"] in ("max_epochs", "early_stopping")
    assert summary["test"]["accuracy"] > 0.97
    assert summary["parameters"] == 61_706
    assert summary["seconds"] < 60
    assert summary["provenance"]["versions"]["torch"] == torch.__version__
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    keys = ["step", "epoch", "train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr", "seconds"]
    assert list(lines[0]) == [*keys, "samples_per_second"]
    assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    best = max(lines, key=lambda line: line["val/accuracy"])
    assert summary["best"]["step"] == best["step"]
    printed = (folder / "printed").read_text()
    assert f"accuracy {summary['test']['accuracy']:.2%}" in printed and "\x1b" not in printed
    assert sorted(path.name for path in folder.iterdir()) == ["outputs", "printed"]


def test_evaluate_needs_only_the_run_folder(folder, run_folder):
    out = script("evaluate", "run=outputs/digits", cwd=folder)
    report = json.loads((run_folder / "evaluation-test.json").read_text())
    summary = json.loads((run_folder / "summary.json").read_text())
    assert report["accuracy"] == pytest.approx(summary["test"]["accuracy"], abs=1e-12)
    assert report["cross_entropy"] == pytest.approx(summary["test"]["loss"], abs=1e-6)
    # A second implementation: count the predictions of the loaded run.
    run = load_run(run_folder)
    test = digits().test
    pixels = resize(test.pixels, image_size=32, fit="resize")
    with torch.no_grad():
        logits = run.model(torch.stack([run.transform(image) for image in pixels]))
    predicted, labels = logits.argmax(1), test.labels
    matrix = torch.zeros(10, 10, dtype=torch.int64)
    for label, prediction in zip(labels.tolist(), predicted.tolist(), strict=True):
        matrix[label, prediction] += 1
    assert report["confusion_matrix"] == matrix.tolist()
    precision, recall = matrix.diag() / matrix.sum(0), matrix.diag() / matrix.sum(1)
    f1 = 2 * precision * recall / (precision + recall)
    assert report["macro_f1"] == pytest.approx(f1.mean().item(), abs=1e-6)
    for index, row in enumerate(report["classes"].values()):
        assert row["precision"] == pytest.approx(precision[index].item(), abs=1e-6)
        assert row["recall"] == pytest.approx(recall[index].item(), abs=1e-6)
        assert row["samples"] == int((labels == index).sum())
    top5 = metrics.top_k_accuracy_score(labels.numpy(), logits.softmax(1).numpy(), k=5)
    assert report["top5_accuracy"] == pytest.approx(top5)
    assert f"accuracy {report['accuracy']:.4f}" in out


def test_predictions_equal_the_models_probabilities(folder, run_folder):
    test = digits().test
    images = resize(test.pixels[:60], image_size=32, fit="resize")
    for index, image in enumerate(images):
        class_folder = folder / "images" / str(int(test.labels[index]))
        class_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(class_folder / f"{index:03d}.png")
    (folder / "images" / "notes.txt").write_text("no image")
    script("predict", "run=outputs/digits", "input=images", "output=out.csv", "batch_size=7", cwd=folder)
    rows = read_table(folder / "out.csv")
    assert [row["file"] for row in rows] == sorted(
        str(path.relative_to(folder / "images")) for path in (folder / "images").rglob("*.png")
    )
    run = load_run(run_folder)
    for row in rows:
        index = int(Path(row["file"]).stem)
        with torch.no_grad():
            expected = run.model(run.transform(images[index])[None]).softmax(1)[0]
        probabilities = torch.tensor([float(row[name]) for name in run.class_names])
        torch.testing.assert_close(probabilities, expected, atol=2e-6, rtol=0)
        assert row["class"] == run.class_names[int(expected.argmax())]
        assert float(row["probability"]) == pytest.approx(probabilities.max().item(), abs=1e-6)


def test_grid_creates_independent_runs(folder):
    grid = folder / "outputs/grid"
    assert sorted(path.name for path in grid.iterdir()) == ["0", "1"]
    seeds = [read_run_config(grid / job)["seed"] for job in ("0", "1")]
    assert seeds == [0, 1]
    first, second = (next(iter(load_run(grid / job).snapshot.part("model").values())) for job in ("0", "1"))
    assert not torch.equal(first, second)
    # The same seed in a single run, in another process, gives the same weights as within the grid.
    script(
        "train",
        *("model=mlp", "model.hidden=[16]", "trainer.max_epochs=3", "trainer.threads=1"),
        "seed=1",
        "run_dir=outputs/single",
        cwd=folder,
    )
    single, within = (load_run(folder / "outputs" / name, checkpoint="last") for name in ("single", "grid/1"))
    for name, tensor in single.snapshot.part("model").items():
        assert torch.equal(tensor, within.snapshot.part("model")[name])


@pytest.mark.parametrize("launcher", ["parallel", "submitit_local"])
def test_launchers_do_not_import_from_the_working_directory(tmp_path, launcher):
    """A job of a launcher runs in a process that `python -m` starts, which looks for modules in this folder first."""
    for module in ("models", "data", "trainer", "core", "yaml", "torch", "joblib", "submitit", "cloudpickle"):
        (tmp_path / f"{module}.py").write_text("from pathlib import Path\nPath('executed').touch()\n1 / 0\n")
    small = ("model=mlp", "model.hidden=[8]", "trainer.max_steps=2", "trainer.threads=1", "run_dir=grid")
    script("train", "-m", f"hydra/launcher={launcher}", *small, "seed=0,1", cwd=tmp_path)
    assert not (tmp_path / "executed").exists()
    for job in ("0", "1"):
        assert json.loads((tmp_path / "grid" / job / "summary.json").read_text())["status"] == "finished"


def test_signal_to_the_process_group_saves_the_run(folder):
    """A cluster's scheduler signals the process group: the run and its decoding workers."""
    for index, name in enumerate(("cat", "dog")):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(40):
            Image.new("RGB", (16, 16), (100 * index, 3 * number, 0)).save(folder / "photos" / name / f"{number}.png")
    arguments = ("data=image_folder", "data.root=photos", "data.image_size=16", "data.batch_size=4", "model=mlp")
    arguments += ("data.memory_budget=0", "data.num_workers=2", "trainer.max_epochs=100000", "trainer.threads=1")
    arguments += ("trainer.log_graph=false", "trainer.early_stopping.patience=null", "run_dir=outputs/signalled")
    command = [sys.executable, str(ROOT / "scripts/train.py"), *arguments]
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, stderr=subprocess.PIPE, text=True)
    metrics_file = folder / "outputs/signalled/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics_file.exists() and metrics_file.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    summary = json.loads((folder / "outputs/signalled/summary.json").read_text())
    assert (summary["status"], summary["stop_reason"]) == ("interrupted", "SIGTERM")
    assert load_run(folder / "outputs/signalled", checkpoint="last").snapshot.step == summary["step"] > 0
    shutil.rmtree(folder / "outputs/signalled")


def test_runs_table_is_sorted_and_averages_over_seeds(folder):
    out = script("runs", "output=runs.csv", cwd=folder)
    rows = read_table(folder / "runs.csv")
    assert {"digits", "grid/0", "grid/1"} <= {row["run"] for row in rows}
    values = [float(row["val/accuracy"]) for row in rows if row["val/accuracy"]]
    assert values == sorted(values, reverse=True)
    # The last columns: validation and test accuracy with their 95% intervals (digits: 359 test images).
    digits = next(row for row in rows if row["run"] == "digits")
    test = float(digits["test/accuracy"])
    assert f"{test:.4f} ± {1.96 * (test * (1 - test) / 359) ** 0.5:.4f}" in out
    # The grid's runs and the single run differ only in the seed, so they are one experiment.
    values = [float(row["val/accuracy"]) for row in rows if row["run"] in ("grid/0", "grid/1", "single")]
    mean = sum(values) / 3
    sd = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
    assert f"{mean:.4f} ± {sd:.4f}" in out


def test_runs_of_a_grid_are_named_by_what_differs(folder, tmp_path):
    small = ("model=mlp", "model.hidden=[8]", "trainer.max_epochs=1", "trainer.threads=1")
    out = script("train", "-m", *small, "optimizer.lr=0.1,0.01", "name=small", "tags=[base,'[x]']", cwd=tmp_path)
    assert re.findall(r"^job \d: .*", out, re.MULTILINE) == ["job 0: optimizer.lr=0.1", "job 1: optimizer.lr=0.01"]
    names = sorted(path.name.split("-", 3)[3] for path in (tmp_path / "outputs").iterdir())
    assert names == ["small-lr_0.01", "small-lr_0.1"]
    script("train", *small, "name=other", cwd=tmp_path)
    script("train", "model=mlp", "trainer.threads=1", "debug=steps", "run_dir=outputs/debug", cwd=tmp_path)
    out = script("runs", "output=all.csv", cwd=tmp_path)
    assert len(read_table(tmp_path / "all.csv")) == 3 and "hidden: 1 with debug=..." in out
    out = script("runs", "output=all.csv", "where.debug=true", cwd=tmp_path)
    assert len(read_table(tmp_path / "all.csv")) == 4 and "hidden: " not in out
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "outputs")).Reload()
    with_hparams = [name for name in multiplexer.Runs() if multiplexer.PluginRunToTagToContent("hparams").get(name)]
    assert len(with_hparams) == 3 and "debug" not in with_hparams

    shown = script("runs", "output=runs.csv", "where.name=sm*", "where.tags=[base]", "where.data=digits", cwd=tmp_path)
    rows = read_table(tmp_path / "runs.csv")
    assert {(row["name"], row["tags"], row["differs"]) for row in rows} == {
        ("small", "base [x]", f"optimizer.lr={lr}") for lr in (0.1, 0.01)
    }
    assert "optimizer.lr=0.01" in shown and "base [x]" in shown
    none = run_script(ROOT / "scripts/runs.py", "where.tags=[base,missing]", cwd=tmp_path)
    assert none.returncode == 3 and "error[data] where: none of 4 runs has tag base, tag missing" in none.stderr


def test_init_from_a_run_with_other_classes_keeps_matching_tensors(folder):
    out = script(
        *("train", "init_from=outputs/digits", "data=synthetic", "data.num_classes=4", "data.channels=1"),
        *("data.train_samples=200", "trainer.max_steps=1", "run_dir=outputs/tuned", "trainer.threads=1"),
        cwd=folder,
    )
    assert "8 of 10 tensors loaded" in out and "(10, 84) -> (4, 84)" in out
    source = load_run(folder / "outputs/digits").snapshot.weights
    tuned = load_run(folder / "outputs/tuned", checkpoint="last").model.state_dict()
    same = [name for name in source if source[name].shape == tuned[name].shape]
    assert len(same) == 8
    for name in same:  # one small step from the weights of the source run
        assert (tuned[name] - source[name]).abs().max() < 0.2


def test_tensorboard_shows_one_run_with_filled_hparams(run_folder):
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(run_folder.parent / "digits")).Reload()
    assert list(multiplexer.Runs()) == ["."]
    run = multiplexer.GetAccumulator(".")
    tags = run.Tags()
    scalars = {tag: run.Scalars(tag) for tag in tags["scalars"]}
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
        assert [event.step for event in scalars[name]] == [line["step"] for line in lines]
        assert [event.value for event in scalars[name]] == pytest.approx([line[name] for line in lines], rel=1e-6)
    summary = json.loads((run_folder / "summary.json").read_text())
    assert [event.value for event in scalars["test/accuracy"]] == pytest.approx([summary["test"]["accuracy"]])
    for tag in ("step/loss", "step/gradient_norm", "lr/all", "momentum/all", "throughput/samples_per_second"):
        assert len(scalars[tag]) == summary["step"] // 50 + (summary["step"] % 50 != 0 and summary["epoch"] == 30)
    assert tags["images"] == ["train/augmented", "test/confusion_matrix", "test/worst_mistakes"]
    assert tags["graph"] is True
    assert "config/text_summary" in tags["tensors"]
    assert any(tag.startswith("weights/") for tag in tags["histograms"])
    assert any(tag.startswith("gradients/") for tag in tags["histograms"])
    image = Image.open(io.BytesIO(run.Images("train/augmented")[0].encoded_image_string))
    assert image.size == (8 * 34 + 2, 8 * 34 + 2)
    content = run.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = HParamsPluginData.FromString(content).session_start_info.hparams
    assert start["optimizer.lr"].number_value == pytest.approx(0.1)
    assert start["model"].string_value == "lenet5"
    content = run.summary_metadata["_hparams_/experiment"].plugin_data.content
    metric_names = {info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos}
    assert metric_names <= scalars.keys()  # each metric column has a value
    assert "_hparams_/session_end_info" in run.summary_metadata


def test_custom_model_of_contributing_trains_and_evaluates(tmp_path):
    """Uses the files and commands of the section "Add a model", in a folder outside the repository."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a model")[2].partition("\n## ")[0]
    for block in re.findall(r"```(?:python|yaml)\n(.*?)```", section, re.DOTALL):
        path = tmp_path / re.match(r"# (mine/[\w/]+\.\w+)", block)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
    train, evaluate = re.findall(r"^python scripts/(\w+)\.py (.*)", section, re.MULTILINE)

    def call(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_script(ROOT / "scripts" / f"{name}.py", *arguments, cwd=tmp_path, python_path=tmp_path / "mine")

    done = call(train[0], *shlex.split(train[1]), "trainer.max_epochs=12", "trainer.threads=1")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "outputs/pooled/summary.json").read_text())
    assert summary["parameters"] == 32 * 25 + 32 + 32 * 10 + 10  # model.filters=32 was passed to the model
    assert summary["test"]["accuracy"] > 0.3  # chance level: 0.1
    done = call(evaluate[0], *shlex.split(evaluate[1]))
    assert done.returncode == 0, done.stderr
    refused = call(evaluate[0], evaluate[1].split()[0])
    assert refused.returncode == 7 and "trust=[pooled]" in refused.stderr


def size_of_image(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_look_draws_images_classes_and_learning_rate(tmp_path):
    out = script(
        "look", "augment=[crop_flip,mixup]", "schedule=one_cycle", "trainer.max_epochs=3", "run_dir=look", cwd=tmp_path
    )
    splits, layers = out.split("Layers", 1)
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in splits.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["all"]] == ["1,294", "144", "359"] and len(rows) == 11
    assert "61,706" in layers and (tmp_path / "look/layers.csv").read_text().count("\n") == 8
    sizes = {path.name: size_of_image(path) for path in (tmp_path / "look").glob("*.png")}
    assert set(sizes) == {"images.png", "classes.png", "lr.png"} and all(min(size) > 200 for size in sizes.values())

    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    events.Reload()
    assert set(events.Runs()["look"]["images"]) == {"look/images", "look/classes", "look/lr"}
    steps = -(-1294 // 64) * 3
    curve = {event.step: event.value for event in events.Scalars("look", "lr/all")}
    assert curve[0] == pytest.approx(0.1 / 25) and max(curve.values()) == pytest.approx(0.1, rel=1e-3)
    assert len(curve) == steps and not (tmp_path / "look/config.yaml").exists()  # no training

    second = run_script(ROOT / "scripts/look.py", "run_dir=look", cwd=tmp_path)
    assert second.returncode == 5 and "look: exists already" in second.stderr


def test_curves_of_runs_are_drawn(folder):
    script("runs", "folder=outputs", "curves=curves.png", "sort=val/loss", cwd=folder)
    assert min(size_of_image(folder / "curves.png")) > 200

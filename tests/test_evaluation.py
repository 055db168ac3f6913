"""Evaluation of a finished run uses the same data and the same precision as its training."""

import json

import pytest
import torch
from conftest import trained
from PIL import Image

from analysis.evaluate import evaluate_run
from core.config import Config
from core.errors import CheckpointError, ConfigError, DataError
from core.json_lines import read_lines
from trainer.inference.evaluation import predict
from trainer.inference.load_run import load_run


def evaluated(folder, split="test", root=None, *, name=None, tta=None, output=None):
    values = {"run": str(folder), "split": split, "checkpoint": "best", "device": "cpu", "root": root, "trust": []}
    evaluate_run(Config(values=values | {"tta": tta, "output": output}, record={}, job=None))
    return json.loads((folder / (output or name or f"evaluation-{split}.json")).read_text())


def write_classes(root, classes):
    """Write images of 8 x 8 random grey values, `classes` of them per class."""
    generator = torch.Generator().manual_seed(len(classes))
    for label, count in classes.items():
        (root / label).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(256, (8, 8), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(root / label / f"{number}.png")


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    write_classes(root / "own", {"ant": 12, "bee": 12, "cat": 12})
    data = ("data=image_folder", f"data.root={root}/own", "data.image_size=8", "data.channels=1", "data.batch_size=8")
    trained(root / "run", *data, "trainer.max_epochs=1", "data.eval_batch_size=3")
    return root / "run"


def test_split_all_evaluates_another_folder_and_matches_classes_by_name(folder_run, tmp_path):
    write_classes(tmp_path / "new", {"cat": 5, "ant": 2})  # no bee: the position of a folder is not its label
    own = evaluated(folder_run)
    report = evaluated(folder_run, "all", str(tmp_path / "new"), name="evaluation-all-new.json")
    assert json.loads((folder_run / "evaluation-test.json").read_text()) == own
    run, matrix = load_run(folder_run), torch.zeros(3, 3, dtype=torch.int64)
    for file in sorted((tmp_path / "new").rglob("*.png")):
        prediction = run.model(run.transform(file)[None]).argmax().item()
        matrix[["ant", "bee", "cat"].index(file.parent.name), prediction] += 1
    assert report["confusion_matrix"] == matrix.tolist()
    assert report["samples"] == 7 and report["accuracy"] == pytest.approx(matrix.diag().sum().item() / 7)


def test_split_all_refuses_unknown_classes_and_lists_them(folder_run, tmp_path):
    write_classes(tmp_path / "new", {"ant": 1, "dog": 1, "elk": 1})
    with pytest.raises(DataError, match="not classes of the run: dog, elk; its classes: ant, bee, cat"):
        evaluated(folder_run, "all", str(tmp_path / "new"))
    write_classes(tmp_path / "splits", {"train/ant": 1, "val/ant": 1})
    with pytest.raises(DataError, match=rf"one split: root={tmp_path}/splits/val"):
        evaluated(folder_run, "all", str(tmp_path / "splits"))
    with pytest.raises(ConfigError, match="root=FOLDER"):
        evaluated(folder_run, "all")


def test_evaluate_applies_another_test_time_augmentation(folder_run, tmp_path):
    write_classes(tmp_path / "new", {"ant": 4, "bee": 3})
    root = str(tmp_path / "new")
    report = evaluated(folder_run, "all", root, tta="mirror", name="evaluation-all-new-mirror.json")
    run = load_run(folder_run)
    files = sorted((tmp_path / "new").rglob("*.png"))
    images = torch.stack([run.transform(file) for file in files])
    with torch.inference_mode():
        logits = (run.model(images) + run.model(images.flip(-1))) / 2
    labels = torch.tensor([["ant", "bee"].index(file.parent.name) for file in files])
    expected = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert report["cross_entropy"] == pytest.approx(expected, rel=1e-5) and report["tta"] == "mirror"
    plain = evaluated(folder_run, "all", root, output=str(tmp_path / "plain.json"))
    assert plain["tta"] == "none" and plain["cross_entropy"] != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluate_computes_in_the_precision_of_the_run(tmp_path, precision):
    run = trained(tmp_path / "run", f"trainer.precision={precision}", "data.test_samples=60", "model.hidden=[32,32]")
    test = json.loads((tmp_path / "run/summary.json").read_text())["test"]
    report = evaluated(tmp_path / "run")
    assert report["accuracy"] == test["accuracy"]
    assert report["cross_entropy"] == pytest.approx(test["loss"], rel=1e-6)
    loaded = load_run(tmp_path / "run")
    low, full = (
        predict(loaded.model, run.training.test_loader, autocast=dtype)[0] for dtype in (loaded.autocast, None)
    )
    assert torch.equal(low, full) == (precision == "fp32")  # the precision changes the logits


def test_evaluate_refuses_data_that_differs_from_the_training_data(tmp_path):
    trained(tmp_path / "run", "trainer.max_epochs=1")
    file = tmp_path / "run/config.yaml"
    file.write_text(file.read_text().replace("test_samples: 16", "test_samples: 17"))
    with pytest.raises(CheckpointError, match="differs from the data this run was trained on"):
        evaluated(tmp_path / "run")


def test_tensorboard_that_cannot_be_opened_gives_one_warning(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("cannot create events")

    monkeypatch.setattr("trainer.report.tensorboard_writer.SummaryWriter", refuse)
    trained(tmp_path / "run", "trainer.max_epochs=1", "trainer.log_graph=true", "trainer.log_images=true")
    warnings = [line["text"] for line in read_lines(tmp_path / "run/events.jsonl") if line["event"] == "warning"]
    assert len(warnings) == 1 and "TensorBoard" in warnings[0] and "cannot create events" in warnings[0]

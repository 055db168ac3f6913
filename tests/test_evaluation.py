"""Evaluation of a finished run uses the same data and the same precision as its training."""

import json

import pytest
import torch
from conftest import trained

from analysis.evaluate import evaluate_run
from core.config import Config
from core.errors import CheckpointError
from core.json_lines import read_lines
from trainer.inference.evaluation import predict
from trainer.inference.load_run import load_run


def evaluated(folder, split="test", root=None):
    values = {"run": str(folder), "split": split, "checkpoint": "best", "device": "cpu", "root": root, "trust": []}
    evaluate_run(Config(values=values, record={}, job=None))
    return json.loads((folder / f"evaluation-{split}.json").read_text())


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

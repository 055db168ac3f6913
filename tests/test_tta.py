"""Test-time augmentation: all metrics use the mean logits of an image and its mirror image."""

import copy
import json

import pytest
import torch
from conftest import trained
from torch import nn
from torch.nn import functional

from core.json_lines import read_lines
from trainer.inference.evaluation import predict
from trainer.inference.load_run import load_run
from trainer.inference.tta import with_tta


@pytest.mark.parametrize("average", [(), ("trainer.ema_decay=0.9",)])
def test_metrics_use_the_mean_logits_of_image_and_mirror_image(tmp_path, average):
    folder = tmp_path / "run"
    run = trained(folder, "trainer.tta=mirror", "trainer.checkpoint.monitor=null", *average)
    model = run.state.models["ema"] if average else run.state.model
    model.eval()

    def measured(loader):
        (images, labels, _), *_ = loader  # one batch contains all samples
        with torch.no_grad():
            logits = (model(images) + model(torch.flip(images, dims=[-1]))) / 2
        hits = (logits.argmax(1) == labels).double().mean().item()
        return logits, functional.cross_entropy(logits, labels).item(), hits

    logits, loss, accuracy = measured(run.training.test_loader)
    assert json.loads((folder / "summary.json").read_text())["test"] == pytest.approx(
        {"loss": loss, "accuracy": accuracy}, rel=1e-6
    )
    line = read_lines(folder / "metrics.jsonl")[-1]
    assert (line["val/loss"], line["val/accuracy"]) == pytest.approx(measured(run.training.val_loader)[1:], rel=1e-6)
    # evaluate.py, predict.py and notebooks use `load_run`.
    assert torch.equal(predict(load_run(folder).model, run.training.test_loader)[0], logits)
    with torch.no_grad():
        plain = model(next(iter(run.training.test_loader)).images)
    assert (plain - logits).abs().max() > 0.01  # the mirror image changes the logits


def test_training_does_not_depend_on_tta(tmp_path):
    overrides = ("model.dropout=0.3", "model.batch_norm=true")
    runs = [trained(tmp_path / tta, f"trainer.tta={tta}", *overrides) for tta in ("none", "mirror")]
    states = [run.state.model.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("training", [True, False])
def test_with_tta_keeps_the_training_mode_and_the_state_names(training):
    model = nn.Sequential(nn.Dropout(0.5)).train(training)
    averaged = with_tta(model, "mirror")
    assert averaged.training == model.training == training
    assert with_tta(model, "none") is model
    assert set(averaged.state_dict()) == set(copy.deepcopy(model).state_dict())

"""Test-time augmentation: every figure is that of the mean over an image and its mirror image."""

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
def test_metrics_are_those_of_the_mean_logits_of_both_sides(tmp_path, average):
    folder = tmp_path / "run"
    run = trained(folder, "trainer.tta=mirror", "trainer.checkpoint.monitor=null", *average)
    network = run.state.models["ema"] if average else run.state.model
    network.eval()

    def measured(loader):
        (images, labels, _), *_ = loader  # one batch holds all
        with torch.no_grad():
            logits = (network(images) + network(torch.flip(images, dims=[-1]))) / 2
        hits = (logits.argmax(1) == labels).double().mean().item()
        return logits, functional.cross_entropy(logits, labels).item(), hits

    logits, loss, accuracy = measured(run.training.test_loader)
    assert json.loads((folder / "summary.json").read_text())["test"] == pytest.approx(
        {"loss": loss, "accuracy": accuracy}, rel=1e-6
    )
    line = read_lines(folder / "metrics.jsonl")[-1]
    assert (line["val/loss"], line["val/accuracy"]) == pytest.approx(measured(run.training.val_loader)[1:], rel=1e-6)
    # evaluate.py, predict.py and notebooks use the run as it is loaded.
    assert torch.equal(predict(load_run(folder).model, run.training.test_loader)[0], logits)
    with torch.no_grad():
        plain = network(next(iter(run.training.test_loader)).images)
    assert (plain - logits).abs().max() > 0.01  # it makes a difference


def test_training_is_the_same_with_and_without(tmp_path):
    given = ("model.dropout=0.3", "model.batch_norm=true")
    runs = [trained(tmp_path / tta, f"trainer.tta={tta}", *given) for tta in ("none", "mirror")]
    states = [run.state.model.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays_as_it_was(training):
    network = nn.Sequential(nn.Dropout(0.5)).train(training)
    both = with_tta(network, "mirror")
    assert both.training == network.training == training
    assert with_tta(network, "none") is network
    assert set(both.state_dict()) == set(copy.deepcopy(network).state_dict())

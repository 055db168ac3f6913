"""Every model learns with its default learning rate; runs that learn nothing are reported."""

import json
import re

import pytest
import torch
from conftest import built, composed, run_to_end, trained

from core.config import CONFIGS
from core.errors import ConfigError
from core.json_lines import read_lines
from trainer.build.training import build
from trainer.monitor.verdict import warnings_of

STEPS = 100
# More than 5 seconds for 100 steps on one core.
SLOW = {
    *("alexnet", "googlenet", "inception_v3", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "plain18"),
    *("plain34", "resnet110", "plain110", "resnet56", "plain56", "vgg16_small", "vgg11", "vgg13", "vgg16", "vgg19"),
    *("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
}
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("[!_]*.yaml"))
DATA = ("data=synthetic", "data.train_samples=1900", "data.channels=3", "data.batch_size=16", "data.test_samples=16")


def smallest(model: str):
    """Return a training of a model with its default values, on the smallest images that it accepts."""
    size = 8
    while True:
        overrides = (
            f"model={model}",
            *DATA,
            f"data.image_size={size}",
            "data.num_classes=10",
            f"trainer.max_steps={STEPS}",
        )
        try:
            return build(composed(*overrides, "trainer.max_epochs=null", DEFAULT_LR))[0]
        except ConfigError as error:
            if size > 256:
                raise
            least = re.search(r"at least (\d+) pixels", str(error))
            size = int(least[1]) if least else size * 2


DEFAULT_LR = "optimizer.lr=${oc.select:recommended.lr,0.1}"  # conftest's SMALL has another one


@pytest.mark.parametrize(
    "model",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS if name != "torchvision"],
)
def test_model_learns_in_100_steps_with_default_values(model):
    """The mean loss of the last 20 steps is below that of the first 20."""
    training = smallest(model)
    state, losses = training.state, []
    for step in (step for epoch in range(2) for step in training.train_loader.steps(epoch)):
        state.model.train()
        state.schedule.apply(state.optimizer, state.step)
        torch.default_generator.manual_seed(state.step)
        state.advance(training.step(step).samples)
        training.step.clear_gradients()
        losses.append(state.sums.read()["loss"])
        if state.step == STEPS:
            break
    assert len(losses) == STEPS
    assert sum(losses[-20:]) < sum(losses[:20]), losses


def test_healthy_run_is_not_reported(tmp_path):
    run = trained(tmp_path / "run", "trainer.max_epochs=10")
    assert run.state.step >= 50
    assert [line for line in read_lines(tmp_path / "run" / "events.jsonl") if line["event"] == "warning"] == []


def test_run_that_learns_nothing_is_reported(tmp_path):
    """A learning rate near 0: the accuracy stays at that of a constant prediction."""
    run = built(tmp_path / "run", "trainer.max_epochs=10", "optimizer.lr=1e-12")
    with torch.no_grad():
        run.state.model.head.weight.zero_()
        run.state.model.head.bias[0] = 1
    run_to_end(run)
    *_, warning = [line["text"] for line in read_lines(tmp_path / "run" / "events.jsonl") if line["event"] == "warning"]
    test = json.loads((tmp_path / "run" / "summary.json").read_text())["test"]
    assert f"test accuracy {test['accuracy']:.2%}" in warning and "most frequent class" in warning


@pytest.mark.parametrize(
    ("test", "steps", "count"),
    [
        ({"loss": 3.7e30, "accuracy": 0.5}, 60, 1),
        ({"loss": float("nan"), "accuracy": 0.5}, 60, 1),
        ({"loss": 3.7e30, "accuracy": 0.1}, 60, 2),
        ({"loss": 2.0, "accuracy": 0.26}, 60, 1),
        ({"loss": 2.0, "accuracy": 0.27}, 60, 0),
        ({"loss": 3.7e30, "accuracy": 0.1}, 49, 0),
        ({}, 60, 0),
    ],
)
def test_verdict_of_loss_and_accuracy(test, steps, count):
    assert len(warnings_of(test, steps=steps, first_loss=2.3, constant_accuracy=0.26)) == count

"""check.py before training: planted faults on several models and data sets are found, healthy ones give no finding."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import composed, run_script
from PIL import Image
from torch import nn

from analysis.check.data_evidence import difference_of, measure_data
from analysis.check.duplicates import find_duplicates
from analysis.check.gradient_check import wrong_gradients
from analysis.check.model_evidence import measure_model
from diagnosis.data_rules import data_findings
from diagnosis.model_rules import model_findings
from diagnosis.start_evidence import DataEvidence
from trainer.build.training import build
from trainer.optim.losses import CrossEntropy, Objective

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.thorough
COLOUR = ("data=synthetic", "data.channels=3", "data.image_size=32", "data.num_classes=4", "data.train_samples=200")


def findings_of(*overrides: str) -> dict[str, str]:
    """Return {id: severity} of a training's findings on its model; the state is unchanged."""
    config = composed(*overrides)
    training, _ = build(config)
    before = {name: tensor.clone() for name, tensor in training.state.model.state_dict().items()}
    findings = model_findings(measure_model(training, config.values, seconds=20))
    after = training.state.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return {finding.id: finding.severity for finding in findings}


# Models


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=mlp", "model.hidden=[64,64]"),
        ("model=mlp", "model.hidden=[64]", "model.dropout=0.5", "model.batch_norm=true", "data.batch_size=32"),
        ("data=digits", "model=lenet5"),
        (*COLOUR, "model=resnet20", "data.batch_size=32"),
        (*COLOUR, "model=vgg_tiny", "data.batch_size=32"),
        (*COLOUR, "model=inception_small", "data.batch_size=32"),
        (*COLOUR, "model=googlenet", "data.image_size=64", "data.batch_size=16"),  # auxiliary heads
    ],
    ids=lambda overrides: overrides[-1] if isinstance(overrides, tuple) else None,
)
def test_healthy_model_has_no_finding(overrides):
    assert findings_of(*overrides, "optimizer.lr=${oc.select:recommended.lr,0.05}") == {}


class Doubled(torch.autograd.Function):
    """The identity, with a gradient that is twice as large as it should be."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class WithWrongGradient(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.before, self.after = layers

    def forward(self, images):
        return self.after(Doubled.apply(self.before(images)))


MODELS = {
    "linear": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh()), nn.Linear(8, 5)),
    "convolution": lambda: (nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))),
    "batch norm": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 5)),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_wrong_gradient_is_found_and_its_layers_are_named(name):
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 4])
    objective = Objective(CrossEntropy(label_smoothing=0.1), auxiliary_weight=0.3)
    before, after = MODELS[name]()
    assert wrong_gradients(nn.Sequential(before, after), objective, images, labels, seconds=10) == {}
    wrong = wrong_gradients(WithWrongGradient(before, after), objective, images, labels, seconds=10)
    assert wrong and all(key.startswith("before.") for key in wrong)
    # A gradient of 2 g in place of g: the relative error is |g - 2 g| / |2 g| = 0.5.
    weights = [error for key, error in wrong.items() if key.endswith("weight")]
    assert weights and all(error == pytest.approx(0.5, abs=1e-3) for error in weights)


@pytest.mark.parametrize(
    "overrides",
    [("model=mlp", "model.hidden=[32,32]"), ("data=digits", "model=lenet5"), (*COLOUR, "model=vgg_tiny")],
)
def test_equal_initial_weights_are_found(overrides):
    assert findings_of(*overrides, "model.init=equal_anyway").get("symmetric_init") == "error"


@pytest.mark.parametrize("data", [(), ("data=digits",), COLOUR])
def test_vanishing_gradients_of_a_deep_sigmoid_model_are_found(data):
    deep = ("model=mlp", f"model.hidden=[{','.join(['32'] * 20)}]", "model.activation=sigmoid")
    assert findings_of(*data, *deep)["vanishing_gradient"] == "warning"


def test_small_batches_of_batch_norm_are_found():
    normalised = ("model=mlp", "model.hidden=[16]", "model.batch_norm=true")
    assert findings_of(*normalised, "data.batch_size=2")["batchnorm_small_batch"] == "warning"
    assert "batchnorm_small_batch" not in findings_of("model=mlp", "model.hidden=[16]", "data.batch_size=2")


def test_large_logits_and_large_inputs_are_found():
    config = composed("model=mlp", "model.hidden=[32]")
    training, _ = build(config)
    with torch.no_grad():
        for parameter in training.state.model.parameters():
            parameter.mul_(30)
    evidence = measure_model(training, config.values, seconds=5)
    assert "initial_loss_off" in [finding.id for finding in model_findings(evidence)]
    shifted = replace(evidence, input_mean=110.0, input_std=60.0)
    assert "input_not_normalised" in [finding.id for finding in model_findings(shifted)]


# Duplicates


@pytest.fixture
def natural() -> torch.Tensor:
    """Return 60 smooth random images of colour, uint8 (60, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(60, 3, 6, 6, generator=generator)
    images = nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)
    return (255 * images).round().to(torch.uint8)


def test_copies_are_found_exactly_and_after_small_changes(natural):
    train, others = natural[:40], natural[40:]
    generator = torch.Generator().manual_seed(1)
    noise = 6 * torch.randn(3, 3, 32, 32, generator=generator)
    noisy = (train[:3].float() + noise).clamp(0, 255).round().to(torch.uint8)
    brighter = (train[3:6].float() * 0.9 + 20).clamp(0, 255).round().to(torch.uint8)
    shifted = train[6:9].roll(1, dims=3)
    held_out = torch.cat([others, train[9:12], noisy, brighter, shifted])
    result = find_duplicates(held_out, train)
    assert result.exact == [(20, 9), (21, 10), (22, 11)]
    assert result.near == [(23 + index, index) for index in range(9)]


def test_alike_images_of_digits_are_no_duplicates():
    _, splits = build(composed("data=digits"))
    evidence = measure_data(splits, composed("data=digits").values)
    assert data_findings(evidence) == [] and evidence.compared["test"] == 359


# Folders of images, through the command


def write_images(root: Path, split: str, counts: dict[str, int], *, seed: int, brightness: int = 0) -> list[Path]:
    generator = np.random.default_rng(seed)
    paths = []
    for label, (name, number) in enumerate(counts.items()):
        for index in range(number):
            image = generator.integers(0, 100, (20, 20, 3)) + 40 * label + brightness
            path = root / split / name / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
            paths.append(path)
    return paths


def check(root: Path) -> tuple[int, dict[str, str]]:
    """Return exit code and {id: severity} of check.py on a folder of images."""
    out = root.with_suffix(".out")
    done = run_script(
        ROOT / "scripts/check.py",
        *("data=image_folder", f"data.root={root}", "data.image_size=16", "model=mlp", "model.hidden=[16]"),
        *("trainer.threads=1", "data.batch_size=8", "optimizer.lr=0.01", f"run_dir={out}"),
        cwd=root.parent,
    )
    content = json.loads((out / "check.json").read_text())["findings"]
    assert all(finding["id"] in done.stdout for finding in content)
    return done.returncode, {finding["id"]: finding["severity"] for finding in content}


@pytest.mark.parametrize(
    ("fault", "expected", "code"),
    [
        (None, None, 0),
        ("copies", ("split_leak", "error"), 8),
        ("imbalance", ("class_imbalance", "warning"), 0),
        ("constant", ("constant_input", "warning"), 0),
        ("brighter", ("distribution_shift", "warning"), 0),
    ],
)
def test_planted_fault_of_a_folder_is_found(tmp_path, fault, expected, code):
    root = tmp_path / "photos"
    counts = {"cat": 60, "dog": 4 if fault == "imbalance" else 60}
    train = write_images(root, "train", counts, seed=0)
    others = {"cat": 30, "dog": 2 if fault == "imbalance" else 30}
    held_out = write_images(root, "val", others, seed=1, brightness=90 if fault == "brighter" else 0)
    write_images(root, "test", others, seed=2)
    if fault == "copies":
        for source, target in zip(train[:10], held_out[:10]):
            target.write_bytes(source.read_bytes())
    if fault == "constant":
        for path in train[:10]:
            Image.new("RGB", (20, 20), (80, 80, 80)).save(path)
    assert check(root) == (code, dict([expected]) if expected else {})


def test_difference_of_splits_is_cohens_d():
    reference = torch.tensor([0.0, 2.0, 4.0])
    assert difference_of(torch.tensor([5.0, 5.0]), reference) == pytest.approx((5 - 2) / 2)


def test_class_without_images_is_found():
    for split, expected in (("train", "error"), ("val", "warning")):
        counts = {"train": {"a": 5, "b": 5}, "val": {"a": 5, "b": 5}}
        counts[split]["b"] = 0
        (finding,) = data_findings(DataEvidence(counts=counts, config={"loss": {}}))
        assert (finding.id, finding.severity) == ("missing_class", expected)
        assert f"{split} has no image of b" in finding.explanation


def test_class_weights_answer_class_imbalance():
    counts = {"train": {"a": 500, "b": 20}}
    for weights, expected in ((None, ["class_imbalance"]), ("balanced", [])):
        evidence = DataEvidence(counts=counts, config={"loss": {"class_weights": weights}})
        assert [finding.id for finding in data_findings(evidence)] == expected

"""Losses compared with double-precision sums over Python floats; mixed labels; losses of auxiliary heads."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import built, composed, run_to_end, trained
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from core.errors import ConfigError, NumericalError
from core.json_lines import read_lines
from trainer.build.training import build
from trainer.inference import evaluation
from trainer.inference.load_run import load_run
from trainer.monitor.metrics import RunningSums
from trainer.optim.losses import BinaryCrossEntropy, CrossEntropy, Huber, Objective, SquaredError, balanced_weights

LOSSES = {
    "cross_entropy": CrossEntropy,
    "squared_error": SquaredError,
    "huber": lambda **options: Huber(delta=0.3, **options),
    "binary_cross_entropy": BinaryCrossEntropy,
}


def loss_by_formula(
    name: str, row: list[float], target: list[float], smoothing: float, weights: list[float] | None
) -> float:
    """Return the loss of one sample by the formula in the docstring of the loss."""
    classes = len(row)
    smoothed = [(1 - smoothing) * share + smoothing / classes for share in target]
    total = sum(math.exp(value) for value in row)
    probabilities = [math.exp(value) / total for value in row]
    weights = weights or [1.0] * classes
    loss = 0.0
    if name == "cross_entropy":
        loss = -sum(q * math.log(p) for q, p in zip(smoothed, probabilities))
    for value, p, q in zip(row, probabilities, smoothed) if name != "cross_entropy" else ():
        if name == "squared_error":
            loss += (p - q) ** 2
        elif name == "huber":
            loss += (p - q) ** 2 / 2 if abs(p - q) <= 0.3 else 0.3 * (abs(p - q) - 0.15)
        else:
            sigmoid = 1 / (1 + math.exp(-value))
            loss -= q * math.log(sigmoid) + (1 - q) * math.log(1 - sigmoid)
    return loss * sum(w * share for w, share in zip(weights, target))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, [0.5, 2.0, 1.0, 3.0]])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_values_computed_by_hand(name, class_weights, smoothing, mixed):
    generator = torch.Generator().manual_seed(0)
    logits, labels = 2 * torch.randn(9, 4, generator=generator), torch.randint(0, 4, (9,), generator=generator)
    rows = functional.one_hot(labels, 4).double()
    if mixed:  # as after mixup: two labels each, possibly the same
        rows = 0.7 * rows + 0.3 * rows.roll(1, dims=0)
    sample_losses = [
        loss_by_formula(name, *pair, smoothing, class_weights) for pair in zip(logits.double().tolist(), rows.tolist())
    ]
    loss = LOSSES[name](label_smoothing=smoothing, class_weights=class_weights)
    value = loss(logits, rows.float() if mixed else labels)
    assert value.shape == () and value.item() == pytest.approx(sum(sample_losses) / 9, rel=1e-5)
    assert loss(logits, rows.float()).item() == pytest.approx(value.item(), rel=1e-6)  # a label equals a one-hot row


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_a_confident_error_is_finite(name, dtype):
    """Logits far beyond the overflow of exp; also in 16 bits, where a sum over many classes would lose small terms."""
    logits = torch.full((2, 1000), -3e4, dtype=dtype).requires_grad_()
    with torch.no_grad():
        logits[:, 0] = 3e4
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = LOSSES[name](class_weights=[1.0] * 1000)(logits, torch.tensor([1, 0]))
    loss.backward()
    expected = {"cross_entropy": 3e4, "squared_error": 1, "huber": 0.3 * 0.85, "binary_cross_entropy": 3e4}[name]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=3e-3)
    assert logits.grad.isfinite().all()


def test_loss_of_16_bit_logits_is_summed_in_32_bits():
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(8)
    for name, make in LOSSES.items():
        assert make()(logits, labels).item() == pytest.approx(make()(logits.float(), labels).item(), rel=1e-6), name


def test_huber_at_delta_1_is_half_the_squared_error():
    logits, labels = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 4
    assert Huber(delta=1)(logits, labels).item() == pytest.approx(SquaredError()(logits, labels).item() / 2, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_overfits_a_batch(tmp_path, name):
    overrides = ("loss.class_weights=balanced", "debug=overfit", "trainer.max_epochs=200")
    lines = read_lines(trained(tmp_path / "run", f"loss={name}", *overrides).folder.path / "metrics.jsonl")
    assert lines[-1]["train/accuracy"] == 1 and lines[-1]["train/loss"] < 0.1 * lines[0]["train/loss"], lines


def test_balanced_class_weights_are_inverse_to_class_counts(tmp_path):
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    weights = balanced_weights(labels, 4)
    assert weights[:2] == pytest.approx([10 / 24, 10 / 12]) and weights[3] == pytest.approx(2.5)
    run = built(tmp_path / "run", "loss.class_weights=balanced")
    counts = run.training.train_loader.source.labels.bincount()
    assert run.training.loss_function.class_weights.tolist() == pytest.approx(
        [44 / (4 * count) for count in counts.tolist()]
    )


COLOURS = {"red": (190, 70, 60), "blue": (60, 80, 190)}


def colour_folder(root: Path, *, red: int, blue: int) -> Path:
    """Write images of two colours with noise, in one folder per class."""
    generator = np.random.default_rng(0)
    for (name, colour), count in zip(COLOURS.items(), (red, blue)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(generator.normal(colour, 25, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.mark.parametrize("name", LOSSES)
def test_balanced_weights_with_label_smoothing_learn_both_classes(tmp_path, name):
    """400 to 4 images: a weight on the smoothed share of the rare class would outweigh the labels of the other."""
    data = ("data=image_folder", f"data.root={colour_folder(tmp_path / 'colours', red=4, blue=400)}")
    overrides = (*data, "data.image_size=16", "data.batch_size=32", "model=mlp", "model.hidden=[16]")
    run = trained(
        tmp_path / "run", *overrides, f"loss={name}", "loss.class_weights=balanced", "loss.label_smoothing=0.1"
    )
    assert run.state.best["metrics"]["val/accuracy"] == 1


def test_class_weights_by_name_or_integer_are_printed_in_class_order(tmp_path, capsys):
    data = ("data=image_folder", f"data.root={colour_folder(tmp_path / 'colours', red=10, blue=10)}")
    overrides = (*data, "data.image_size=16", "data.batch_size=4", "model=mlp", "model.hidden=[16]")
    for number, (weights, expected) in enumerate(
        {"{red: 9}": [1, 9], "[1,9]": [1, 9], "{blue: 0.5}": [0.5, 1]}.items()
    ):
        run = built(tmp_path / str(number), *overrides, f"loss.class_weights={weights}")
        assert run.training.loss_function.class_weights.tolist() == expected
        assert f"class weights: blue {expected[0]}, red {expected[1]}" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match="loss.class_weights.rot: the data has no such class; did you mean|its classes"
    ):
        built(tmp_path / "wrong", *overrides, "loss.class_weights={rot: 9}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.class_weights=[1,2]"], r"loss.class_weights = \[1, 2\]: must be a list of 4"),
        (["loss=huber", "loss.delta=0"], r"loss.delta = 0: must be a number in \(0, 1\]"),
        (["loss=huber", "loss.delta=1.5"], r"loss.delta = 1.5: must be a number in \(0, 1\]"),
        (["loss=squared_error", "loss.label_smoothing=1"], r"loss.label_smoothing = 1: must be a number in \[0, 1\)"),
        (["loss.auxiliary_weight=-0.3"], r"loss.auxiliary_weight = -0.3: must be a number >= 0, or null"),
    ],
)
def test_config_error_names_the_key_of_a_loss(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(composed(*overrides))


# Mixed labels


def test_accuracy_of_a_mixed_sample_uses_its_larger_share():
    sums = RunningSums()
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0]])
    sums.add(torch.tensor(2.0), logits, torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.0, 1.0, 0.0]]))
    sums.add(torch.tensor(4.0), logits[:1], torch.tensor([[0.0, 1.0, 0.0]]))
    assert sums.read() == {"loss": 2.5, "accuracy": 0.5}


def test_running_sums_do_not_depend_on_when_they_are_computed():
    """The losses round differently if summed in another order. A batch that is taken back does not count."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.rand((), generator=generator) * 10**power,
            torch.rand(size, 5, generator=generator),
            torch.arange(size) % 5,
        )
        for power, size in zip(range(-6, 6), (3, 4) * 6, strict=True)
    ]
    total, correct, count = 0.0, 0, 0
    for number, (loss, logits, labels) in enumerate(batches):
        if number != 7:
            total += loss.item() * len(labels)
            correct += sum(int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True))
            count += len(labels)
    for every in (1, 2, 5, 12):
        sums = RunningSums()
        for number, batch in enumerate(batches):
            sums.add(*batch)
            sums.discard(1, torch.tensor(float(number == 7)))
            if number % every == 0:
                assert sums.state_dict()["window"][2] == sum(
                    len(labels) for _, _, labels in batches[: number + 1]
                ) - 4 * (number >= 7)
        restored = RunningSums()
        restored.load_state_dict(json.loads(json.dumps(sums.state_dict())))
        assert restored.read() == sums.read() == {"loss": total / count, "accuracy": correct / count}


def test_loop_accepts_class_probabilities_as_targets(tmp_path):
    """One-hot rows give the same training as labels; mixtures of two labels give a different one."""
    runs = []
    for number, share in enumerate((None, 1.0, 0.6)):
        run = built(tmp_path / str(number), "trainer.accumulate=2", "trainer.checkpoint.monitor=null")
        if share:
            feed_mixed(run, share)
        run_to_end(run)
        runs.append((run.state.model.head.weight.detach().clone(), read_lines(run.folder.path / "metrics.jsonl")[-1]))
    (labels, by_label), (rows, by_row), (mixed, _) = runs
    torch.testing.assert_close(rows, labels, rtol=1e-5, atol=1e-7)
    assert by_row["train/accuracy"] == by_label["train/accuracy"]
    assert by_row["val/loss"] == pytest.approx(by_label["val/loss"], rel=1e-6)
    assert not torch.allclose(mixed, labels, rtol=1e-2)


def feed_mixed(run: Any, share: float) -> None:
    steps = run.training.train_loader.steps

    def mixed(epoch: int, start: int = 0) -> Any:
        for batches in steps(epoch, start):
            rows = [functional.one_hot(labels, 4).float() for _, labels, _ in batches]
            rows = [share * row + (1 - share) * row.roll(1, dims=1) for row in rows]
            yield [(images, row, indices) for (images, _, indices), row in zip(batches, rows)]

    run.training.train_loader.steps = mixed


# Auxiliary heads


class WithHeads(nn.Module):
    """A model with one hidden layer and two auxiliary heads; `dropout` sets `auxiliary_weight` in these tests."""

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int, dropout: float, **_: Any) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, 8), nn.ReLU())
        self.head = nn.Linear(8, num_classes)
        self.first, self.second = nn.Linear(8, num_classes), nn.Linear(8, num_classes)
        if dropout:  # as in a model that defines its own weight
            self.auxiliary_weight = dropout

    def forward(self, images: Tensor) -> Any:
        """Return logits (B, num_classes) of images (B, C, H, W); in training mode a tuple of three."""
        features = self.features(images)
        logits = self.head(features)
        return (logits, self.first(features), self.second(features)) if self.training else logits


class WrongHead(WithHeads):
    """A model whose last auxiliary head has one class too few."""

    def forward(self, images: Tensor) -> Any:
        """Return logits as WithHeads does."""
        outputs = super().forward(images)
        return (*outputs[:2], outputs[2][:, 1:]) if self.training else outputs


HEADS = ("model._target_=test_losses.WithHeads", "trainer.checkpoint.monitor=null")


def test_objective_equals_its_formula():
    logits = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9) % 4
    single = [functional.cross_entropy(head_logits, labels) for head_logits in logits]
    objective = Objective(CrossEntropy(), auxiliary_weight=0.4)
    total, loss, returned = objective(tuple(logits), labels)
    assert total.item() == pytest.approx((single[0] + 0.4 * single[1] + 0.4 * single[2]).item(), rel=1e-6)
    assert torch.equal(loss, single[0]) and torch.equal(returned, logits[0])
    total, loss, returned = objective(logits[0], labels)
    assert total is loss and torch.equal(loss, single[0]) and returned.data_ptr() == logits.data_ptr()


def test_torchvision_outputs_have_the_logits_first():
    from torchvision.models import GoogLeNetOutputs, InceptionOutputs

    assert GoogLeNetOutputs._fields[0] == InceptionOutputs._fields[0] == "logits"


@pytest.mark.parametrize(
    ("overrides", "weight"),
    [([], 0.3), (["model.dropout=0.4"], 0.4), (["model.dropout=0.4", "loss.auxiliary_weight=0"], 0.0)],
)
def test_step_includes_auxiliary_losses_and_logs_only_the_main_loss(tmp_path, overrides, weight):
    plain = ("optimizer.momentum=0", "optimizer.weight_decay=0", "trainer.accumulate=2", "trainer.max_steps=1")
    run = trained(tmp_path / "run", *HEADS, *plain, *overrides)
    model = built(tmp_path / "other", *HEADS, *plain, *overrides).state.model
    (batches,) = [next(iter(run.training.train_loader.steps(0)))]
    images, labels = (torch.cat([batch[field] for batch in batches]) for field in (0, 1))
    losses = [functional.cross_entropy(logits, labels) for logits in model.train()(images)]
    (losses[0] + weight * losses[1] + weight * losses[2]).backward()
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 0.05 * parameter.grad
        torch.testing.assert_close(run.state.model.get_parameter(name).detach(), expected, rtol=1e-5, atol=1e-7)
    (line,) = read_lines(run.folder.path / "metrics.jsonl")
    assert line["train/loss"] == pytest.approx(losses[0].item(), rel=1e-6)
    logits = run.state.model.eval()(torch.cat([images for images, _, _ in run.training.val_loader]))
    val_labels = torch.cat([labels for _, labels, _ in run.training.val_loader])
    assert line["val/loss"] == pytest.approx(functional.cross_entropy(logits, val_labels).item(), rel=1e-5)


def test_nonfinite_auxiliary_loss_ends_the_run(tmp_path):
    run = built(tmp_path / "run", *HEADS)
    run.state.model.second.register_forward_hook(
        lambda _, __, logits: logits * math.inf if run.state.step == 3 else None
    )
    with pytest.raises(NumericalError, match=r"step 4 .*loss nan"):
        run_to_end(run)


def test_auxiliary_head_with_a_wrong_number_of_classes_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"gives \(2, 3\) for two images; the classes of the data require \(2, 4\)"):
        build(composed("model._target_=test_losses.WrongHead"))


@pytest.mark.parametrize(("loss", "function"), [("cross_entropy", "softmax"), ("binary_cross_entropy", "sigmoid")])
def test_load_run_returns_the_probabilities_of_its_loss(tmp_path, loss, function):
    trained(tmp_path / "run", f"loss={loss}", "trainer.max_epochs=1", "optimizer.lr=0.01")
    run = load_run(tmp_path / "run")
    logits = torch.tensor([[1.0, -2.0, 3.0, 0.0]])
    expected = logits.softmax(1) if function == "softmax" else 1 / (1 + (-logits).exp())
    torch.testing.assert_close(run.probabilities(logits), expected)


def test_evaluation_does_not_depend_on_the_number_of_pending_logits(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(23, 6, generator=generator), torch.randint(4, (23,), generator=generator)
    model = nn.Linear(6, 4)
    batches = list(zip(images.split(5), labels.split(5), torch.arange(23).split(5), strict=True))
    results = []
    for limit in (1, 41, 2**24):
        monkeypatch.setattr(evaluation, "MAX_PENDING_LOGITS", limit)
        results.append(evaluation.evaluate(model, nn.CrossEntropyLoss(), batches, autocast=nullcontext()))
    assert results[0] == results[1] == results[2] and model.training
    logits = model(images).double()
    assert results[0]["loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert results[0]["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    images[7] = math.nan
    assert math.isnan(evaluation.evaluate(model, nn.CrossEntropyLoss(), batches, autocast=nullcontext())["loss"])

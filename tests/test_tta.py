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


def test_mirror_shift_is_the_weighted_mean_of_six_views():
    """A second implementation: half of the weight on the image and its mirror image, half on two diagonal shifts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 5 * 6, 4)).eval()
    images = torch.randn(2, 3, 5, 6)

    def shifted(image: torch.Tensor, by: int) -> torch.Tensor:
        """Row i of the result is row i - by of the image; a row before the first is the second (reflection)."""
        rows = [abs(i - by) if i - by < 5 else 2 * 4 - (i - by) for i in range(5)]
        columns = [abs(i - by) if i - by < 6 else 2 * 5 - (i - by) for i in range(6)]
        return image[:, rows][:, :, columns]

    views = [(images, 1 / 4), (images.flip(3), 1 / 4)]
    for by in (1, -1):
        moved = torch.stack([shifted(image, by) for image in images])
        views += [(moved, 1 / 8), (moved.flip(3), 1 / 8)]
    expected = sum(weight * model(view) for view, weight in views)
    torch.testing.assert_close(with_tta(model, "mirror_shift")(images), expected)
    assert (model(images) - expected).abs().max() > 0.01


@pytest.mark.parametrize("tta", ["mirror", "mirror_shift"])
def test_views_are_averaged_in_float32(tta):
    """Logits of 16 bits differ by their rounding, up to 2^-9; the mean must not be rounded again."""

    class Half(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)).bfloat16()

    images = torch.rand(4, 3, 8, 8) + 100 * torch.arange(8.0)
    averaged = with_tta(Half(), tta)(images)
    assert averaged.dtype == torch.float32

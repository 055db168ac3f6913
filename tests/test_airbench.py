"""Airbench, the model with fitted filters: compared with NumPy and a second implementation, and run by the trainer."""

import json

import numpy as np
import pytest
import torch
from conftest import built, composed, reopened, run_to_end, trained
from torch import nn
from torch.nn import functional

from core.errors import ConfigError
from models.airbench import EPSILON, Airbench
from trainer.build.training import build
from trainer.inference.load_run import load_run

fit = Airbench.fit
SMALL = {"num_classes": 5, "in_channels": 3, "widths": [6, 8]}


def coloured(count: int, channels: int = 3, side: int = 9) -> torch.Tensor:
    """Return images whose neighbouring pixels and channels are strongly correlated, as in photographs."""
    noise = torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(1))
    smooth = functional.avg_pool2d(noise, 3, stride=1, padding=1) + 0.1 * noise
    return smooth + 0.5 * smooth.mean(1, keepdim=True) + 0.3


@pytest.mark.parametrize("channels", [1, 3])
def test_fitted_filters_equal_numpy_whitening(channels):
    images = coloured(150, channels)  # more than one chunk
    model = Airbench(num_classes=5, in_channels=channels, widths=[16])
    model.fit(images)
    filters = model.whiten.weight.flatten(1).double()  # (2 D, D)
    size = 4 * channels
    assert filters.shape == (2 * size, size) and torch.equal(filters[size:], -filters[:size])
    windows = np.lib.stride_tricks.sliding_window_view(images.double().numpy(), (2, 2), axis=(2, 3))
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, size)  # (N * 8 * 8, D)
    covariance = np.cov(patches, rowvar=False, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    expected = (vectors / np.sqrt(values + EPSILON)).T[::-1].copy()
    signs = np.sign((filters[:size].numpy() * expected).sum(1, keepdims=True))  # an eigenvector's sign is arbitrary
    np.testing.assert_allclose(filters[:size].numpy() * signs, expected, rtol=1e-4, atol=1e-4)
    # Purpose of whitening: the outputs are uncorrelated and have a variance just below 1.
    outputs = model.whiten(images).movedim(1, 0).flatten(1)[:size].detach().double().numpy()
    expected_covariance = np.diag(values / (values + EPSILON))[::-1, ::-1]
    np.testing.assert_allclose(np.cov(outputs, bias=True), expected_covariance, atol=1e-3)


def test_blocks_are_initialised_as_the_identity():
    model = Airbench(num_classes=5, in_channels=3, widths=[32, 16])
    convolutions = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        maps = torch.randn(2, layer.in_channels, 5, 6)
        kept = min(layer.in_channels, layer.out_channels)
        assert torch.equal(layer(maps)[:, :kept], maps[:, :kept])
    remaining = convolutions[0].weight[24:]  # uniform in +-1/sqrt(n_in), as torch's default
    assert remaining.std().item() == pytest.approx((3 * 24 * 9) ** -0.5, rel=0.1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("side", [5, 10])
def test_airbench_equals_a_second_implementation(training, side):
    model = Airbench(**SMALL, init="he_normal").train(training)
    state = {  # variances above 0, all other values around 0
        name: torch.rand_like(tensor) - ("var" not in name) / 2
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
    model.load_state_dict(state, strict=False)
    images = torch.randn(4, 3, side, side)

    def norm(maps: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3), unbiased=False)
        if not training:
            mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scaled = (maps - mean[:, None, None]) / variance[:, None, None].sqrt() + state[f"{name}.bias"][:, None, None]
        return functional.gelu(scaled)

    maps = functional.gelu(functional.conv2d(images, state["whiten.weight"], state["whiten.bias"]))
    for name in ("blocks.0", "blocks.1"):
        maps = functional.max_pool2d(functional.conv2d(maps, state[f"{name}.0.weight"], padding=1), 2)
        maps = norm(maps, f"{name}.2")
        maps = norm(functional.conv2d(maps, state[f"{name}.4.weight"], padding=1), f"{name}.5")
    expected = maps.flatten(2).max(2).values / 9 @ state["head.weight"].T
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_compiled_gradients_in_bf16_are_finite():
    """A compiler rounds recomputed values differently: a gradient that compares them with a maximum would be NaN."""
    model = Airbench(num_classes=4, in_channels=3, widths=[8, 8]).to(memory_format=torch.channels_last)
    model.fit(coloured(50, side=16))
    forward = torch.compile(model, dynamic=False)
    images = coloured(16, side=16).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.cross_entropy(forward(images), torch.arange(16) % 4)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("name", ["airbench", "resnet20", "inception_small"])
def test_norms_with_a_shift_have_a_scale(name):
    """torch's CUDA kernels of batch norm return no gradient for a shift without a scale."""
    model = build(composed(f"model={name}", "data.channels=3", "data.image_size=32"))[0].state.model
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms and all(layer.weight is not None for layer in norms if layer.bias is not None)


# Through the trainer


AIRBENCH = ("model=airbench", "model.widths=[4,8]", "data.channels=3")


def test_only_a_new_run_fits_the_whitening_filters(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("trainer.build.weights.FITTED", 20)
    monkeypatch.setattr(Airbench, "fit", lambda model, images: (seen.append(images), fit(model, images)))
    run = trained(tmp_path / "run", *AIRBENCH, "trainer.ema_decay=0.9")
    (source_images,) = seen
    # Normalised images of the training split, each class in proportion to its size.
    resident = run.training.train_loader.normalisation(run.training.train_loader.source.pixels)
    positions = [(resident == image).flatten(1).all(1).nonzero().item() for image in source_images]
    assert len(set(positions)) == 20
    shares = 20 / 44 * run.training.train_loader.source.labels.bincount()
    assert ((run.training.train_loader.source.labels[positions].bincount() - shares).abs() < 1).all()
    expected = Airbench(num_classes=4, in_channels=3, widths=[4, 8])
    fit(expected, source_images)
    for model in (
        run.state.model,
        run.state.models["ema"],
        load_run(tmp_path / "run").model,
    ):  # training does not change the filters
        assert torch.equal(model.whiten.weight, expected.whiten.weight)
    resumed = reopened(tmp_path / "run", "trainer.max_epochs=3")
    assert resumed is not None and torch.equal(resumed.state.model.whiten.weight, expected.whiten.weight)
    run_to_end(resumed)
    # init_from keeps the other run's filters.
    other = built(tmp_path / "other", *AIRBENCH, f"init_from={tmp_path / 'run'}", "seed=1")
    assert torch.equal(other.state.model.whiten.weight, expected.whiten.weight)
    assert len(seen) == 2


def test_model_that_cannot_be_fitted_is_a_config_error(monkeypatch):
    def fit(self: Airbench, images: torch.Tensor) -> None:
        raise ValueError("no two images are alike")

    monkeypatch.setattr(Airbench, "fit", fit)
    with pytest.raises(
        ConfigError, match=r"^error\[config\] model = Airbench: cannot be fitted to .*: no two images are alike"
    ):
        build(composed(*AIRBENCH))


@pytest.mark.parametrize("card", ["cifar10_30min", "cifar10_gpu"])
def test_recipes_reduce_the_loss_at_small_scale(tmp_path, card):
    """A narrow, uncompiled model on synthetic images checks the keys of the recipes, not their accuracy."""
    small = ("model.widths=[8,16]", "data.image_size=12", "data.num_classes=4", "data.batch_size=32")
    short = ("trainer.max_epochs=4", "schedule.warmup_epochs=1", "trainer.threads=1", "trainer.compile=false")
    data = ("data=synthetic", "data.train_samples=320", "data.test_samples=100")
    trained(tmp_path / "run", f"experiment={card}", "model=airbench", *data, *small, *short)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["step"] == 40 and summary["best"] == {}
    assert summary["test"]["accuracy"] > 0.5  # chance level: 0.25

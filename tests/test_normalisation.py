"""Normalisation of pixels to model input: compared with NumPy and torchvision, and in whole runs."""

import numpy as np
import pytest
import torch
from conftest import built, composed, last_state, reopened, run_to_end, stop_after, trained
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as torchvision

from analysis.evaluate import evaluate_run
from core.config import Config
from core.errors import CheckpointError, ConfigError, StopSignal
from data.loading import normalisation
from data.loading.normalisation import (
    Normalisation,
    covariance,
    exact_mean,
    fit_normalisation,
    statistics,
    whitening,
)
from data.sources.collection import Collection
from data.sources.images import Files, Images
from data.sources.listing import PackedPaths
from data.sources.splits import Splits, measured, prepare, same_mean
from trainer.build.data import build_data
from trainer.inference.load_run import LoadedRun, load_run
from trainer.run import Run

CPU = torch.device("cpu")


def natural(count: int, *, channels: int = 3, size: int = 5, seed: int = 0) -> Tensor:
    """Return uint8 images (N, C, H, W) with correlated neighbouring pixels and channels, as in photographs."""
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    smooth = (noise.cumsum(2).cumsum(3) + noise.cumsum(1)) * 12 + 110
    return smooth.round().clamp(0, 255).to(torch.uint8)[:, :channels]


def fitted(pixels: Tensor, kind: str, epsilon: float = 0.01) -> Normalisation:
    return fit_normalisation([pixels], kind=kind, epsilon=epsilon, shape=tuple(pixels.shape[1:]))


def numpy_rows(pixels: Tensor) -> np.ndarray:
    return pixels.flatten(1).numpy().astype(np.float64) / 255  # (N, D)


# ------------------------------------------------------------------------------------------------- per_channel and none


def test_per_channel_and_none_equal_torchvision(tmp_path):
    pixels = natural(40)
    mean, std = numpy_rows(pixels).reshape(40, 3, -1).mean((0, 2)), numpy_rows(pixels).reshape(40, 3, -1).std((0, 2))
    scaled = torchvision.to_dtype(pixels, torch.float32, scale=True)
    per_channel, none = fitted(pixels, "per_channel"), fitted(pixels, "none")
    expected = torchvision.normalize(scaled, mean.tolist(), std.tolist())
    torch.testing.assert_close(per_channel(pixels), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(none(pixels), scaled, rtol=0, atol=1e-7)
    # Bit-identical: one multiplication and one addition, in single precision.
    tensors = {name: tensor.double()[:, None, None] for name, tensor in per_channel.tensors.items()}
    scale, bias = (1 / (255 * tensors["std"])).float(), (-tensors["mean"] / tensors["std"]).float()
    assert torch.equal(per_channel(pixels), pixels * scale + bias)


def test_statistics_are_exact_for_data_whose_float_sums_would_cancel():
    pixels = torch.full((2003, 1, 61, 67), 255, dtype=torch.uint8)  # 8.2 million pixels, an odd number
    pixels[0, 0, 0, 0] = 254
    share = 1 / pixels.numel()
    for chunks in ([pixels], [pixels[:700], pixels[700:]]):
        mean, std = statistics(chunks)
        assert std.item() == pytest.approx((share * (1 - share)) ** 0.5 / 255, rel=1e-7)
        assert mean.item() == pytest.approx(1 - share / 255, rel=1e-7)
        assert covariance(chunks)[1].item() == pytest.approx(share * (1 - share) / 255**2, rel=1e-15)
    assert statistics([pixels[1:]])[1].item() == 1  # no contrast at all
    assert covariance([pixels[1:]])[1].item() == 0


def test_covariance_of_colours_equals_numpy():
    pixels = natural(50)
    colours = pixels.permute(1, 0, 2, 3).reshape(3, -1).numpy() / 255  # (C, N H W)
    mean, actual = covariance([pixels[:20], pixels[20:]])
    assert mean.dtype == actual.dtype == torch.float64
    np.testing.assert_allclose(mean.numpy(), colours.mean(1), rtol=1e-13)
    np.testing.assert_allclose(actual.numpy(), np.cov(colours, bias=True), rtol=1e-12)
    assert abs(actual[0, 1]) > 0.1 * actual[0, 0]  # the test data has correlated channels


# ---------------------------------------------------------------------------------------------------------- whitening


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_whitened_training_data_has_identity_covariance(kind):
    pixels = natural(2000)
    rows = fitted(pixels, kind, 1e-12)(pixels).flatten(1).numpy().astype(np.float64)
    assert np.abs(rows.mean(0)).max() < 1e-4
    assert np.abs(np.cov(rows.T, bias=True) - np.eye(75)).max() < 1e-4


def test_whitening_equals_a_singular_value_decomposition():
    """The reference decomposes the images instead of their covariance."""
    pixels, epsilon = natural(500), 0.003
    rows = numpy_rows(pixels)
    mean = rows.mean(0)
    _, singular, vectors = np.linalg.svd(rows - mean, full_matrices=False)  # vectors: one per row
    vectors *= np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], axis=1))
    components = (rows - mean) @ vectors.T / np.sqrt(singular**2 / len(rows) + epsilon)
    pca, zca = (fitted(pixels, kind, epsilon)(pixels).flatten(1).numpy() for kind in ("pca", "zca"))
    np.testing.assert_allclose(pca, components, atol=2e-5)
    np.testing.assert_allclose(zca, components @ vectors, atol=2e-5)
    assert (np.diff(pca.var(0)) < 1e-6).all()  # from the largest variance to the smallest


def test_zca_is_the_whitening_nearest_to_the_identity():
    pixels = natural(500)
    tensors = fitted(pixels, "zca").tensors
    covariance_matrix = torch.from_numpy(np.cov(numpy_rows(pixels).T))
    in_double = whitening(covariance_matrix, kind="zca", epsilon=0.01)
    assert torch.equal(in_double, in_double.T)
    matrix, rows = tensors["whitening"], torch.from_numpy(numpy_rows(pixels)).float() - tensors["mean"]
    assert (torch.linalg.eigvalsh(matrix.double()) > 0).all()

    def squared_change(candidate: Tensor) -> float:
        return (rows @ candidate.T - rows).square().sum().item()

    # All whitenings differ by rotations: small and large rotations are tried.
    generator = torch.Generator().manual_seed(1)
    for size in (0.01, 0.1, 1.0, 10.0):
        generator_matrix = torch.randn(75, 75, generator=generator) * size / 75
        assert squared_change(torch.linalg.matrix_exp(generator_matrix - generator_matrix.T) @ matrix) > squared_change(
            matrix
        )
    assert squared_change(fitted(pixels, "pca").tensors["whitening"]) > squared_change(matrix)


def test_whitening_is_bit_identical_for_any_order_of_the_images():
    pixels = natural(700)
    for kind in ("pca", "zca"):
        expected = fitted(pixels, kind)
        shuffled = [pixels[300:].flip(0), pixels[:300]]  # exact sums do not depend on the order
        refitted = fit_normalisation(shuffled, kind=kind, epsilon=0.01, shape=(3, 5, 5))
        assert all(torch.equal(tensor, refitted.tensors[name]) for name, tensor in expected.tensors.items())


def test_sign_of_eigenvectors_is_fixed(monkeypatch):
    covariance_matrix = torch.from_numpy(np.cov(numpy_rows(natural(500)).T))
    expected = whitening(covariance_matrix, kind="pca", epsilon=0.01)
    values, vectors = torch.linalg.eigh(covariance_matrix)
    flipped = vectors * torch.tensor([1.0, -1.0, -1.0]).repeat(25)
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: (values, flipped))
    assert torch.equal(whitening(covariance_matrix, kind="pca", epsilon=0.01), expected)


def test_epsilon_bounds_the_amplification_of_noise():
    pixels = natural(30)  # fewer images than values per image: the covariance is singular
    pixels[:, :, 0] = 7  # and some pixels are constant
    largest = np.linalg.eigvalsh(np.cov(numpy_rows(pixels).T, bias=True))[-1]
    for kind in ("pca", "zca"):
        gains = torch.linalg.svdvals(fitted(pixels, kind, 0.04).tensors["whitening"])
        assert gains.max().item() == pytest.approx(0.04**-0.5, rel=1e-5)
        assert gains.min().item() == pytest.approx((largest + 0.04) ** -0.5, rel=1e-5)
        # Rounding can give eigenvalues slightly below 0; their square root must not give NaN.
        assert fitted(pixels, kind, 1e-25).tensors["whitening"].isfinite().all()


@pytest.mark.parametrize("kind", normalisation.KINDS)
def test_normalisation_accepts_any_dtype_and_returns_the_configured_memory_format(kind):
    pixels = natural(8)
    normalise = fitted(natural(100), kind)
    expected = normalise(pixels)
    assert expected.is_contiguous() and expected.dtype == torch.float32
    for images in (pixels.clone(), pixels.float(), pixels.float().contiguous(memory_format=torch.channels_last)):
        normalised = normalise.to(CPU, channels_last=True)(images)
        assert normalised.dtype == torch.float32 and normalised.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(normalised, expected)
        assert torch.equal(images, pixels.to(images.dtype))
    assert torch.equal(Normalisation(normalise.tensors)(pixels), expected)


def test_images_too_large_for_whitening_are_refused_before_they_are_read(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in "abcd"]  # missing: reading one would give another error
    files = Images(Files(PackedPaths.of(paths), image_size=37, channels=3), torch.tensor([0, 1, 0, 1]))
    settings = {"seed": 0, "val_fraction": 0, "image_size": 37, "channels": 3, "fit": "resize", "limit_train": None}
    settings |= {"num_classes": None, "memory_budget": 0, "normalise": "zca"}
    with pytest.raises(ConfigError, match="normalise = zca: .*3 x 37 x 37 has 4,107 values.*at most 4,096") as caught:
        prepare(Collection(files, None, None, ["a", "b"]), **settings)
    assert caught.value.subject == "normalise"
    with pytest.raises(ConfigError, match="whitening_epsilon = 0: must be > 0"):
        fitted(natural(10), "pca", 0)
    for override in ("data.normalise=zac", "data.whitening_epsilon=0"):
        with pytest.raises(ConfigError, match=override.replace("=", " = ")):
            composed(override)


# -------------------------------------------------------------------------------------------- only the training split


def prepared(collection: Collection, normalise: str, **changes: object) -> Splits:
    settings = {"seed": 0, "val_fraction": 0.3, "image_size": 5, "channels": 3, "fit": "resize", "limit_train": None}
    return prepare(collection, **settings, num_classes=None, memory_budget=1, normalise=normalise, **changes)


@pytest.mark.parametrize("kind", ["per_channel", "pca", "zca"])
def test_only_the_train_split_is_fitted(kind):
    labels, pixels = torch.arange(200) % 2, natural(200)
    first = prepared(Collection(Images(pixels, labels), None, Images(natural(9), labels[:9]), ["a", "b"]), kind)
    expected = fitted(first.train.pixels, kind).tensors
    assert len(first.train) == 140
    assert all(torch.equal(tensor, expected[name]) for name, tensor in first.normalisation.tensors.items())

    in_val = {image.numpy().tobytes() for image in first.val.pixels}
    is_in_val = torch.tensor([image.numpy().tobytes() in in_val for image in pixels])
    changed = torch.where(is_in_val[:, None, None, None], 255 - pixels, pixels)
    second = prepared(
        Collection(Images(changed, labels), None, Images(natural(9, seed=1), labels[:9]), ["a", "b"]), kind
    )
    assert not torch.equal(first.val.pixels, second.val.pixels)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.normalisation.tensors.items())


def test_streamed_files_give_the_same_statistics_input_as_pixels_in_memory(tmp_path):
    pixels, paths = natural(30), [tmp_path / f"{number:02}.png" for number in range(30)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    streamed = Images(Files(PackedPaths.of(paths), image_size=5, channels=3), torch.arange(30) % 2)
    assert torch.equal(torch.cat(list(measured(streamed, image_size=5, seed=3))), pixels)
    [resident] = measured(Images(pixels, streamed.labels), image_size=5, seed=3)
    assert torch.equal(resident, pixels)


# ---------------------------------------------------------------------------------------------------- without refitting


@pytest.mark.parametrize("kind", ["per_channel", "pca", "zca"])
@pytest.mark.parametrize("channels", [1, 3])
def test_exact_mean_is_bit_identical_to_the_fitted_mean(monkeypatch, kind, channels):
    pixels = natural(501, channels=channels)
    expected = fitted(pixels, kind).tensors["mean"]
    for values in (normalisation.MAX_CONVERTED_VALUES, 1000, 1):  # in one chunk, in several, and one image at a time
        monkeypatch.setattr(normalisation, "MAX_CONVERTED_VALUES", values)
        for chunks in ([pixels], [pixels[:100], pixels[100:101], pixels[101:]]):
            mean = exact_mean(chunks, per_pixel=kind != "per_channel")
            assert mean.dtype == expected.dtype and torch.equal(mean, expected)


@pytest.mark.parametrize("kind", normalisation.KINDS)
@pytest.mark.parametrize("stored_size", [None, 9])
def test_same_mean_detects_one_changed_pixel_without_fitting(monkeypatch, kind, stored_size):
    images = Images(natural(200, size=9 if stored_size else 5), torch.arange(200) % 2)
    splits = prepared(Collection(images, None, None, ["a", "b"]), kind, stored_size=stored_size)
    monkeypatch.setattr(normalisation, "_sums", None)
    tensors = splits.normalisation.tensors
    assert same_mean(splits.train, tensors, image_size=5)
    changed_pixels = splits.train.pixels.clone()
    changed_pixels[17, 0, 2, 3] ^= 255
    changed = Images(changed_pixels, splits.train.labels)
    assert same_mean(changed, tensors, image_size=5) == (kind == "none")


def test_same_mean_is_true_for_data_that_is_not_in_memory(tmp_path):
    files = Images(Files(PackedPaths.of([tmp_path / "missing.png"]), image_size=5, channels=3), torch.tensor([0]))
    assert same_mean(files, fitted(natural(10), "per_channel").tensors, image_size=5)


@pytest.mark.parametrize("kind", ["per_channel", "zca"])
def test_prepare_uses_a_given_normalisation_without_measuring(monkeypatch, kind):
    collection = Collection(Images(natural(200), torch.arange(200) % 2), None, None, ["a", "b"])
    fitted_before = prepared(collection, kind).normalisation
    monkeypatch.setattr("data.sources.splits.fit_normalisation", None)
    monkeypatch.setattr("data.sources.splits.measured", None)
    assert prepared(collection, kind, normalisation=fitted_before).normalisation is fitted_before


# --------------------------------------------------------------------------------------------------------- a whole run

ZCA = ("data.normalise=zca", "data.whitening_epsilon=0.02", "trainer.max_epochs=2")


def same_input(loaded: LoadedRun, run: Run) -> bool:
    """Return whether the transform of a loaded run gives the same validation input as in training."""
    [batch] = run.training.val_loader
    images = run.training.val_loader.source.pixels
    one_by_one = torch.stack([loaded.transform(image) for image in images])
    torch.testing.assert_close(
        one_by_one, batch.images, rtol=0, atol=1e-5
    )  # matrix products of one row are summed in another order
    return torch.equal(loaded.transform.normalisation(images), batch.images)


@pytest.mark.parametrize("kind", ["none", "pca", "zca"])
def test_run_with_each_normalisation_resumes_bit_identically(tmp_path, kind):
    overrides = [*ZCA, f"data.normalise={kind}"]
    uninterrupted = trained(tmp_path / "uninterrupted", *overrides)
    stopped = built(tmp_path / "stopped", *overrides)
    stop_after(stopped, 4)
    with pytest.raises(StopSignal):
        run_to_end(stopped)
    run_to_end(reopened(tmp_path / "stopped"))
    assert last_state(tmp_path / "stopped") == last_state(tmp_path / "uninterrupted")
    run = load_run(tmp_path / "uninterrupted")
    assert same_input(run, uninterrupted)
    assert set(run.snapshot.part("data")) == ({"mean", "std"} if kind == "none" else {"mean", "whitening"})


def test_evaluation_gives_the_accuracy_of_training_without_fitting(tmp_path, monkeypatch, capsys):
    run = trained(tmp_path / "run", *ZCA)
    monkeypatch.setattr(normalisation, "whitening", None)
    values = {"run": str(tmp_path / "run"), "split": "val", "checkpoint": "best", "device": "cpu", "root": None}
    evaluate_run(Config(values=values | {"trust": [], "tta": None, "output": None}, record={}, job=None))
    line = f"accuracy {run.state.best['metrics']['val/accuracy']:.4f}"
    assert line in capsys.readouterr().out


def test_resume_uses_the_normalisation_of_the_checkpoint_without_fitting(tmp_path, monkeypatch):
    """Other threads or machines may give other eigenvectors; the model was trained with the stored ones."""
    trained(tmp_path / "uninterrupted", *ZCA, "data.normalise=pca")
    stopped = built(tmp_path / "stopped", *ZCA, "data.normalise=pca")
    stop_after(stopped, 4)
    with pytest.raises(StopSignal):
        run_to_end(stopped)
    monkeypatch.setattr("data.sources.splits.fit_normalisation", None)
    monkeypatch.setattr(normalisation, "whitening", None)
    resumed = reopened(tmp_path / "stopped")
    assert same_input(load_run(tmp_path / "stopped", checkpoint="last"), resumed)
    run_to_end(resumed)
    assert last_state(tmp_path / "stopped") == last_state(tmp_path / "uninterrupted")


def test_resume_on_other_pixels_is_refused(tmp_path, monkeypatch):
    trained(tmp_path / "run", *ZCA)

    def other_pixels(node, *, seed, normalisation):
        return build_data({**node, "noise": 0.25}, seed=seed, normalisation=normalisation)

    monkeypatch.setattr("trainer.build.training.build_data", other_pixels)
    with pytest.raises(CheckpointError, match="its mean differs"):
        reopened(tmp_path / "run", "trainer.max_epochs=3")


def test_logged_images_are_those_before_normalisation(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "trainer.report.tensorboard_writer.TensorBoard.images", lambda _, tag, images, step: shown.append(images)
    )
    for kind in ("per_channel", "pca"):
        run = built(tmp_path / kind, "trainer.log_images=true", f"data.normalise={kind}")
        rows = run.training.train_loader.order(0)[:8]
        assert torch.equal(shown[-1], run.training.train_loader.source.pixels[rows] / 255)

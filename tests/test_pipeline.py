"""Augmentation pipeline: dependence on seed, epoch and index only; mixing partners; transforms with own generators."""

import copy
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import built
from torchvision.transforms import v2

from core.config import CONFIGS
from core.errors import ConfigError
from core.seeding import fold
from data.augment.color import ColorShift, PCAColor
from data.augment.corruptions import RandomBlur, RandomErasing, RandomNoise
from data.augment.geometry import AlternatingFlip, Elastic, RandomAffine, RandomCrop, RandomFlip, RandomResizedCrop
from data.augment.mixing import CutMix, Mixup
from data.augment.per_sample import PerSampleTransform
from data.augment.pipeline import Augmentations, Drawn
from trainer.build.trust import refuse_untrusted

CPU = torch.device("cpu")
N, K = 50, 4
LABELS = torch.arange(N) % K
PCA = PCAColor(sigma=2)
PCA.fit(torch.zeros(3), torch.tensor([[0.06, 0.05, 0.04], [0.05, 0.06, 0.05], [0.04, 0.05, 0.07]]))

STEPS = {
    "crop": RandomCrop(padding=2),
    "reflect": RandomCrop(padding=2, mode="reflect"),
    "affine": RandomAffine(translate=0.2, scale=[0.7, 1.4], rotate=60, shear=25, mirror=0.5),
    "resized_crop": RandomResizedCrop(area=[0.1, 1], ratio=[0.5, 2]),
    "elastic": Elastic(alpha=20, sigma=2),
    "flip": RandomFlip(probability=0.5),
    "alternate": AlternatingFlip(),
    "early_mixup": Mixup(alpha=1, probability=0.7),
    "color_shift": ColorShift(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.5),
    "pca_color": PCA,
    "erasing": RandomErasing(probability=0.5, area=[0.02, 0.4], ratio=[0.3, 3], fill="random"),
    "cutmix": CutMix(alpha=1, probability=0.7),
    "transform": PerSampleTransform(v2.TrivialAugmentWide(), name="augment.transform"),
    "blur": RandomBlur(probability=0.5, sigma=[0.1, 2]),
    "noise": RandomNoise(probability=0.5, sd=30),
    "mixup": Mixup(alpha=0.2, probability=1),
}
CHAINS = {name: {name: step} for name, step in STEPS.items()} | {"all": STEPS}


def random_images(batch: int, channels: int = 3, height: int = 11, width: int = 13) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (batch, channels, height, width), generator=generator, dtype=torch.uint8)


def make_pipeline(steps: dict, seed: int = 1) -> Augmentations:
    return Augmentations(steps, seed=seed, num_classes=K)


def draw(steps: dict, *, seed: int = 1, epoch: int = 2, samples: int = N) -> Drawn:
    return make_pipeline(steps, seed).draw(epoch=epoch, samples=samples, device=CPU)


def augmented_batch(drawn: Drawn, images: torch.Tensor, indices: torch.Tensor) -> list[torch.Tensor]:
    """Return images, labels and indices of a batch, as a loader does."""
    rows = drawn.rows(indices)
    return list(drawn(images[rows], LABELS[rows], rows))


def are_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other) for tensor, other in zip(first, second, strict=True))


@pytest.mark.parametrize("name", CHAINS)
def test_augmented_sample_depends_only_on_seed_epoch_and_index(name):
    images, steps = random_images(N), CHAINS[name]
    original, state = images.clone(), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    epoch_batch = augmented_batch(draw(steps), images, torch.arange(N))
    assert (
        len(epoch_batch[0]) == N
        and torch.equal(epoch_batch[2], torch.arange(N))
        and torch.isfinite(epoch_batch[0].float()).all()
    )
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    for subset in (
        shuffled,
        *shuffled.split(7),
        *shuffled.split(1)[:5],
        *(shuffled[:size] for size in range(2, 20, 3)),
    ):
        assert are_equal(augmented_batch(draw(steps), images, subset), [values[subset] for values in epoch_batch])
    assert not torch.equal(augmented_batch(draw(steps, epoch=3), images, torch.arange(N))[0], epoch_batch[0])
    assert not torch.equal(augmented_batch(draw(steps, seed=2), images, torch.arange(N))[0], epoch_batch[0])
    assert torch.equal(images, original)  # pixels in memory are read again in the next epoch
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]


def test_augmented_large_images_do_not_depend_on_the_thread_count():
    """If torch splits a sum between threads, a single image is summed in another order than one of a batch."""
    images = random_images(2, 3, 224, 224)
    for name in STEPS.keys() - {"early_mixup", "cutmix", "mixup"}:
        random_values = torch.rand(2, STEPS[name].num_random_values, generator=torch.Generator().manual_seed(8))
        expected = STEPS[name](images, random_values)
        try:
            torch.set_num_threads(2)
            assert torch.equal(STEPS[name](images, random_values), expected), name
            assert torch.equal(STEPS[name](images[:1], random_values[:1]), expected[:1]), name
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 4)])
def test_steps_accept_grey_and_tiny_images_and_float_pixels(name, channels, side):
    images, indices = random_images(N, channels, side, side), torch.arange(N)
    steps = {key: PCAColor(sigma=2) if step is PCA else step for key, step in CHAINS[name].items()}
    if "pca_color" in steps:
        steps["pca_color"].fit(torch.zeros(channels), 0.1 * torch.eye(channels))
    shown, labels, _ = augmented_batch(draw(steps), images, indices)
    assert shown.shape == images.shape and shown.dtype in (torch.uint8, torch.float32)
    assert torch.isfinite(shown.float()).all() and not torch.equal(shown.float(), images.float())
    assert labels.dtype == (torch.float32 if any("mix" in key for key in steps) else torch.int64)
    assert torch.equal(augmented_batch(draw(steps), images.float(), indices)[0].float(), shown.float())


@pytest.mark.parametrize("name", [name for name in STEPS if name != "transform"])
def test_augmentation_steps_do_not_synchronise_with_the_device(name):
    """Tensors on the meta device have no values, so that reading one would fail."""
    step, images = copy.deepcopy(STEPS[name]), random_images(8).to("meta")
    random_values = torch.rand(8 // 2 if name in ("early_mixup", "cutmix", "mixup") else 8, step.num_random_values).to(
        "meta"
    )
    if len(random_values) == 8:
        assert step(images, random_values).shape == images.shape
    else:
        shown, labels = step(images, torch.rand(8, K).to("meta"), random_values)
        assert shown.shape == images[:4].shape and labels.shape == (4, K)


def test_steps_without_interpolation_keep_uint8():
    keep_uint8 = ("crop", "reflect", "flip", "alternate", "erasing", "cutmix", "transform")
    for name in STEPS:
        assert (augmented_batch(draw(CHAINS[name]), random_images(N), torch.arange(5))[0].dtype == torch.uint8) == (
            name in keep_uint8
        )


def test_random_values_differ_between_seeds_epochs_indices_and_steps():
    images = random_images(1).expand(N, -1, -1, -1)
    steps = {name: STEPS[name] for name in ("crop", "affine", "flip")}
    base, _, _ = augmented_batch(draw(steps), images, torch.arange(N))
    for seed, epoch in ((2, 2), (1, 1)):
        other_images, _, _ = augmented_batch(draw(steps, seed=seed, epoch=epoch), images, torch.arange(N))
        assert all(not torch.equal(image, other_image) for image, other_image in zip(base, other_images))
    assert len({base_image.numpy().tobytes() for base_image in base}) == N
    drawn = draw({"a": Mixup(alpha=1, probability=1), "b": Mixup(alpha=1, probability=1)})
    assert not torch.equal(drawn.random_values["a"], drawn.random_values["b"])
    assert not torch.equal(drawn.partners["a"], drawn.partners["b"])


def test_random_values_follow_the_documented_formula():
    drawn = draw(STEPS, seed=9, epoch=4)
    generator = torch.Generator().manual_seed(fold(9, "augment", "flip", 4))
    assert torch.equal(drawn.random_values["flip"], torch.rand(N, 1, generator=generator))
    generator = torch.Generator().manual_seed(fold(9, "partner", "mixup", 4))
    assert torch.equal(drawn.partners["mixup"], torch.randint(N, (N,), generator=generator))
    assert list(drawn.partners) == ["early_mixup", "cutmix", "mixup"]
    for name in ("flip", "mixup"):
        alone = draw(CHAINS[name], seed=9, epoch=4)
        assert torch.equal(alone.random_values[name], drawn.random_values[name])
        assert name == "flip" or torch.equal(alone.partners[name], drawn.partners[name])


def test_alternating_steps_shift_the_values_of_epoch_0():
    first, second, third, fourth = (draw(STEPS, seed=9, epoch=epoch).random_values["alternate"] for epoch in range(4))
    generator = torch.Generator().manual_seed(fold(9, "augment", "alternate", 0))
    assert torch.equal(first, torch.rand(N, 1, generator=generator))
    assert torch.equal(second.double(), (first.double() + 0.5) % 1)
    assert torch.equal(third, first) and torch.equal(fourth, second)


def test_pipeline_without_steps_returns_its_input():
    images, rows = random_images(5), torch.arange(5)
    drawn = draw({}, samples=5)
    assert drawn.rows(rows) is rows
    assert all(output is source for output, source in zip(drawn(images, LABELS, rows), (images, LABELS, rows)))


# Partners


def test_two_mixing_steps_equal_a_recursion_over_partners():
    """The reference computes each image separately, by recursion over its partners."""
    names = ["crop", "mixup", "flip", "cutmix", "noise"]
    images, drawn = random_images(N), draw({name: STEPS[name] for name in names})

    def reference(index: int, done: int) -> tuple[torch.Tensor, torch.Tensor]:
        if done == 0:
            return images[index][None], torch.eye(K)[LABELS[index]][None]
        name = names[done - 1]
        image, label = reference(index, done - 1)
        random_values = drawn.random_values[name][index][None]
        if name not in drawn.partners:
            return STEPS[name](image, random_values), label
        other, other_label = reference(int(drawn.partners[name][index]), done - 1)
        return STEPS[name](torch.cat([image, other]), torch.cat([label, other_label]), random_values)

    shown, labels, indices = augmented_batch(drawn, images, torch.tensor([7, 3, 49, 0, 7]))
    assert labels.shape == (5, K) and (labels.sum(1) - 1).abs().max() < 1e-6
    assert (labels > 0).sum() > 5  # some labels are mixed
    for actual, label, index in zip(shown, labels, indices.tolist()):
        image, expected = reference(index, len(names))
        assert torch.equal(actual, image[0]) and torch.equal(label, expected[0])


def test_partners_are_uniform_over_all_samples():
    partners = draw({"mixup": STEPS["mixup"]}, samples=20000).partners["mixup"]
    assert partners.min() == 0 and partners.max() == 19999
    counts = torch.bincount(torch.bincount(partners), minlength=4)[:4] / 20000
    assert (counts - torch.tensor([1, 1, 1 / 2, 1 / 6]) / torch.e).abs().max() < 0.02  # Poisson distribution


# Transforms of other packages


class RandomTransform:
    """A transform that returns one value from each of the generators of torch, random and NumPy as pixels."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        drawn = [torch.randint(256, ()).item(), random.randrange(256), np.random.randint(256)]
        return torch.tensor(drawn, dtype=torch.uint8)[:, None, None].expand(image.shape)


def test_transform_equals_torchvision_with_the_same_seed():
    images = random_images(30)
    drawn = draw({"transform": STEPS["transform"], "random": PerSampleTransform(RandomTransform(), name="random")})
    shown = STEPS["transform"](images, drawn.random_values["transform"][:30])
    for actual, image, random_value in zip(shown, images, drawn.random_values["transform"][:, 0].tolist()):
        with torch.random.fork_rng():
            torch.manual_seed(int(random_value * 2**24))
            assert torch.equal(actual, v2.TrivialAugmentWide()(image))
    values = drawn.steps["random"](images, drawn.random_values["random"][:30])[:, :, 0, 0]
    assert all(len(column.unique()) > 20 for column in values.T)


def test_float_pixels_are_rounded_and_clipped_for_a_transform():
    identity = PerSampleTransform(lambda image: image, name="keep")
    images = torch.tensor([-3.0, 1.4, 1.6, 254.6, 300.0]).view(1, 1, 1, 5)
    assert identity(images, torch.zeros(1, 1)).flatten().tolist() == [0, 1, 2, 255, 255]


@pytest.mark.parametrize(
    ("transform", "problem"),
    [
        (
            v2.ToDtype(torch.float32),
            "must return torch.uint8 .3, 8, 8., like its input; it returns torch.float32 .3, 8, 8.",
        ),
        (v2.CenterCrop(5), "it returns torch.uint8 .3, 5, 5."),
        (v2.ToPILImage(), "it returns Image"),
        (lambda image: image @ image[0, 0, 0, 0], "fails on an image .3, 8, 8.: IndexError: too many indices"),
        (7, "must be a built-in augmentation"),
    ],
)
def test_transform_with_invalid_output_is_named(transform, problem):
    state = torch.get_rng_state()
    with pytest.raises(ConfigError, match=problem) as caught:
        PerSampleTransform(transform, name="augment.mine").dry_run((3, 8, 8))
    assert caught.value.subject == "augment.mine" and torch.equal(torch.get_rng_state(), state)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301  # as sent by a worker


# From configs


def test_all_augment_options_build_together_and_have_unique_step_names(tmp_path):
    """Files are combined in a list, and steps with equal names would be merged; only `flip` is shared."""
    options = sorted(path.stem for path in (CONFIGS / "augment").glob("*.yaml"))
    steps: dict[str, dict] = {}
    for option in options:
        for name, node in (yaml.safe_load((CONFIGS / "augment" / f"{option}.yaml").read_text()) or {}).items():
            assert steps.setdefault(name, node) == node
            assert name == "flip" or sum(node == other for other in steps.values()) == 1
    refuse_untrusted({"augment": steps}, trust=[])  # a resumed run builds them
    run = built(tmp_path / "run", f"augment=[{','.join(options)}]", "data.channels=3")
    batch = next(run.training.train_loader.steps(0))[0]
    assert list(run.training.train_loader.augmentations.steps) == list(
        dict.fromkeys(
            name
            for option in options
            for name in yaml.safe_load(Path(CONFIGS, "augment", f"{option}.yaml").read_text())
        )
    )
    assert batch.labels.shape == (8, 4) and batch.labels.dtype == torch.float32


def test_builder_fits_steps_to_the_train_split_and_wraps_transforms(tmp_path):
    run = built(tmp_path / "run", "augment=[pca_color,erasing,rand_augment]", "augment.erasing.fill=mean")
    loader = run.training.train_loader
    steps, pixels = loader.augmentations.steps, loader.source.images.pixels.double() / 255
    assert steps["pca_color"].components.item() == pytest.approx(255 * pixels.var(correction=0).item(), rel=1e-5)
    assert steps["erasing"].colour.item() == round(255 * pixels.mean().item())
    assert (
        isinstance(steps["rand_augment"], PerSampleTransform) and steps["rand_augment"].name == "augment.rand_augment"
    )


@pytest.mark.parametrize(
    ("override", "subject", "problem"),
    [
        (
            "+augment.x._target_=torch.nn.Flatten",
            "augment.x",
            "must return torch.uint8 .1, 8, 8.*it returns torch.uint8",
        ),
        ("+augment.x._target_=torchvision.transforms.v2.RandAugmen", "augment.x._target_", "did you mean RandAugment"),
        ("+augment.x={_target_:torchvision.transforms.v2.RandAugment,op:1}", "augment.x.op", "no such argument"),
        ("+augment.x={_target_:data.augment.mixing.Mixup,alpha:0,probability:1}", "augment.x.alpha", "must be within"),
        ("+augment.x._target_=builtins.list", "augment.x", "must be a built-in augmentation"),
    ],
)
def test_config_error_names_an_invalid_augmentation_step(tmp_path, override, subject, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        built(tmp_path / "run", override)
    assert caught.value.subject == subject and not (tmp_path / "run").exists()

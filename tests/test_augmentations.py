"""Augmentations against torchvision's own, for given numbers; and what they may depend on."""

import math

import pytest
import torch
from torch.nn import functional

from core.errors import ConfigError
from core.seeding import fold
from data.augmentations import Augmentations, RandomAffine, RandomCrop, RandomFlip

CPU = torch.device("cpu")


def pictures(batch: int, channels: int = 3, height: int = 12, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (batch, channels, height, width), generator=generator, dtype=torch.uint8)


def uniform(batch: int, count: int) -> torch.Tensor:
    return torch.rand(batch, count, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("as_float", [False, True])
def test_crop_is_a_slice_of_the_padded_picture(padding, as_float):
    images = pictures(64, height=10, width=14)
    images = images.float() if as_float else images
    numbers = uniform(64, 2)
    numbers[0], numbers[1] = 0, 1 - 2**-24  # the ends of [0, 1)
    result = RandomCrop(padding=padding)(images, numbers)
    assert result.dtype == images.dtype
    padded = functional.pad(images, [padding] * 4)
    for ours, picture, (down, right) in zip(result, padded, numbers.tolist()):
        top, left = math.floor(down * (2 * padding + 1)), math.floor(right * (2 * padding + 1))
        assert torch.equal(ours, picture[:, top : top + 10, left : left + 14])


def test_crop_reaches_every_shift_equally():
    dot = torch.zeros(9000, 1, 5, 5, dtype=torch.uint8)
    dot[:, 0, 2, 2] = 1
    hits = RandomCrop(padding=1)(dot, uniform(9000, 2)).sum(0)[0]
    assert (hits[1:4, 1:4] - 1000).abs().max() < 5 * 1000**0.5 and hits.sum() == 9000


def test_flip_mirrors_those_below_the_probability():
    images, numbers = pictures(100), uniform(100, 1)
    for probability in (0.0, 0.3, 1.0):
        result = RandomFlip(probability=probability)(images, numbers)
        assert result.dtype == torch.uint8
        for ours, picture, number in zip(result, images, numbers[:, 0].tolist()):
            assert torch.equal(ours, picture.flip(-1) if number < probability else picture)


@pytest.mark.parametrize(("height", "width"), [(12, 12), (9, 14)])
def test_affine_is_torchvisions(height, width):
    from torchvision.transforms.functional import InterpolationMode, affine

    step = RandomAffine(translate=0.2, scale=[0.7, 1.4], rotate=60, shear=25, mirror=0.5)
    images, numbers = pictures(40, height=height, width=width), uniform(40, 6)
    result = step(images, numbers)
    assert result.dtype == torch.float32
    flips = 0
    for ours, picture, row in zip(result, images, numbers.tolist()):
        right, down, size, turn, lean, mirror = row
        flips += mirror < 0.5
        reference = affine(
            (picture.flip(-1) if mirror < 0.5 else picture).float()[None],
            angle=60 * (2 * turn - 1),
            translate=[0.2 * (2 * right - 1) * width, 0.2 * (2 * down - 1) * height],
            scale=0.7 + 0.7 * size,
            shear=[25 * (2 * lean - 1), 0.0],
            interpolation=InterpolationMode.BILINEAR,
            fill=None,  # zeros; a value would be blended in by a mask
        )[0]
        assert (ours - reference).abs().max() < 0.02  # of 255
    assert 0 < flips < 40


def test_affine_of_no_change_changes_nothing():
    images = pictures(8)
    still = RandomAffine(translate=0, scale=[1, 1], rotate=0, shear=0, mirror=0)
    assert (still(images, uniform(8, 6)) - images).abs().max() < 1e-3
    shifted = RandomAffine(translate=0.25, scale=[1, 1], rotate=0, shear=0, mirror=0)
    numbers = torch.tensor([[1.0, 0.5, 0, 0, 0, 0]]).expand(8, 6)  # a quarter to the right: 3 of 12 pixels
    assert (shifted(images, numbers)[..., 3:] - images[..., :-3]).abs().max() < 1e-3
    assert shifted(images, numbers)[..., :3].abs().max() < 1e-3


STEPS = {
    "crop": RandomCrop(padding=2),
    "affine": RandomAffine(translate=0.2, scale=[0.7, 1.4], rotate=60, shear=25, mirror=0.5),
    "flip": RandomFlip(probability=0.5),
}


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    images, indices = pictures(50), torch.arange(50)
    frame = Augmentations(STEPS, seed=1)
    frame.draw(epoch=2, samples=50, device=CPU)
    whole = frame(images, indices, 2)
    mixed = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    for part in (*mixed.split(7), *indices.split(1)[:5]):
        assert torch.equal(frame(images[part], part, 2), whole[part])
        # Another frame, which nobody has told how many samples there are, nor the epoch.
        assert torch.equal(Augmentations(STEPS, seed=1)(images[part], part, 2), whole[part])
    assert not torch.equal(frame(images, indices, 3), whole)
    assert torch.equal(frame(images, indices, 2), whole)


def test_seed_epoch_index_and_step_all_matter():
    images, indices = pictures(1).expand(50, -1, -1, -1), torch.arange(50)
    base = Augmentations(STEPS, seed=1)(images, indices, 0)
    for seed, epoch in ((2, 0), (1, 1)):
        other = Augmentations(STEPS, seed=seed)(images, indices, epoch)
        assert all(not torch.equal(ours, theirs) for ours, theirs in zip(base, other))
    assert len({picture.numpy().tobytes() for picture in base}) == 50
    frame = Augmentations({"a": RandomFlip(probability=0.5), "b": RandomFlip(probability=0.5)}, seed=1)
    frame.draw(epoch=0, samples=50, device=CPU)
    assert not torch.equal(frame.drawn["a"], frame.drawn["b"])


def test_numbers_are_those_that_the_docstring_promises_and_one_step_does_not_move_anothers():
    frame = Augmentations(STEPS, seed=9)
    frame.draw(epoch=4, samples=30, device=CPU)
    generator = torch.Generator().manual_seed(fold(9, "augment", "flip", 4))
    assert torch.equal(frame.drawn["flip"], torch.rand(30, 1, generator=generator))
    alone = Augmentations({"flip": STEPS["flip"]}, seed=9)
    alone.draw(epoch=4, samples=30, device=CPU)
    assert torch.equal(alone.drawn["flip"], frame.drawn["flip"])


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    Augmentations(STEPS, seed=1)(pictures(5), torch.arange(5), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_to_do():
    images = pictures(5)
    assert Augmentations({}, seed=1)(images, torch.arange(5), 0) is images


def affine(**changes: object) -> RandomAffine:
    return RandomAffine(**{"translate": 0.1, "scale": [0.9, 1.1], "rotate": 5, "shear": 5, "mirror": 0} | changes)


@pytest.mark.parametrize(
    ("build", "key", "value"),
    [
        (RandomCrop, "padding", -1),
        (RandomFlip, "probability", 1.5),
        (affine, "translate", -0.1),
        (affine, "scale", [1.1, 0.9]),
        (affine, "scale", [0.0, 0.9]),
        (affine, "scale", [1.0]),
        (affine, "rotate", 181),
        (affine, "shear", 90),
        (affine, "mirror", float("nan")),
    ],
)
def test_bad_arguments_name_themselves(build, key, value):
    with pytest.raises(ConfigError, match="must be") as caught:
        build(**{key: value})
    assert caught.value.subject == key

"""Each augmentation compared with torchvision, or another independent reference, for fixed random values."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch.nn import functional
from torchvision.transforms.v2 import functional as reference

from core.errors import ConfigError
from data.augment.color import ColorShift, PCAColor
from data.augment.corruptions import RandomBlur, RandomErasing, RandomNoise
from data.augment.distributions import SymmetricBeta, normal, per_pixel
from data.augment.geometry import (
    AlternatingFlip,
    Elastic,
    RandomAffine,
    RandomCrop,
    RandomFlip,
    RandomResizedCrop,
    rectangles,
)
from data.augment.mixing import CutMix, Mixup
from data.augment.pipeline import Augmentations


def random_images(batch: int, channels: int = 3, height: int = 12, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (batch, channels, height, width), generator=generator, dtype=torch.uint8)


def uniform(batch: int, count: int) -> torch.Tensor:
    return torch.rand(batch, count, generator=torch.Generator().manual_seed(4))


# Geometry


@pytest.mark.parametrize("mode", ["black", "reflect"])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("as_float", [False, True])
def test_crop_is_a_slice_of_the_padded_image(padding, as_float, mode):
    images = random_images(64, height=10, width=14)
    images = images.float() if as_float else images
    random_values = uniform(64, 2)
    random_values[0], random_values[1] = 0, 1 - 2**-24  # the ends of [0, 1)
    result = RandomCrop(padding=padding, mode=mode)(images, random_values)
    assert result.dtype == images.dtype
    edges = [(0, 0), (0, 0), (padding, padding), (padding, padding)]
    padded = torch.from_numpy(np.pad(images.numpy(), edges, mode="constant" if mode == "black" else "reflect"))
    for actual, image, (down, right) in zip(result, padded, random_values.tolist()):
        top, left = math.floor(down * (2 * padding + 1)), math.floor(right * (2 * padding + 1))
        assert torch.equal(actual, image[:, top : top + 10, left : left + 14])


def test_crop_reaches_every_shift_equally():
    dot = torch.zeros(9000, 1, 5, 5, dtype=torch.uint8)
    dot[:, 0, 2, 2] = 1
    hits = RandomCrop(padding=1)(dot, uniform(9000, 2)).sum(0)[0]
    assert (hits[1:4, 1:4] - 1000).abs().max() < 5 * 1000**0.5 and hits.sum() == 9000


def test_flip_mirrors_images_whose_draw_is_below_the_probability():
    images, random_values = random_images(100), uniform(100, 1)
    for probability in (0.0, 0.3, 1.0):
        result = RandomFlip(probability=probability)(images, random_values)
        assert result.dtype == torch.uint8
        for actual, image, random_value in zip(result, images, random_values[:, 0].tolist()):
            assert torch.equal(actual, image.flip(-1) if random_value < probability else image)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_reflection_repeats_if_the_padding_is_wider_than_the_image(side):
    images, random_values = (
        random_images(8, height=side, width=side),
        torch.zeros(8, 2),
    )  # draw 0 crops the upper left corner
    edges = [(0, 0), (0, 0), (5, 5), (5, 5)]
    padded = np.pad(images.numpy(), edges, mode="reflect" if side > 1 else "edge")
    assert (RandomCrop(padding=5, mode="reflect")(images, random_values).numpy() == padded[..., :side, :side]).all()


def test_alternating_flip_mirrors_each_image_in_every_other_epoch():
    images = random_images(400)
    augmentations = Augmentations({"flip": AlternatingFlip()}, seed=5, num_classes=4)
    rows, labels = torch.arange(400), torch.zeros(400, dtype=torch.long)
    mirrored = []
    for epoch in range(4):
        drawn = augmentations.draw(epoch=epoch, samples=400, device=torch.device("cpu"))
        result, _, _ = drawn(images, labels, rows)
        is_mirrored = (result == images.flip(-1)).flatten(1).all(1)
        assert torch.equal(is_mirrored, ~(result == images).flatten(1).all(1))
        mirrored.append(is_mirrored)
    assert torch.equal(mirrored[0], ~mirrored[1]) and torch.equal(mirrored[0], mirrored[2])
    assert torch.equal(mirrored[1], mirrored[3]) and 150 < mirrored[0].sum() < 250


@pytest.mark.parametrize(("height", "width"), [(12, 12), (9, 14)])
def test_affine_equals_torchvision(height, width):
    from torchvision.transforms.functional import InterpolationMode, affine

    step = RandomAffine(translate=0.2, scale=[0.7, 1.4], rotate=60, shear=25, mirror=0.5)
    images, random_values = random_images(40, height=height, width=width), uniform(40, 6)
    result = step(images, random_values)
    assert result.dtype == torch.float32
    flips = 0
    for actual, image, row in zip(result, images, random_values.tolist()):
        right, down, size, turn, lean, mirror = row
        flips += mirror < 0.5
        expected = affine(
            (image.flip(-1) if mirror < 0.5 else image).float()[None],
            angle=60 * (2 * turn - 1),
            translate=[0.2 * (2 * right - 1) * width, 0.2 * (2 * down - 1) * height],
            scale=0.7 + 0.7 * size,
            shear=[25 * (2 * lean - 1), 0.0],
            interpolation=InterpolationMode.BILINEAR,
            fill=None,  # zeros; a value would be blended in by a mask
        )[0]
        assert (actual - expected).abs().max() < 0.02  # of 255
    assert 0 < flips < 40


def test_affine_with_zero_ranges_is_the_identity():
    images = random_images(8)
    identity = RandomAffine(translate=0, scale=[1, 1], rotate=0, shear=0, mirror=0)
    assert (identity(images, uniform(8, 6)) - images).abs().max() < 1e-3
    shifted = RandomAffine(translate=0.25, scale=[1, 1], rotate=0, shear=0, mirror=0)
    random_values = torch.tensor([[1.0, 0.5, 0, 0, 0, 0]]).expand(8, 6)  # a quarter to the right: 3 of 12 pixels
    assert (shifted(images, random_values)[..., 3:] - images[..., :-3]).abs().max() < 1e-3
    assert shifted(images, random_values)[..., :3].abs().max() < 1e-3


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 12, 12), (1, 9, 14)])
@pytest.mark.parametrize("as_float", [False, True])
def test_resized_crop_equals_torchvision(channels, height, width, as_float):
    step = RandomResizedCrop(area=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
    images, random_values = random_images(60, channels, height, width), uniform(60, 4)
    images = images.float() if as_float else images
    random_values[0], random_values[1] = 0, 1 - 2**-24
    result = step(images, random_values)
    assert result.dtype == torch.float32
    boxes = rectangles(random_values, area=step.area, ratio=step.ratio, height=height, width=width)
    for actual, image, box in zip(result, images, torch.stack(boxes, dim=1).long().tolist()):
        for antialias in (False, True):
            expected = reference.resized_crop(image.float(), *box, size=[height, width], antialias=antialias)
            assert (actual - expected).abs().max() < 0.02  # of 255


@pytest.mark.parametrize(("area", "ratio", "height", "width"), [
    ((0.08, 1.0), (3 / 4, 4 / 3), 224, 224),
    ((0.02, 0.4), (0.3, 1 / 0.3), 200, 400),
    ((0.5, 1.0), (3 / 4, 4 / 3), 300, 100),
])  # fmt: skip
def test_random_rectangles_have_the_configured_area_and_aspect_ratio(area, ratio, height, width):
    top, left, tall, wide = (
        coordinates.double()
        for coordinates in rectangles(uniform(20000, 4), area=area, ratio=ratio, height=height, width=width)
    )
    assert min(top.min(), left.min()) >= 0 and min(tall.min(), wide.min()) >= 1
    assert (top + tall).max() <= height and (left + wide).max() <= width
    shares = tall * wide / (height * width)
    assert stats.kstest(shares.numpy(), stats.uniform(area[0], area[1] - area[0]).cdf).statistic < 0.02
    aspect_ratios = wide / tall
    if height == width:
        unclipped = shares < 0.7  # every aspect ratio fits into the image
        assert aspect_ratios[unclipped].min() > ratio[0] * 0.96 and aspect_ratios[unclipped].max() < ratio[1] * 1.04
        log_uniform = stats.uniform(math.log(ratio[0]), math.log(ratio[1] / ratio[0]))
        assert stats.kstest(aspect_ratios[unclipped].log().numpy(), log_uniform.cdf).statistic < 0.03
    # If there is room, every position is equally likely, including the last one.
    for start, side, room in ((top, tall, height), (left, wide, width)):
        if (free := side < 0.7 * room).any():
            assert abs((start / (room - side))[free].mean() - 0.5) < 0.02
            assert start[free].min() == 0 and (start + side)[free].max() == room


@pytest.mark.parametrize(("height", "width"), [(28, 28), (20, 33)])
def test_elastic_equals_torchvision_with_scipys_displacement(height, width):
    step = Elastic(alpha=34, sigma=4)
    images, random_values = random_images(6, 1, height, width), uniform(6, 1)
    displacements = step.displacements(random_values, height=height, width=width)
    noise = (2 * (per_pixel(random_values[:, 0], 2 * height * width) >> 16) + 1) / 2**16
    assert noise.min() >= -1 and noise.max() <= 1 and abs(noise.mean()) < 0.02 and abs(noise.var() - 1 / 3) < 0.01
    for displacement, field, actual, image in zip(
        displacements, noise.view(displacements.shape), step(images, random_values), images
    ):
        for smooth, axis in zip(displacement.numpy(), field.double().numpy()):
            assert abs(34 * ndimage.gaussian_filter(axis, 4, mode="constant", truncate=8) - smooth).max() < 2e-3
        normalised = displacement * torch.tensor([2 / width, 2 / height]).view(2, 1, 1)  # the sides are -1 to 1
        expected = reference.elastic(image.float(), normalised.permute(1, 2, 0)[None], fill=None)
        assert (actual - expected).abs().max() < 0.02
    assert 1 < displacements.square().mean().sqrt() < 1.5  # 0.16 * 34 / 4, and less at the border
    assert torch.equal(Elastic(alpha=0, sigma=4)(images, random_values).round(), images.float())


# Colour


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("as_float", [False, True])
def test_color_shift_equals_torchvision(channels, as_float):
    images, random_values = random_images(40, channels), uniform(40, 4)
    images[0], images[1, :, :, :6] = 0, 255  # a black image, and grey pixels beside coloured ones
    images = images.float() if as_float else images
    strengths = {"brightness": 0.6, "contrast": 0.5, "saturation": 0.9, "hue": 0.5}
    result = ColorShift(**strengths)(images, random_values)
    for actual, image, row in zip(result, images, random_values.tolist()):
        brightness, contrast, saturation, hue = ((2 * u - 1) * s for u, s in zip(row, strengths.values()))
        expected = reference.adjust_brightness(image.float() / 255, 1 + brightness)
        expected = reference.adjust_contrast(expected, 1 + contrast)
        expected = reference.adjust_saturation(expected, 1 + saturation)
        expected = reference.adjust_hue(expected, hue)
        assert (actual - 255 * expected).abs().max() < 0.02
    assert (result[1:] - images[1:]).abs().amax(dim=(1, 2, 3)).min() > 1
    identity = ColorShift(brightness=0, contrast=0, saturation=0, hue=0)
    assert torch.equal(identity(images, random_values), images.float())


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_color_shift_equals_torchvision_alone(name):
    """One shift at a time: neither the order nor the clipping of the other shifts can hide a mistake."""
    images, random_values = random_images(20), uniform(20, 4)
    strengths = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0} | {name: 0.3}
    result = ColorShift(**strengths)(images, random_values)
    adjust = getattr(reference, f"adjust_{name}")
    for actual, image, random_value in zip(result, images, random_values[:, list(strengths).index(name)].tolist()):
        change = 0.3 * (2 * random_value - 1) + (name != "hue")
        assert (actual - 255 * adjust(image.float() / 255, change)).abs().max() < 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_pca_color_equals_the_papers_formula_with_numpys_eigenvectors(channels):
    images, random_values = random_images(30, channels, 5, 5), uniform(30, 3)
    mixing = np.array([[0.2, 0.05, 0.1], [0.0, 0.1, 0.03], [0.02, 0.01, 0.04]])[:channels, :channels]
    covariance = mixing @ mixing.T
    step = PCAColor(sigma=0.7)
    step.fit(torch.zeros(channels), torch.from_numpy(covariance))
    values, vectors = np.linalg.eigh(covariance)
    vectors *= np.sign(vectors[np.abs(vectors).argmax(0), range(channels)])
    for actual, image, row in zip(step(images, random_values), images, random_values.double().numpy()):
        multiples = 0.7 * stats.norm.ppf(row[:channels] + 2**-25)
        shift = 255 * vectors @ (multiples * values)
        assert np.abs(actual.numpy() - (image.numpy() + shift[:, None, None])).max() < 1e-3
    assert torch.equal(PCAColor(sigma=0.7)(images, random_values), images.float())  # not fitted: no shift


def test_pca_color_shifts_have_the_covariance_of_the_data():
    covariance = torch.tensor([[0.06, 0.05, 0.04], [0.05, 0.06, 0.05], [0.04, 0.05, 0.07]], dtype=torch.float64)
    step = PCAColor(sigma=1)
    step.fit(torch.zeros(3), covariance)
    shifts = step(torch.zeros(50000, 3, 1, 1), uniform(50000, 3)).view(-1, 3).double() / 255
    assert shifts.mean(0).abs().max() < 2e-3
    assert (shifts.T.cov() - covariance @ covariance).abs().max() < 3e-4  # P diag(l^2) P^T


# Corruptions


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("fill", ["random", "mean", "black"])
def test_erasing_equals_torchvision(channels, as_float, fill):
    step = RandomErasing(probability=0.6, area=[0.02, 0.4], ratio=[0.3, 1 / 0.3], fill=fill)
    step.fit(torch.tensor([0.2, 0.4, 0.6][:channels]), torch.eye(channels))
    images, random_values = random_images(60, channels, 12, 20), uniform(60, 6)
    images = images.float() if as_float else images
    result = step(images, random_values)
    assert result.dtype == images.dtype
    noise = (per_pixel(random_values[:, 5], channels * 240) >> 24).view(images.shape) + 128
    boxes = rectangles(random_values[:, 1:5], area=step.area, ratio=step.ratio, height=12, width=20)
    erased = 0
    for index, (top, left, tall, wide) in enumerate(torch.stack(boxes, dim=1).long().tolist()):
        value = torch.tensor([51, 102, 153][:channels] if fill == "mean" else [0] * channels)[:, None, None]
        if fill == "random":
            value = noise[index, :, top : top + tall, left : left + wide]
        expected = images[index]
        if random_values[index, 0] < 0.6:
            expected = reference.erase(expected, top, left, tall, wide, value.to(images.dtype))
            erased += 1
        assert torch.equal(result[index], expected)
    assert 20 < erased < 50
    assert noise.min() >= 0 and noise.max() <= 255 and abs(noise.double().mean() - 127.5) < 2


@pytest.mark.parametrize(("sigma", "height", "width"), [([0.1, 1.0], 12, 12), ([0.5, 2.0], 9, 14), ([1.0, 3.0], 5, 7)])
def test_blur_equals_torchvision(sigma, height, width):
    images, random_values = random_images(20, 3, height, width), uniform(20, 2)
    result = RandomBlur(probability=0.7, sigma=sigma)(images, random_values)
    radius = min(math.ceil(3 * sigma[1]), height - 1)
    for actual, image, (chance, size) in zip(result, images, random_values.tolist()):
        if chance >= 0.7:
            assert torch.equal(actual, image.float())
            continue
        width_of_gaussian = sigma[0] + size * (sigma[1] - sigma[0])
        expected = reference.gaussian_blur(image.float(), [2 * radius + 1] * 2, [width_of_gaussian] * 2)
        assert (actual - expected).abs().max() < 0.01


def test_noise_is_normal_with_the_configured_deviation():
    images = torch.full((400, 3, 24, 24), 128, dtype=torch.uint8)
    random_values = uniform(400, 3)
    noise = RandomNoise(probability=0.5, sd=20)(images, random_values).double() - 128
    noisy = random_values[:, 0] < 0.5
    assert noise[~noisy].abs().max() == 0
    unit = (noise[noisy] / (20 * random_values[noisy, 1, None, None, None].double())).clamp(-9, 9)
    unit = unit[random_values[noisy, 1] > 0.1]
    assert stats.kstest(unit.flatten().numpy(), "norm").statistic < 0.005
    assert abs(unit.var() - 1) < 0.01 and len(unit.unique()) > 40000
    for shift in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):  # samples, colours, neighbours
        assert abs((unit * unit.roll(shift, (0, 1, 2, 3))).mean()) < 0.01
    grey = RandomNoise(probability=1, sd=255)(random_images(50, 1), uniform(50, 3))
    assert grey.min() == 0 and grey.max() == 255


# Mixing


def test_mixup_equals_values_computed_by_hand():
    images = torch.tensor([[[[100, 200]]], [[[0, 40]]]], dtype=torch.uint8)  # a sample and its partner
    labels = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    step = Mixup(alpha=1, probability=0.5)  # Beta(1, 1) is uniform
    mixed, targets = step(images, labels, torch.tensor([[0.4, 0.75]]))
    assert mixed.tolist() == [[[[75.0, 160.0]]]] and targets.tolist() == [[0.25, 0.75, 0.0]]
    mixed, targets = step(images, labels, torch.tensor([[0.5, 0.75]]))  # a draw at the probability does not mix
    assert mixed.tolist() == [[[[100.0, 200.0]]]] and targets.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("as_float", [False, True])
def test_cutmix_equals_the_papers_algorithm(as_float):
    images, random_values = random_images(60, 3, 10, 14), uniform(30, 4)
    images = images.float() if as_float else images
    labels = functional.one_hot(torch.arange(60) % 7, 7).float()  # never equal to the partner's label
    mixed, targets = CutMix(alpha=1, probability=0.8)(images, labels, random_values)
    assert mixed.dtype == images.dtype
    for index, (chance, share, across, down) in enumerate(random_values.tolist()):
        expected, kept = images[index].clone(), 1.0
        if chance < 0.8:
            wide, tall = int(14 * math.sqrt(1 - share)), int(10 * math.sqrt(1 - share))
            x, y = int(14 * across), int(10 * down)
            left, right = max(x - wide // 2, 0), min(x + wide // 2, 14)
            top, bottom = max(y - tall // 2, 0), min(y + tall // 2, 10)
            expected[:, top:bottom, left:right] = images[30 + index, :, top:bottom, left:right]
            kept = 1 - (right - left) * (bottom - top) / 140
        assert torch.equal(mixed[index], expected)
        assert (targets[index] - (kept * labels[index] + (1 - kept) * labels[30 + index])).abs().max() < 1e-6
    assert (targets.sum(1) - 1).abs().max() < 1e-6


# Distributions


@pytest.mark.parametrize("a", [0.05, 0.2, 0.4, 1.0, 1.5, 8.0])
def test_beta_quantiles_equal_scipy(a):
    random_values = torch.cat([uniform(20000, 1)[:, 0], torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])])
    actual = SymmetricBeta("alpha", a)(random_values).double().numpy()
    expected = stats.beta.ppf(random_values.double().numpy(), a, a)
    assert actual.min() >= 0 and actual.max() <= 1
    assert np.abs(actual - expected).mean() < 2e-5
    inside = (random_values > 1e-3) & (random_values < 1 - 1e-3)  # near 0 and 1 the table interpolates linearly
    assert np.abs(actual - expected)[inside.numpy()].max() < 1e-3


def test_normal_quantiles_equal_scipy():
    random_values = torch.cat([uniform(2000, 1)[:, 0], torch.tensor([0.0, 1 - 2**-24])])
    assert np.abs(normal(random_values).numpy() - stats.norm.ppf(random_values.double().numpy() + 2**-25)).max() < 1e-5


def test_random_values_per_pixel_are_uniform_and_differ():
    seeds = torch.cat([uniform(100, 1)[:, 0], torch.arange(100) / 2**24])  # close seeds, too
    random_values = per_pixel(seeds, 5000)
    assert len(random_values.unique()) > 0.999 * random_values.numel()
    uniform_values = random_values.double() / 2**32 + 0.5
    assert stats.kstest(uniform_values[:, ::5].flatten().numpy(), "uniform").statistic < 0.003
    for bit in range(32):
        ones = (random_values >> bit & 1).double()
        assert abs(ones.mean() - 0.5) < 0.002
    standardised = (uniform_values - 0.5) * 12**0.5
    for shift in ((1, 0), (0, 1), (0, 28), (0, 32)):
        assert abs((standardised * standardised.roll(shift, (0, 1))).mean()) < 0.004
    assert (standardised.mean(1).abs() < 6 / 5000**0.5).all() and (standardised.mean(0).abs() < 6 / 200**0.5).all()


# Wrong arguments


def crop(**changes: object) -> RandomCrop:
    return RandomCrop(**{"padding": 1} | changes)


def affine(**changes: object) -> RandomAffine:
    return RandomAffine(**{"translate": 0.1, "scale": [0.9, 1.1], "rotate": 5, "shear": 5, "mirror": 0} | changes)


def resized_crop(**changes: object) -> RandomResizedCrop:
    return RandomResizedCrop(**{"area": [0.1, 1], "ratio": [0.5, 2]} | changes)


def elastic(**changes: object) -> Elastic:
    return Elastic(**{"alpha": 1, "sigma": 1} | changes)


def color_shift(**changes: object) -> ColorShift:
    return ColorShift(**{"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0} | changes)


def erasing(**changes: object) -> RandomErasing:
    return RandomErasing(**{"probability": 1, "area": [0.1, 1], "ratio": [0.5, 2], "fill": "black"} | changes)


def blur(**changes: object) -> RandomBlur:
    return RandomBlur(**{"probability": 1, "sigma": [1, 2]} | changes)


def noise(**changes: object) -> RandomNoise:
    return RandomNoise(**{"probability": 1, "sd": 2} | changes)


def mixup(**changes: object) -> Mixup:
    return Mixup(**{"alpha": 1, "probability": 1} | changes)


def cutmix(**changes: object) -> CutMix:
    return CutMix(**{"alpha": 1, "probability": 1} | changes)


@pytest.mark.parametrize(
    ("build", "key", "value"),
    [
        (RandomCrop, "padding", -1),
        (crop, "mode", "edge"),
        (RandomFlip, "probability", 1.5),
        (RandomFlip, "probability", "half"),
        (affine, "translate", -0.1),
        (affine, "scale", [1.1, 0.9]),
        (affine, "scale", [0.0, 0.9]),
        (affine, "scale", [1.0]),
        (affine, "scale", 1.0),
        (affine, "rotate", 181),
        (affine, "shear", 90),
        (affine, "mirror", float("nan")),
        (resized_crop, "area", [0, 1]),
        (resized_crop, "area", [0.5, 1.1]),
        (resized_crop, "ratio", [2, 1]),
        (elastic, "alpha", -1),
        (elastic, "sigma", 0),
        (color_shift, "brightness", 1.1),
        (color_shift, "contrast", -0.1),
        (color_shift, "saturation", 2),
        (color_shift, "hue", 0.6),
        (PCAColor, "sigma", -0.1),
        (erasing, "probability", 2),
        (erasing, "area", [0.1, 2]),
        (erasing, "ratio", ["a", "b"]),
        (erasing, "fill", "white"),
        (blur, "probability", -1),
        (blur, "sigma", [0, 1]),
        (noise, "probability", -1),
        (noise, "sd", 256),
        (mixup, "alpha", 0),
        (mixup, "probability", 2),
        (cutmix, "alpha", True),
        (cutmix, "probability", 2),
    ],
)
def test_config_error_names_the_wrong_augmentation_argument(build, key, value):
    with pytest.raises(ConfigError, match="must be") as caught:
        build(**{key: value})
    assert caught.value.subject == key


@pytest.mark.parametrize(
    ("step", "values"),
    [
        (Elastic(sigma=2.0, alpha=20.0), 1),
        (RandomErasing(probability=1.0, area=[0.1, 0.4], ratio=[0.3, 3.0], fill="mean"), 5),
        (RandomBlur(probability=1.0, sigma=[0.5, 2.0]), 2),
        (ColorShift(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1), 4),
    ],
)
def test_augmentation_in_float32_differs_by_its_rounding(monkeypatch, step, values):
    """Apple's GPUs have no float64: there the same steps compute in float32."""
    images, random_values = random_images(8).float(), uniform(8, values)
    expected = step(images.clone(), random_values)
    for module in ("distributions", "geometry", "corruptions", "color"):
        monkeypatch.setattr(f"data.augment.{module}.widest_float", lambda device: torch.float32)
    actual = step(images.clone(), random_values)
    assert actual.isfinite().all()
    close = (actual - expected).abs() < 0.5  # of 255; a rectangle's edge may move by a pixel
    assert close.double().mean() > 0.99


def test_normal_values_in_float32_are_finite(monkeypatch):
    ends = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])
    expected = normal(ends)
    monkeypatch.setattr("data.augment.distributions.widest_float", lambda device: torch.float32)
    torch.testing.assert_close(normal(ends), expected, rtol=1e-2, atol=1e-6)

"""Evidence on the splits of a training: class counts, constant images, duplicates, statistics of each split."""

from typing import Any

import torch
from torch import Tensor

from analysis.check.duplicates import find_duplicates
from data.sources.images import Files, Images
from data.sources.pixels import brightness_and_contrast
from data.sources.splits import Splits
from diagnosis.start_evidence import DataEvidence

MAX_TRAIN, MAX_HELD_OUT = 60_000, 10_000  # images of a split that are compared, if they fit into MAX_BYTES
MAX_BYTES = 400 * 2**20


def measure_data(splits: Splits, config: dict[str, Any]) -> DataEvidence:
    """Return the evidence on the splits. Large splits are sampled, with a fixed seed."""
    images = splits.by_name
    limits = dict.fromkeys(images, MAX_HELD_OUT) | {"train": MAX_TRAIN}
    pixels = {name: sample(split, most=limits[name]) for name, split in images.items()}
    facts = {name: statistics_of(values) for name, (_, values) in pixels.items()}
    rows_of_train, train = pixels["train"]
    duplicates, near, examples = {}, {}, {}
    for name, (rows, values) in pixels.items():
        if name != "train" and values.shape[1:] == train.shape[1:]:
            result = find_duplicates(values, train)
            duplicates[name], near[name] = len(result.exact), len(result.near)
            pairs = [*result.exact, *result.near][:3]
            examples[name] = ", ".join(
                f"{name_of(images[name], int(rows[a]))} = {name_of(images['train'], int(rows_of_train[b]))}"
                for a, b in pairs
            )
    return DataEvidence(
        counts={
            name: dict(zip(splits.class_names, numbers, strict=True)) for name, numbers in splits.class_counts.items()
        },
        duplicates=duplicates,
        near=near,
        compared={name: len(pixels[name][1]) for name in duplicates},
        examples=examples,
        constant={name: float((fact["contrast"] == 0).float().mean()) for name, fact in facts.items()},
        shifts={
            name: {key: difference_of(values, facts["train"][key]) for key, values in fact.items()}
            for name, fact in facts.items()
            if name != "train"
        },
        config=config,
    )


def sample(images: Images, *, most: int) -> tuple[Tensor, Tensor]:
    """Return positions (N,) and pixels, uint8 (N, C, H, W), of a random sample of a split, or of the entire split."""
    size = int(torch.tensor(images.pixels.shape[1:]).prod())
    most = max(100, min(most, MAX_BYTES // size))
    rows = torch.arange(len(images))
    if len(images) > most:
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:most].sort().values
    return rows, images.read(rows)


def statistics_of(pixels: Tensor) -> dict[str, Tensor]:
    """Return brightness and contrast of each image (N,), and with three channels their means."""
    parts = [(*brightness_and_contrast(part), part.float().mean((2, 3))) for part in pixels.split(2000)]
    brightness, contrast, means = (torch.cat(values) for values in zip(*parts, strict=True))
    facts = {"brightness": brightness, "contrast": contrast}
    if pixels.shape[1] == 3:
        facts |= {name: means[:, channel] for channel, name in enumerate(("red", "green", "blue"))}
    return facts


def difference_of(values: Tensor, reference: Tensor) -> float:
    """Return the difference of the means, in standard deviations of the reference (Cohen's d)."""
    return float((values.mean() - reference.mean()) / reference.std().clamp(min=1e-3))


def name_of(images: Images, row: int) -> str:
    """Return the file of an image, or its position."""
    return str(images.pixels.paths[row]) if isinstance(images.pixels, Files) else f"image {row}"

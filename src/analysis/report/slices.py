"""Error of a model on slices of a split: classes, brightness, contrast, the user's groups; most confused classes."""

import csv
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from analysis.report.measurements import Measured
from core.errors import ConfigError, DataError
from diagnosis.run_evidence import SplitError
from trainer.inference.evaluation import count_confusions

QUARTERS = ("lowest quarter", "second quarter", "third quarter", "highest quarter")


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A part of a split. `gain` is the accuracy that is gained at most if all its errors are corrected."""

    kind: str
    name: str
    error: SplitError
    gain: float


def slices_of(measured: Measured, class_names: Sequence[str], groups: Mapping[str, Tensor]) -> list[Slice]:
    """Return the slices of a split; slices without images are left out.

    `groups` maps the name of a group of the user to the positions of its images in the sample, int64 (M,).
    """
    masks: list[tuple[str, str, Tensor]] = [
        ("class", name, measured.labels == label) for label, name in enumerate(class_names)
    ]
    for kind, values in (("brightness", measured.brightness), ("contrast", measured.contrast)):
        masks += [(kind, name, mask) for name, mask in zip(QUARTERS, quarters(values), strict=True)]
    for name, rows in groups.items():
        mask = torch.zeros(len(measured.labels), dtype=torch.bool)
        mask[rows] = True
        masks.append(("group", name, mask))
    total = len(measured.labels)
    return [
        Slice(
            kind=kind,
            name=name,
            error=SplitError(wrong=int(measured.wrong[mask].sum()), samples=int(mask.sum())),
            gain=int(measured.wrong[mask].sum()) / total,
        )
        for kind, name, mask in masks
        if mask.any()
    ]


def quarters(values: Tensor) -> list[Tensor]:
    """Return four masks (N,) of equally many values (N,), from the lowest quarter to the highest; ties by position."""
    ranks = values.argsort(stable=True).argsort()
    quarter = ranks * 4 // max(1, len(values))
    return [quarter == number for number in range(4)]


def confused_pairs(measured: Measured, class_names: Sequence[str], *, most: int = 10) -> list[tuple[str, str, int]]:
    """Return (label, predicted class, number of images) of the most frequent confusions, at most `most`."""
    count = len(class_names)
    cells = count_confusions(measured.labels, measured.predicted, count)
    cells.fill_diagonal_(0)
    numbers, places = cells.flatten().sort(descending=True, stable=True)
    pairs = zip(numbers[:most].tolist(), places[:most].tolist(), strict=True)
    return [(class_names[place // count], class_names[place % count], number) for number, place in pairs if number]


def read_groups(option: str | None, measured: Measured) -> dict[str, Tensor]:
    """Return the user's groups as positions in the sample, int64 (M,), by name.

    The option is a pattern of file names, such as `*night*`, which forms one group, or a CSV file with the columns
    `image` and `tags`. An image may have several tags, separated by spaces; each tag is a group. Images are named as in
    `Measured.names`: a path, its last part, or the position in the split. Raises DataError for a CSV file without these
    columns, and ConfigError if no image belongs to a group.
    """
    if option is None:
        return {}
    places: dict[str, list[int]] = {}
    for place, name in enumerate(measured.names):
        for key in {name, Path(name).name}:
            places.setdefault(key, []).append(place)
    groups: dict[str, list[int]] = {}
    if option.endswith(".csv"):
        for image, tags in _read_tags(Path(option)):
            for tag in tags.split():
                groups.setdefault(tag, []).extend(places.get(image, []))
    else:
        groups[option] = [place for place, name in enumerate(measured.names) if fnmatch.fnmatchcase(name, option)]
    groups = {name: rows for name, rows in groups.items() if rows}
    if not groups:
        raise ConfigError("report.groups", "selects no image of the evaluated split", value=option)
    return {name: torch.tensor(sorted(set(rows))) for name, rows in groups.items()}


def _read_tags(path: Path) -> list[tuple[str, str]]:
    """Return (image, tags) of each line of a CSV file."""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            lines = list(csv.DictReader(file))
    except OSError as exception:
        raise DataError(str(path), f"cannot be read: {exception.strerror}") from None
    if lines and not {"image", "tags"} <= lines[0].keys():
        raise DataError(str(path), f"must have the columns image and tags; it has {', '.join(map(str, lines[0]))}")
    return [(str(line["image"]), str(line["tags"] or "")) for line in lines]

"""The error of a run in parts, each with the next step that lowers it.

    human-level error --> train error --> train-dev error --> validation error --> test error
           avoidable bias        variance          data mismatch        overfitting to validation

Each arrow is the difference of the two errors beside it. Without a train-dev split, variance and data mismatch are one
part. Source: Ng, Machine Learning Yearning (2018), chapters 20 to 24 and 40 to 42.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diagnosis.run_evidence import SplitError

ORDER = ("train", "train_dev", "val", "test")
PARTS = {  # (the split with the smaller error, the split with the larger error) -> name of the part, advice
    ("human", "train"): ("avoidable bias", "a larger model, a longer run, another learning rate or optimizer"),
    ("train", "train_dev"): ("variance", "more images, augmentation, weight decay, dropout"),
    ("train_dev", "val"): ("data mismatch", "training images that resemble the validation images"),
    ("train", "val"): ("variance", "more images, augmentation, weight decay, dropout"),
    ("train", "test"): ("variance", "more images, augmentation, weight decay, dropout"),
    ("val", "test"): ("overfitting to validation", "a larger validation split, fewer choices made on it"),
    ("train_dev", "test"): ("data mismatch", "training images that resemble the test images"),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the error: the difference of two errors, with half the width of its 95% interval."""

    name: str
    size: float
    margin: float
    advice: str

    @property
    def is_significant(self) -> bool:
        """Return whether the interval excludes 0."""
        return self.size > self.margin


def parts_of(errors: Mapping[str, SplitError], *, human_error: float | None) -> list[Part]:
    """Return the parts of the error in the order of the splits; the human-level error is 0 if it is unknown."""
    present = [name for name in ORDER if name in errors]
    parts = []
    for before, after in zip(["human", *present], present, strict=False):
        name, advice = PARTS[before, after]
        base = human_error or 0.0 if before == "human" else errors[before].share
        variance = errors[after].variance + (0.0 if before == "human" else errors[before].variance)
        parts.append(Part(name=name, size=errors[after].share - base, margin=1.96 * math.sqrt(variance), advice=advice))
    return parts

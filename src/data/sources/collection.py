"""Collection: the labelled images that a data set function returns, in the splits of its source."""

from dataclasses import dataclass

from core.seeding import fold
from data.sources.images import Images
from data.sources.stratification import split

TEST_SEED = fold(0, "test")  # the test split never depends on a run's seed


@dataclass(frozen=True)
class Collection:
    """A data set with the splits of its source."""

    train: Images
    val: Images | None  # None: `val_fraction` of train is held out
    test: Images | None  # None: no test split
    class_names: list[str]


def with_test(images: Images, *, fraction: float, class_names: list[str]) -> Collection:
    """Return a collection whose test split is a stratified share of the images, the same for every seed of a run."""
    if fraction == 0:
        return Collection(train=images, val=None, test=None, class_names=class_names)
    train, test = split(images, fraction=fraction, seed=TEST_SEED, name="test")
    return Collection(train=train, val=None, test=test, class_names=class_names)

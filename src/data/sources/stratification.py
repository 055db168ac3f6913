"""Stratified subsets: each class has its share of the samples, exact to one sample.

A class with n_c of N samples gets n_c * count / N of them, rounded down. The remaining samples go to the classes with
the largest remainders (Hamilton's method, 1792). The seed decides between equal remainders.
"""

import torch
from torch import Tensor

from core.errors import DataError
from core.seeding import fold
from data.sources.images import Images


def split(images: Images, *, fraction: float, seed: int, name: str) -> tuple[Images, Images]:
    """Return the remaining images and a stratified share of them for the split `name`.

    At least one image of each class remains. Raises DataError if the share is empty.
    """
    chosen = stratified(images.labels, count=round(fraction * len(images)), seed=seed, spare=1)
    if len(chosen) == 0:
        explanation = f"leaves the {name} split empty: there are {len(images)} images; set a larger share, or 0"
        raise DataError(f"data.{name}_fraction", explanation, value=fraction)
    remains = torch.ones(len(images), dtype=torch.bool)
    remains[chosen] = False
    return images.take(remains.nonzero().flatten()), images.take(chosen)


def stratified(labels: Tensor, *, count: int, seed: int, spare: int) -> Tensor:
    """Return sorted positions, int64, of `count` samples: each class by its share, but all except `spare` at most."""
    sizes = labels.bincount()
    quotas = _quotas(sizes.tolist(), count=count, spare=spare, seed=fold(seed, "remainders"))
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    grouped = shuffled[labels[shuffled].argsort(stable=True)]  # class after class, each in random order
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[grouped]]  # within the class
    return grouped[rank < torch.tensor(quotas)[labels[grouped]]].sort().values


def _quotas(sizes: list[int], *, count: int, spare: int, seed: int) -> list[int]:
    """Distribute `count` in proportion to the sizes, by the largest remainders; return the share of each class."""
    total = sum(sizes)
    quotas = [max(min(size * count // total, size - spare), 0) for size in sizes]
    remainders = [size * count % total for size in sizes]
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    for label in sorted(order, key=lambda label: -remainders[label]):
        if sum(quotas) < count and quotas[label] < sizes[label] - spare:
            quotas[label] += 1
    return quotas

"""Stratified shares: of each class its part, exact to one sample.

A class of n_c samples of N gets n_c * count / N of them, cut down to a whole number; what is missing then goes to the
classes with the largest remainders (Hamilton's method, 1792).
"""

import torch
from torch import Tensor

from core.errors import DataError
from data.sources.images import Images


def split(images: Images, *, fraction: float, seed: int, part: str) -> tuple[Images, Images]:
    """The rest, and a stratified share of the images; each class keeps at least one image in the rest."""
    chosen = stratified(images.labels, count=round(fraction * len(images)), seed=seed, spare=1)
    if len(chosen) == 0:
        explanation = f"leaves the {part} part empty: there are {len(images)} images; give a larger share, or 0"
        raise DataError(f"data.{part}_fraction", explanation, value=fraction)
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[chosen] = False
    return images.take(rest.nonzero().flatten()), images.take(chosen)


def stratified(labels: Tensor, *, count: int, seed: int, spare: int) -> Tensor:
    """Sorted positions of `count` samples, each class by its share; `spare` samples of a class are never taken."""
    sizes = labels.bincount()
    quotas = _quotas(sizes.tolist(), count=count, spare=spare)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    grouped = shuffled[labels[shuffled].argsort(stable=True)]  # class after class, each in random order
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[grouped]]  # within the class
    return grouped[rank < torch.tensor(quotas)[labels[grouped]]].sort().values


def _quotas(sizes: list[int], *, count: int, spare: int) -> list[int]:
    """`count` shared out in proportion to the sizes, by the largest remainder; equal ones go by the class's order."""
    total = sum(sizes)
    quotas = [max(min(size * count // total, size - spare), 0) for size in sizes]
    remainders = [size * count % total for size in sizes]
    for label in sorted(range(len(sizes)), key=lambda label: -remainders[label]):
        if sum(quotas) < count and quotas[label] < sizes[label] - spare:
            quotas[label] += 1
    return quotas

"""Augmentations from elsewhere: torchvision's transforms, or any callable that takes a uint8 image (C, H, W).

They draw from the global generators, once a call. So they take one image after the other, each with generators that
are seeded from the sample's own number, and leave the generators as they were.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from core.errors import ConfigError, PreceptorError

TRIES = 32


class ASampleAtATime:
    """A step of `data.augment.pipeline` from a transform that takes one image. Errors name the config key `name`.

    It gives images as large as it gets, or of `image_size`, where larger ones are stored.
    """

    num_random_values = 1  # the seed
    one_at_a_time = True

    def __init__(self, transform: Callable[[Tensor], Tensor], *, name: str, image_size: int | None = None) -> None:
        if not callable(transform):
            raise ConfigError(
                name, "must be a built-in augmentation, or a callable that takes one image", value=transform
            )
        self.transform = transform
        self.name = name
        self.image_size = image_size

    def dry_run(self, shape: Sequence[int]) -> None:
        """Refuse a transform that does not take images of this shape (C, H, W), before the first step."""
        image = torch.arange(math.prod(shape)).view(1, *shape).to(torch.uint8)
        for number in range(TRIES):  # one that picks among operations shows a wrong argument only now and then
            self(image, torch.tensor([[number / TRIES]]))

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        """Images (B, C, H, W), rounded to uint8, and numbers (B, 1) to uint8 images."""
        if images.is_floating_point():
            images = images.round().clamp(0, 255).to(torch.uint8)
        with _generators_left_alone():
            return torch.stack(
                [
                    self._transformed(image, number)
                    for image, number in zip(images, random_values[:, 0].tolist(), strict=True)
                ]
            )

    def _transformed(self, image: Tensor, number: float) -> Tensor:
        seed = int(number * 2**24)
        torch.default_generator.manual_seed(seed)  # 1 us; torch.manual_seed visits every backend, 150 us
        random.seed(seed)
        np.random.seed(seed)
        try:
            result = self.transform(image)
        except PreceptorError:
            raise
        except Exception as exception:
            explanation = f"fails on an image {tuple(image.shape)}: {type(exception).__name__}: {exception}"
            raise ConfigError(self.name, explanation) from exception
        shapes = (image.shape, (len(image), self.image_size, self.image_size))
        if not isinstance(result, Tensor) or result.dtype != torch.uint8 or result.shape not in shapes:
            given = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ConfigError(self.name, f"must give torch.uint8 {tuple(image.shape)}, as it got; it gives {given}")
        return result


@contextlib.contextmanager
def _generators_left_alone() -> Iterator[None]:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker: another number may give other last bits
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])

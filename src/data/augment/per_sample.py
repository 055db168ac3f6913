"""Augmentations that are not built in: torchvision's transforms, or any callable that takes a uint8 image (C, H, W).

Such a transform draws from the global generators, once per call. So it is called once per image, and before each call
the generators are seeded with the sample's random value. Afterwards the generators' states are restored.
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


class PerSampleTransform:
    """Step of `data.augment.pipeline` that applies a transform of one image. Errors name the config key `name`.

    The images keep their size, or get `image_size` if they are stored larger.
    """

    num_random_values = 1  # the seed
    one_at_a_time = True

    def __init__(self, transform: Callable[[Tensor], Tensor], *, name: str, image_size: int | None = None) -> None:
        if not callable(transform):
            raise ConfigError(
                name, "must be a built-in augmentation, or a callable that takes one image", value=transform
            )
        self.transform = transform
        self.mirrors = "HorizontalFlip" in type(transform).__name__  # torchvision's
        self.name = name
        self.image_size = image_size

    def dry_run(self, shape: Sequence[int]) -> None:
        """Raise ConfigError if the transform fails on images of this shape (C, H, W)."""
        image = torch.arange(math.prod(shape)).view(1, *shape).to(torch.uint8)
        for number in range(TRIES):  # a transform that picks a random operation does not fail in each call
            self(image, torch.tensor([[number / TRIES]]))

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        """Return uint8 images for images (B, C, H, W), which are rounded to uint8, and random values (B, 1)."""
        if images.is_floating_point():
            images = images.round().clamp(0, 255).to(torch.uint8)
        with _generators_restored():
            return torch.stack(
                [
                    self._transformed(image, random_value)
                    for image, random_value in zip(images, random_values[:, 0].tolist(), strict=True)
                ]
            )

    def _transformed(self, image: Tensor, random_value: float) -> Tensor:
        seed = int(random_value * 2**24)
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
            returned = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            explanation = f"must return torch.uint8 {tuple(image.shape)}, like its input; it returns {returned}"
            raise ConfigError(self.name, explanation)
        return result


@contextlib.contextmanager
def _generators_restored() -> Iterator[None]:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker: the last bits of a result may depend on the number of threads
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])

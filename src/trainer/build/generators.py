"""Random values while a training is built: a function of the seed; the caller's generators stay unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.device import generator_of


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's default generators of the CPU and of a device; restore their states at the end."""
    generators = [torch.default_generator]
    if device is not None and device.type != "cpu":
        torch.empty(0, device=device)  # a device has no generator before its first use
        generators.append(generator_of(device))
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

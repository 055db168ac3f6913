"""The model: constructed with initial weights that are a function of the seed, and moved to its device."""

import torch
from torch import nn

from core.errors import ConfigError
from core.options.declarations import TrainConfig
from trainer.build.generators import seeded
from trainer.build.instantiate import construct


def build_model(values: TrainConfig, *, init_seed: int) -> nn.Module:
    """Return the model. Its initial weights are a function of the seed; the caller's generators stay unchanged."""
    with seeded(init_seed):
        try:
            model = construct(values["model"], "model")
        except ConfigError as error:
            if error.subject == "model.image_size":  # it follows the data's
                raise ConfigError("data.image_size", error.explanation, value=error.value) from None
            raise
    if not isinstance(model, nn.Module):
        raise ConfigError("model._target_", "must build a torch.nn.Module", value=values["model"]["_target_"])
    return model


def place(model: nn.Module, device: torch.device, *, channels_last: bool | str) -> bool:
    """Move the model to its device and memory layout; returns whether images are to be channels_last too."""
    if channels_last == "auto":
        channels_last = any(isinstance(module, nn.Conv2d) for module in model.modules())
    if channels_last:
        model.to(memory_format=torch.channels_last)
    model.to(device)
    return bool(channels_last)

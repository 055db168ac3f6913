"""Dry-run checks on dummy images before training. Mismatches are reported by config key."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from core.errors import ConfigError
from core.options.declarations import DataOptions, TrainConfig


def check_model(model: nn.Module, values: TrainConfig) -> None:
    """Pass two images through a new model, as in evaluation and as in training; ConfigError if it cannot take them."""
    data = values["data"]
    shape = (2, data["channels"], data["image_size"], data["image_size"])
    smallest = getattr(model, "minimum_size", 1)
    if data["image_size"] < smallest:
        needs = f"{values['model']['_target_']} needs images of at least {smallest} pixels"
        raise ConfigError("data.image_size", needs, value=data["image_size"])
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(shape))
            in_training = copy.deepcopy(model).train()(torch.rand(shape))  # a copy: batch norm takes note of it
    except (RuntimeError, ValueError, IndexError, TypeError) as exception:
        explanation = f"does not take images of {shape[1:]} (channels, height, width): {exception}"
        raise ConfigError("model", explanation, value=values["model"]["_target_"]) from None
    heads = in_training if isinstance(in_training, tuple | list) else [in_training]  # logits, then auxiliary logits
    for output in (logits, *heads):
        given = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        if given != (2, data["num_classes"]):
            explanation = f"gives {given} for two images; the classes of the data require (2, {data['num_classes']})"
            raise ConfigError("model", explanation, value=values["model"]["_target_"])


def check_augmentation(steps: Mapping[str, Any], data: DataOptions) -> None:
    """Pass two dummy images of the stored size through all augmentation steps.

    Raises ConfigError unless the result has the size that the model is given.
    """
    size, channels = data["image_size"], data["channels"]
    stored = data["stored_size"] or size
    images, labels = torch.zeros(2, channels, stored, stored, dtype=torch.uint8), torch.full((4, 2), 0.5)
    for step in steps.values():
        if hasattr(step, "fit"):  # to dummy colours: those of the data are not known yet
            step.fit(torch.full((channels,), 0.5).double(), torch.eye(channels).double() / 12)
        if getattr(step, "one_at_a_time", False):
            step.dry_run(images.shape[1:])
        numbers = torch.full((2, step.num_random_values), 0.5)
        mixes = getattr(step, "mixes", False)
        images = step(torch.cat([images, images]), labels, numbers)[0] if mixes else step(images, numbers)
    height, width = images.shape[2:]
    if (height, width) != (size, size):
        explanation = f"augmentation gives images of {height} x {width}, but data.image_size = {size}"
        raise ConfigError(
            "data.stored_size",
            f"{explanation}; a step such as augment=random_resized_crop brings them to it",
            value=data["stored_size"],
        )


def check_single_image(model: nn.Module, values: TrainConfig, device: torch.device) -> None:
    """Pass a batch of one image through the model in training mode: batch norm may have no variance to divide by."""
    data = values["data"]
    shape = (1, data["channels"], data["image_size"], data["image_size"])
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(torch.rand(shape, device=device))
    except ValueError as exception:
        explanation = f"leaves a batch of one image, on which this model cannot be trained ({exception})"
        raise ConfigError(
            "data.batch_size", f"{explanation}; use 2 or more, and data.drop_last=auto", value=data["batch_size"]
        ) from None

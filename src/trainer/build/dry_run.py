"""Dry-run checks on dummy images before training. Mismatches are reported by config key."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError, as_preceptor_error
from core.options.declarations import DataOptions, TrainConfig
from data.loading.loaders import TrainLoader


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


def dummy_batches(data: DataOptions, loader: TrainLoader, device: torch.device, *, channels_last: bool) -> list[Tensor]:
    """Return images (B, C, H, W) on the device for each size of batch in an epoch, the usual size first.

    They are uninitialised: only their shapes, dtype and memory layout matter.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = data["channels"], data["image_size"], data["image_size"]
    return [
        torch.empty(size, *shape, device=device, memory_format=memory_format)
        for size in dict.fromkeys([loader.batch_size, loader.smallest_batch])
    ]


def check_training(model: nn.Module, values: TrainConfig, images: Sequence[Tensor]) -> None:
    """Pass dummy batches through a copy of the model in training mode.

    Raises ConfigError if batch norm cannot process a batch of one image, or if `trainer.deterministic` is set and an
    operation has no deterministic implementation on the device.
    """
    if any(len(batch) == 1 for batch in images):
        _check_single_image(model, values, images[0].new_zeros(1, *images[0].shape[1:]))
    if values["trainer"]["deterministic"] and images[0].device.type != "cpu":
        _check_deterministic(model, images[0][:2])


def _check_single_image(model: nn.Module, values: TrainConfig, image: Tensor) -> None:
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(image)
    except ValueError as exception:
        explanation = f"leaves a batch of one image, on which this model cannot be trained ({exception})"
        raise ConfigError(
            "data.batch_size",
            f"{explanation}; use 2 or more, and data.drop_last=auto",
            value=values["data"]["batch_size"],
        ) from None


def _check_deterministic(model: nn.Module, images: Tensor) -> None:
    try:
        outputs = copy.deepcopy(model).train()(images)
        torch.autograd.backward([each.sum() for each in ([outputs] if isinstance(outputs, Tensor) else outputs)])
    except RuntimeError as exception:
        raise as_preceptor_error(exception) from None

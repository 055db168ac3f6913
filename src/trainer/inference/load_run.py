"""A finished run, loaded for use: in a notebook, by `evaluate.py` and by `predict.py`.

Importing and loading have no side effects: no generator, thread count, TF32 flag, signal or hook of the caller changes.

run = load_run("outputs/2026-11-21_120000-lenet5-digits")
logits = run.model(run.transform("seven.png").unsqueeze(0))
print(run.class_names[logits.argmax()])
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import CheckpointError
from core.options.declarations import TrainConfig
from core.run_config import checked_run_config, fill_environment
from data.loading.normalisation import Normalisation
from data.sources.decode import MAX_PIXELS, decode
from data.sources.pixels import recolour, resize
from trainer.build.instantiate import resolve
from trainer.build.model import build_model
from trainer.build.normalisation import saved_normalisation
from trainer.build.trust import restricted
from trainer.device import autocast, choose_device
from trainer.inference.tta import with_tta
from trainer.snapshot import Snapshot
from trainer.state import load_weights
from trainer.storage.checkpoint import CheckpointFolder


@dataclass(frozen=True)
class Transform:
    """Turns an image into the model's input, on the model's device: size, channels and normalisation as in training."""

    image_size: int
    channels: int
    fit: str
    normalisation: Normalisation
    max_pixels: int = MAX_PIXELS  # of an image file; a larger image is bad
    bits: int | None = None  # of the values in 16-bit files; None: 16

    def __call__(self, image: str | Path | Tensor) -> Tensor:
        """Return float32 (channels, image_size, image_size) for an image file or uint8 pixels (1 or 3, H, W)."""
        if not isinstance(image, Tensor):
            size = self.image_size if self.fit == "resize" else None  # padded images keep their own size
            limits: dict[str, Any] = {"max_pixels": self.max_pixels, "bits": self.bits}
            image = decode(image, image_size=size, channels=self.channels, **limits)
        pixels = recolour(image.unsqueeze(0), channels=self.channels)  # (1, C, H, W)
        resized = resize(pixels, image_size=self.image_size, fit=self.fit)
        return self.normalisation(resized.to(self.normalisation.device))[0]


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what is needed to use it."""

    model: nn.Module  # in evaluation mode, with its test-time augmentation
    probabilities: Callable[[Tensor], Tensor]  # logits (B, K) -> probabilities; a softmax, unless the loss has its own
    transform: Transform
    class_names: list[str]
    config: TrainConfig
    snapshot: Snapshot
    device: torch.device
    autocast: AbstractContextManager[object]  # the context in which the model computes in its training precision


def load_run(
    path: str | Path,
    *,
    checkpoint: str = "best",
    device: str = "cpu",
    trust: list[str] | None = None,
    tta: str | None = None,
) -> LoadedRun:
    """Rebuild the model of a run with its best (or last) weights.

    `tta` is the test-time augmentation (none, mirror or mirror_shift); None: that of the run.

    Raises CheckpointError if the folder holds no usable checkpoint, and SecurityError if its config names classes that
    are neither built in nor of torch or torchvision; `trust=["package"]` allows those of a package.
    """
    folder = Path(path)
    config = checked_run_config(folder)
    config = restricted(config, trust=trust or [])
    checkpoints = CheckpointFolder(folder / "checkpoints")
    kinds = ("best",) if checkpoint == "best" and checkpoints.files("best") else ("last", "step", "best")
    snapshot, _, _ = checkpoints.load(*kinds)
    model = build_model(config, init_seed=0)
    try:
        load_weights(model, snapshot.weights)
    except RuntimeError as exception:
        raise CheckpointError(str(folder), f"its weights do not fit its config: {exception}") from None
    normalisation = saved_normalisation(snapshot, str(folder))
    try:
        class_names = snapshot.values["data"]["class_names"]
    except (KeyError, TypeError) as exception:
        raise CheckpointError(str(folder), f"its checkpoint has no class names: {exception!r}") from None
    place = choose_device(device, "fp32")
    data = config["data"]
    return LoadedRun(
        model=with_tta(model.to(place).eval(), tta or config["trainer"]["tta"]),
        probabilities=getattr(
            resolve("loss", config["loss"]["_target_"]), "probabilities", partial(torch.softmax, dim=1)
        ),
        transform=Transform(
            image_size=data["image_size"],
            channels=data["channels"],
            fit=data["fit"],
            normalisation=normalisation.to(place),
            max_pixels=data.get("max_pixels") or MAX_PIXELS,  # only data sets of image files have the key
            bits=data.get("bits"),
        ),
        class_names=class_names,
        config=config,
        snapshot=snapshot,
        device=place,
        autocast=autocast(place, _precision(config["trainer"]["precision"], place)),
    )


def _precision(precision: str, device: torch.device) -> str:
    """Return the precision to compute in: fp32 on a CPU for a run that was trained in fp16."""
    return "fp32" if precision == "fp16" and device.type == "cpu" else precision


def with_data_root(run: LoadedRun, root: str | None) -> TrainConfig:
    """Return the run's config; `root` is the folder of its data on this machine, if it has moved."""
    data = run.config["data"]
    config: TrainConfig = {**run.config, "data": {**data, "root": root} if root else data}
    return fill_environment(config)

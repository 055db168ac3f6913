"""The device and torch's process-wide settings."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from core.errors import ConfigError


def choose_device(name: str, precision: str) -> torch.device:
    """The device, or ConfigError where it or the precision is not to be had."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("trainer.device", "there is no CUDA device here; available: cpu", value=name)
    device = torch.device("cuda" if has_cuda and name != "cpu" else "cpu")
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("trainer.precision", "fp16 needs CUDA; on cpu: fp32 or bf16", value=precision)
    return device


def configure_torch(settings: Mapping[str, Any], device: torch.device) -> None:
    """Process-wide settings of torch."""
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    if settings["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it for reproducible sums
    torch.use_deterministic_algorithms(settings["deterministic"])
    torch.backends.cudnn.benchmark = not settings["deterministic"]

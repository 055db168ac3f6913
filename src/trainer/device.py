"""The device and torch's process-wide settings."""

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext, suppress

import torch

from core.errors import ConfigError
from core.options.declarations import TrainerOptions


def choose_device(name: str, precision: str) -> torch.device:
    """The device, or ConfigError where it or the precision is not to be had."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("trainer.device", "there is no CUDA device here; available: cpu", value=name)
    device = torch.device("cuda" if has_cuda and name != "cpu" else "cpu")
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("trainer.precision", "fp16 needs CUDA; on cpu: fp32 or bf16", value=precision)
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Within it the network computes in this precision."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.float16 if precision == "fp16" else torch.bfloat16)


def configure_torch(settings: TrainerOptions) -> None:
    """Set what is process-wide in torch as the section `trainer` of a config says. For commands and runs only."""
    keep_freed_memory()
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    if settings["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it for reproducible sums
    torch.use_deterministic_algorithms(settings["deterministic"])
    torch.backends.cudnn.benchmark = not settings["deterministic"]
    configure_tf32(settings["tf32"], choose_device(settings["device"], settings["precision"]))


def configure_tf32(tf32: bool | str, device: torch.device) -> None:
    """Where fp32 is TF32 on CUDA: `auto` in convolutions, as torch has it, or there and in products, or nowhere."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = tf32 is not False
        torch.set_float32_matmul_precision("high" if tf32 is True else "highest")


def keep_freed_memory() -> None:
    """Let the C library keep what tensors on the host give back, for those of the next step.

    glibc gives large pieces back to the system, which fills each page with zeros when it is asked for again: up to
    14,000 pages in a ResNet-18's backward pass, and as many in its update. Elsewhere this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 * 2**20)  # the most that it takes
        libc.mallopt(trim_threshold, 2**31 - 1)

"""The device of a run, and torch's process-wide settings.

trainer.device    auto    cuda if torch finds a CUDA device, else cpu
                  cpu     nothing asks for a GPU: a process that trains on the CPU never initialises CUDA
                  cuda    the current CUDA device; cuda:1 is the second one (likewise mps and xpu)
"""

import ctypes
import os
import re
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import ConfigError
from core.options.declarations import TrainerOptions

# What the trainer cannot compute on a type of device, and what to set instead.
WITHOUT_FP16 = {
    "cpu": "fp16 needs a GPU; on cpu use fp32 or bf16",
    "mps": "loss scaling does not run on mps; use fp32 or bf16",
}
WITHOUT_DETERMINISTIC = ("mps",)


def choose_device(name: str, precision: str) -> torch.device:
    """Return the device that `trainer.device` names.

    Raises ConfigError if this machine lacks the device, or if the device does not compute in `precision`.
    """
    device = _auto() if name == "auto" else torch.device(name)
    if device.type != "cpu":
        _require_device(device, name)
    if precision == "fp16" and device.type in WITHOUT_FP16:
        raise ConfigError("trainer.precision", WITHOUT_FP16[device.type], value=precision)
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        explanation = f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic; use fp16 or fp32"
        raise ConfigError("trainer.precision", explanation, value=precision)
    return device


def _auto() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _require_device(device: torch.device, name: str) -> None:
    """Raise ConfigError unless torch finds this device."""
    found = torch.cuda if device.type == "cuda" else getattr(torch, device.type)
    count = found.device_count() if found.is_available() else 0
    if (device.index or 0) < count:
        return
    others = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    explanation = f"torch finds no such device here; available: {', '.join(['cpu', *others])}"
    raise ConfigError("trainer.device", explanation, value=name)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context in which the model computes in this precision."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.float16 if precision == "fp16" else torch.bfloat16)


def configure_torch(settings: TrainerOptions) -> None:
    """Apply the section `trainer` of a config to torch's process-wide settings. For scripts and runs only."""
    keep_freed_memory()
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    # cuBLAS reads this at the first matrix product of a process. A later run of the process may be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = choose_device(settings["device"], settings["precision"])
    if settings["deterministic"] and device.type in WITHOUT_DETERMINISTIC:
        explanation = f"{device.type} has no deterministic kernels; set false, or trainer.device=cpu"
        raise ConfigError("trainer.deterministic", explanation, value=True)
    torch.use_deterministic_algorithms(settings["deterministic"])
    torch.backends.cudnn.benchmark = not settings["deterministic"]
    if settings["compile"] and settings["deterministic"] and device.type != "cpu":
        _compile_deterministically()
    if device.index is not None and device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    configure_tf32(settings["tf32"], device)


def _compile_deterministically() -> None:
    """Keep inductor from choosing kernels by timing them: another choice in a resumed run would change the results."""
    from torch._inductor import config  # imported late: it takes a second

    config.deterministic = True


def configure_tf32(tf32: bool | str, device: torch.device) -> None:
    """Set where fp32 means TF32 on CUDA: `auto` in convolutions, true also in matrix products, false nowhere."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = tf32 is not False
        torch.set_float32_matmul_precision("high" if tf32 is True else "highest")


def generator_of(device: torch.device) -> torch.Generator:
    """Return torch's default random generator of a device."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    module: Any = getattr(torch, device.type)
    generator: torch.Generator = module.default_generators[
        module.current_device() if device.index is None else device.index
    ]
    return generator


def synchronize(device: torch.device) -> None:
    """Wait until the device has computed everything that was launched."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def copied_to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU. From CUDA, all are copied to pinned memory before the CPU waits, once."""
    copies = {
        name: tensor.detach().to(
            "cpu", copy=True, non_blocking=tensor.device.type == "cuda", memory_format=torch.contiguous_format
        )
        for name, tensor in tensors.items()
    }
    for device in {tensor.device for tensor in tensors.values()}:
        synchronize(device)
    return copies


def describe(device: torch.device) -> dict[str, Any]:
    """Return what a result on a GPU may depend on: driver, CUDA and cuDNN versions, compute capability, memory."""
    if device.type != "cuda":
        return {}
    properties, driver = torch.cuda.get_device_properties(device), None
    with suppress(OSError):
        driver = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver and driver[0],
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for the tensors of the next step.

    glibc returns large blocks to the system, which fills each page with zeros when the process requests it again: up to
    14,000 pages in a ResNet-18's backward pass, and as many in its update. Without glibc this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 * 2**20)  # the largest allowed value
        libc.mallopt(trim_threshold, 2**31 - 1)

"""What depends on the device that batches are prepared on: copies to it, its memory, its precision."""

import torch
from torch import Tensor

from core.errors import ConfigError


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the device. To CUDA it is copied from pinned memory, so that the CPU does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def require_memory(pixels: Tensor, device: torch.device) -> None:
    """Raise ConfigError if images in memory, uint8 (N, C, H, W), do not fit into the free memory of a GPU."""
    if device.type != "cuda":
        return
    needed, (free, total) = pixels.numel(), torch.cuda.mem_get_info(device)
    if needed > free:
        sizes = f"{needed / 2**30:.2f} GiB of images, but {free / 2**30:.2f} of {total / 2**30:.2f} GiB are free"
        remedy = "set 0 to stream the images of a folder from files, or use a smaller data.image_size"
        raise ConfigError("data.memory_budget", f"{device} cannot hold the data: {sizes}; {remedy}")


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs (mps), which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64

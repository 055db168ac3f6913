"""Tensors that can be restored on the device, by a flag that the CPU does not read."""

from collections.abc import Sequence

import torch
from torch import Tensor


class RestorableTensors:
    """Remembers the values of tensors, and restores them if a flag on the device is set.

    Tensors of one dtype are copied into one flat tensor, so a model with many batch norms takes a few kernels per
    dtype, not a few per tensor.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        dtypes = dict.fromkeys(tensor.dtype for tensor in tensors)
        self._groups = [[tensor for tensor in tensors if tensor.dtype == dtype] for dtype in dtypes]
        self._before = [torch.cat([tensor.flatten() for tensor in group]) for group in self._groups]

    def remember(self) -> None:
        """Copy the present values."""
        for group, before in zip(self._groups, self._before, strict=True):
            torch.cat([tensor.flatten() for tensor in group], out=before)

    def restore(self, flag: Tensor) -> None:
        """Set all tensors to the remembered values if `flag` (scalar, 0.0 or 1.0) is 1.0."""
        for group, before in zip(self._groups, self._before, strict=True):
            now = torch.cat([tensor.flatten() for tensor in group])
            chosen = torch.where(flag.bool(), before, now).split([tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [values.view_as(tensor) for values, tensor in zip(chosen, group, strict=True)])

"""A snapshot: the state of a training at a commit point, which a checkpoint contains."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """Tensors by dotted name, and plain values (JSON)."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of steps done."""
        step: int = self.values["step"]
        return step

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors under a prefix, without it: `part("model")` is the state_dict of the model."""
        start = prefix + "."
        return {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state dict to evaluate: that of the moving average if there is one, else that of the model."""
        return self.part("ema") or self.part("model")

"""A snapshot: the state of a training at a commit point, as a checkpoint holds it."""

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
        """The step after which it was taken."""
        step: int = self.values["step"]
        return step

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors under a prefix, without it: `part("model")` is the state_dict of the model."""
        start = prefix + "."
        return {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state_dict to evaluate with: the moving average if there is one."""
        return self.part("ema") or self.part("model")

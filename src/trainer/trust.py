"""A config from a run folder may come from anybody, so it builds only what is known to be harmless.

What counts is the module of the object that a name leads to, not the name. A config that the user wrote runs freely.
"""

import inspect
import pydoc
from collections.abc import Mapping
from typing import Any

from core.errors import SecurityError
from core.schema import leaves

TRUSTED = (
    *("models", "data", "trainer", "torch.nn", "torch.optim"),
    *("torchvision.models", "torchvision.datasets", "torchvision.transforms"),
)


def refuse_untrusted(config: Mapping[str, Any], *, trust: list[str]) -> None:
    """Raise SecurityError for a `_target_` whose own module is not ours, torch's or torchvision's, nor in `trust`."""
    for name, value in leaves(config):
        key = name.rpartition(".")[2]
        if key == "weights" and value is not None:
            raise SecurityError(name, "pretrained weights would be downloaded", value=value)
        if key in ("_args_", "_convert_", "_recursive_"):
            raise SecurityError(name, "not allowed in a run's config", value=value)
        if key == "_target_":
            _refuse_target(name, value, (*TRUSTED, *trust))


def _refuse_target(name: str, target: Any, allowed: tuple[str, ...]) -> None:
    package = str(target).partition(".")[0]
    if not isinstance(target, str) or not _within(target, allowed):  # before it is imported, which runs its code
        raise SecurityError(name, f"not trusted in a run's config; trust=[{package}] allows it", value=target)
    found = pydoc.locate(target)
    module = getattr(found, "__module__", None) or ""
    if not (inspect.isclass(found) or inspect.isfunction(found)) or not _within(module, allowed):
        raise SecurityError(name, f"leads to {module or 'nothing'}, which is not trusted", value=target)


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)

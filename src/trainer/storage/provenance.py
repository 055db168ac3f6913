"""Where a run comes from: code, versions, machine, command line."""

import datetime
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torchvision", "hydra-core", "omegaconf", "tensorboard", "safetensors", "numpy")


def provenance() -> dict[str, Any]:
    """What made a run: code, versions, machine, command line."""
    root = Path(__file__).resolve().parents[3]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "--no-optional-locks", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain")
    return {
        "git_commit": git("rev-parse", "HEAD"),
        "git_clean": None if changes is None else not changes,
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__} | {package: version(package) for package in PACKAGES},
        "host": platform.node(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": now(),
    }


def now() -> str:
    """Return the local time with its offset, to the second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")

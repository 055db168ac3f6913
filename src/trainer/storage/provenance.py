"""Provenance of a run: git commit, versions, machine, command line."""

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
    """Return git commit, versions, host, command line and start time; the values of git are None if it fails."""
    root = Path(__file__).resolve().parents[3]

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "--no-optional-locks", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

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
    """Return the local time in ISO 8601, in seconds, with its offset from UTC."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")

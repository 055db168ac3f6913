"""Processes that end with those that began them, and how they ended."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with(parent: int) -> None:
    """Have the system kill this process when its parent is gone, even if that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before that
        os._exit(1)


def death(exit_code: int | None) -> str:
    """How a process went that has said nothing: `killed by SIGKILL`, `gone, with exit code 1`; None where unknown."""
    names = {-number: f"killed by {number.name}" for number in signal.Signals}
    return names.get(exit_code or 0, "gone" if exit_code is None else f"gone, with exit code {exit_code}")

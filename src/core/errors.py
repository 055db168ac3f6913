"""Errors: one class per kind, with its exit code; each prints as one line.

    error[config] optimizer.lr = -0.1: must be > 0
          ^kind   ^subject       ^value ^what is allowed

The user can correct each of these, so no traceback is shown. Any other exception is an internal error (exit 1).
"""

import difflib
import signal
import unicodedata
from collections.abc import Iterable

UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of control, format and line-breaking characters
_NO_VALUE = ...  # the same object also in an error that a worker sends


class PreceptorError(Exception):
    """An error with a subject (a config key or a file), the value found there and what is allowed instead."""

    kind = "bug"
    exit_code = 1

    def __init__(self, subject: str, explanation: str, *, value: object = _NO_VALUE) -> None:
        super().__init__(subject, explanation)
        self.subject = subject
        self.explanation = explanation
        self.value = value

    @property
    def described(self) -> str:
        """The error without its kind: `optimizer.lr = -0.1: must be > 0`."""
        shown = "" if self.value is _NO_VALUE else f" = {spell(self.value)}"
        return printable(" ".join(f"{self.subject}{shown}: {self.explanation}".split()))

    def __str__(self) -> str:
        return f"error[{self.kind}] {self.described}"

    def under(self, section: str) -> "PreceptorError":
        """Return the same error with its subject in a config section: `hidden` becomes `model.hidden`."""
        self.subject = f"{section}.{self.subject}"
        return self


class ConfigError(PreceptorError):
    """A config value, key or combination that cannot work; found before the first step."""

    kind, exit_code = "config", 2


class DataError(PreceptorError):
    """The data is missing, broken or does not fit the config."""

    kind, exit_code = "data", 3


class NumericalError(PreceptorError):
    """NaN, divergence or exhausted memory."""

    kind, exit_code = "numerical", 4


class StorageError(PreceptorError):
    """A folder that exists already, is locked, cannot be written, or a full disk."""

    kind, exit_code = "storage", 5


class InUse(StorageError):
    """A folder that another process uses."""


class CheckpointError(PreceptorError):
    """A checkpoint that is damaged or does not fit, or a resume that would change what may not change."""

    kind, exit_code = "checkpoint", 6


class SecurityError(PreceptorError):
    """A file from elsewhere names code that the user has not trusted."""

    kind, exit_code = "security", 7


class TrialError(PreceptorError):
    """A trial of a sweep failed; the exit code is the one of its training."""

    kind = "trial"

    def __init__(self, subject: str, explanation: str, *, exit_code: int) -> None:
        super().__init__(subject, explanation)
        self.exit_code = exit_code


# SIGHUP: the terminal or the connection is gone. SIGUSR1 and SIGUSR2: a cluster announces the end of a job (SLURM's
# --signal=USR1@60, submitit).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal(BaseException):
    """A signal ended the run after its state was saved. No `Exception`, so that a grid of runs stops too."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def sighup_is_ignored(number: signal.Signals) -> bool:
    """Return whether SIGHUP is ignored, as `nohup` requests."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def is_out_of_memory(exception: BaseException) -> bool:
    """Return whether memory is exhausted: an error of Python, torch.cuda (by name: it may not be loaded) or torch."""
    named = isinstance(exception, MemoryError) or type(exception).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator" in str(exception)


def as_preceptor_error(exception: Exception, *, place: str = "storage", step: str | None = None) -> Exception:
    """Return an exception of the system or of torch as a PreceptorError if the user can act on it, or unchanged."""
    if isinstance(exception, OSError):
        reason = exception.strerror or str(exception)
        return StorageError(str(exception.filename or place), f"{step}: {reason}" if step else reason)
    if is_out_of_memory(exception):
        advice = "out of memory; try a smaller data.batch_size with a larger trainer.accumulate"
        return NumericalError(step or "memory", advice)
    return exception


def internal_error(exception: BaseException) -> PreceptorError:
    """Return the error for an exception that is a bug in Preceptor: exit code 1."""
    what = f"{type(exception).__name__}: {exception}"
    return PreceptorError("internal", f"{what}; traceback=true shows where. Please report it")


def printable(text: str) -> str:
    """Return a text for a terminal or log: control characters, which could move the cursor, are written as `\\x1b`."""
    is_harmless = all(character.isprintable() or character in "\n\t" for character in text)
    return text if is_harmless else "".join(map(_printable, text))


def _printable(character: str) -> str:
    allowed = character in "\n\t" or unicodedata.category(character) not in UNPRINTABLE
    return character if allowed else ascii(character)[1:-1]


def spell(value: object) -> str:
    """Return a value as YAML's users write it: `null`, `true`, `[1, 2]`, text without quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(spell, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {spell(item)}' for key, item in value.items())}}}"
    return str(value)


SYNONYMS = {"gpu": "cuda"}  # what users type -> the name of the option


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice nearest to a misspelt word, if one is near."""
    choices = list(choices)
    near = [choice for choice in [SYNONYMS.get(word.lower())] if choice in choices]
    near = near or difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return near[0] if near else None


def suggest(word: str, choices: Iterable[str]) -> str:
    """`did you mean X?` for the choice nearest to a misspelt word, or nothing when none is near."""
    near = nearest(word, choices)
    return "" if near is None else f"did you mean {near}?"

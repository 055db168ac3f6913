"""Errors: one class per kind, with its exit code; each prints as one line.

    error[config] optimizer.lr = -0.1: must be > 0
          ^kind   ^subject       ^value ^what is allowed

The user can correct these errors, so no traceback is printed. Any other exception is an internal error (exit code 1).
"""

import difflib
import errno
import signal
import unicodedata
from collections.abc import Iterable

UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of control, format and line-breaking characters
_NO_VALUE = ...  # unlike object(), it stays the same object when an error is pickled by a worker


class PreceptorError(Exception):
    """An error with a subject (a config key or a file), its value, and an explanation of what is allowed."""

    kind = "bug"
    exit_code = 1

    def __init__(self, subject: str, explanation: str, *, value: object = _NO_VALUE) -> None:
        super().__init__(subject, explanation)
        self.subject = subject
        self.explanation = explanation
        self.value = value

    @property
    def described(self) -> str:
        """Return the error without its kind: `optimizer.lr = -0.1: must be > 0`."""
        value = "" if self.value is _NO_VALUE else f" = {spell(self.value)}"
        return printable(" ".join(f"{self.subject}{value}: {self.explanation}".split()))

    def __str__(self) -> str:
        return f"error[{self.kind}] {self.described}"

    def under(self, section: str) -> "PreceptorError":
        """Prefix the subject with a config section, `hidden` -> `model.hidden`, and return this error."""
        self.subject = f"{section}.{self.subject}"
        return self


class ConfigError(PreceptorError):
    """A config value, key or combination that is not allowed; reported before the first step."""

    kind, exit_code = "config", 2


class DataError(PreceptorError):
    """The data is missing, corrupt or does not match the config."""

    kind, exit_code = "data", 3


class NumericalError(PreceptorError):
    """NaN, divergence or out of memory."""

    kind, exit_code = "numerical", 4


class StorageError(PreceptorError):
    """A folder that already exists, is locked or cannot be written, or a full disk."""

    kind, exit_code = "storage", 5


class InUse(StorageError):
    """A folder that another process uses."""


class CheckpointError(PreceptorError):
    """A checkpoint that is damaged or does not match, or a resume with a change that is not allowed."""

    kind, exit_code = "checkpoint", 6


class SecurityError(PreceptorError):
    """A file names code that is not in a trusted package (trust=)."""

    kind, exit_code = "security", 7


class FindingsError(PreceptorError):
    """A check before training has found an error (check.py)."""

    kind, exit_code = "findings", 8


class TrialError(PreceptorError):
    """A trial of a sweep failed; the exit code is that of its training."""

    kind = "trial"

    def __init__(self, subject: str, explanation: str, *, exit_code: int) -> None:
        super().__init__(subject, explanation)
        self.exit_code = exit_code


# SIGHUP: the terminal or the connection was closed. SIGUSR1 and SIGUSR2: a cluster announces the end of a job
# (SLURM's --signal=USR1@60, submitit).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal(BaseException):
    """A signal ended the run after its state was saved. Not an `Exception`, so that it also stops a grid of runs."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def sighup_is_ignored(number: signal.Signals) -> bool:
    """Return whether SIGHUP is ignored, as `nohup` requests."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


OUT_OF_MEMORY = (  # texts of a RuntimeError of torch
    "DefaultCPUAllocator",
    "CUDA error: out of memory",  # AcceleratorError: for the context, or for pinned memory
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)
NOT_DETERMINISTIC = "does not have a deterministic implementation"


def is_out_of_memory(exception: BaseException) -> bool:
    """Return whether an error of Python or torch means out of memory; torch may not be imported."""
    has_known_type = isinstance(exception, MemoryError) or type(exception).__name__ == "OutOfMemoryError"
    return has_known_type or any(text in str(exception) for text in OUT_OF_MEMORY)


def as_preceptor_error(exception: Exception, *, subject: str = "storage", step: str | None = None) -> Exception:
    """Return a system or torch exception as a PreceptorError if the user can act on it, else unchanged.

    `subject` is used if the exception has no file name; `step` names the operation that failed.
    """
    if isinstance(exception, OSError):
        reason = exception.strerror or str(exception)
        if exception.errno in (errno.EMFILE, errno.ENFILE):
            reason += "; set a smaller data.num_workers, or raise the limit, for example: ulimit -n 4096"
        return StorageError(str(exception.filename or subject), f"{step}: {reason}" if step else reason)
    if is_out_of_memory(exception):
        advice = "out of memory; try a smaller data.batch_size with a larger trainer.accumulate"
        return NumericalError(step or "memory", advice)
    if NOT_DETERMINISTIC in str(exception):
        operation = str(exception).partition(" ")[0]
        explanation = f"{operation} has no deterministic implementation on this device; set false, or train on the cpu"
        return ConfigError("trainer.deterministic", explanation, value=True)
    return exception


def internal_error(exception: BaseException) -> PreceptorError:
    """Return the error for an exception that is a bug in Preceptor (exit code 1)."""
    description = f"{type(exception).__name__}: {exception}"
    return PreceptorError("internal", f"{description}; add traceback=true to see where. Please report it")


def printable(text: str) -> str:
    """Return a text that is safe for a terminal or log: control characters are escaped, as in `\\x1b`."""
    is_harmless = all(character.isprintable() or character in "\n\t" for character in text)
    return text if is_harmless else "".join(map(_printable, text))


def _printable(character: str) -> str:
    allowed = character in "\n\t" or unicodedata.category(character) not in UNPRINTABLE
    return character if allowed else ascii(character)[1:-1]


def spell(value: object) -> str:
    """Return a value as it is written in YAML: `null`, `true`, `[1, 2]`, text without quotes."""
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
    """Return the choice that is most similar to a misspelt word; None if no choice is similar."""
    choices = list(choices)
    near = [choice for choice in [SYNONYMS.get(word.lower())] if choice in choices]
    near = near or difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return near[0] if near else None


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return `did you mean X?` for the choice most similar to a misspelt word; "" if no choice is similar."""
    near = nearest(word, choices)
    return "" if near is None else f"did you mean {near}?"

"""What the terminal shows: a progress bar where there is a terminal, plain lines where there is none."""

import os
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from core.errors import printable
from core.regular_files import append_regular


class Terminal(Console):
    """A console that becomes silent if its pager or connection is gone, so that the run continues."""

    def on_broken_pipe(self) -> None:
        self.fall_silent()

    def fall_silent(self) -> None:
        """Print to nowhere from now on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered goes there too


def terminal() -> Terminal:
    """Return the console that a run prints to; as wide as a line may be if standard output is no terminal."""
    return Terminal(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)


def next_commands(folder: Path) -> list[str]:
    """Return the commands that are useful after a run, as they are typed in a shell."""
    activate = [] if os.environ.get("VIRTUAL_ENV") else ["source .venv/bin/activate"]
    run, parent = (shlex.quote(str(path)) for path in (folder, folder.parent))
    return [*activate, f"python scripts/evaluate.py run={run}", f"tensorboard --logdir {parent}"]


class Display:
    """Shows a run on the terminal and in its train.log; neither of them can end the run."""

    def __init__(self, log_file: Path, *, total_steps: int) -> None:
        self.console = terminal()
        self.log_file = log_file
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("train", total=total_steps, epoch="", figures="")
        self.total_steps = total_steps
        self.shown_at = time.monotonic()

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    @property
    def is_moved(self) -> bool:
        """Is it time for the bar to move? A few times a second at most."""
        return not self.progress.disable and time.monotonic() - self.shown_at > 0.2

    def move(self, step: int, epoch: float) -> None:
        """The bar goes to this step."""
        self.shown_at = time.monotonic()
        self.progress.update(self.task, completed=step, epoch=f"{epoch:.1f}")

    def figures(self, step: int, epoch: float, figures: Mapping[str, float]) -> None:
        """Loss, accuracy and throughput of the last steps: behind the bar, or as a line a minute without a terminal."""
        words = [f"{figures['throughput/samples_per_second']:,.0f} samples/s"]
        if "step/loss" in figures:
            words.insert(0, f"loss {figures['step/loss']:.4f}  accuracy {figures['step/accuracy']:.2%}")
        self.progress.update(self.task, completed=step, epoch=f"{epoch:.1f}", figures="  ".join(words))
        if self.progress.disable and time.monotonic() - self.shown_at > 60:
            self.say(f"epoch {epoch:.1f}".ljust(10) + f"  step {step:>7,} of {self.total_steps:,}  " + "  ".join(words))

    def evaluation(self, line: Mapping[str, Any], *, best: bool) -> None:
        """One line an evaluation."""
        parts = [f"epoch {line['epoch']:g}".ljust(10), f"step {line['step']:>7,}"]
        for split in ("train", "val"):
            if f"{split}/loss" in line:
                parts.append(f"{split} loss {line[f'{split}/loss']:.4f} accuracy {line[f'{split}/accuracy']:.2%}")
        parts += [f"lr {line['lr']:.2e}", f"{line['samples_per_second']:,.0f} samples/s", f"{line['seconds']:.1f} s"]
        self.say("  ".join(parts) + ("  *" if best else ""))

    def say(self, text: str, *, style: str | None = None) -> None:
        """A line, also to train.log with the time before it."""
        self.shown_at = time.monotonic()
        text = printable(text)
        self._print(text, style=style, markup=False)
        self._log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def warn(self, text: str) -> None:
        """A line that ought to be read."""
        self.say(f"warning: {text}", style="yellow")

    def summary(self, summary: Mapping[str, Any], folder: Path) -> None:
        """The table at the end."""
        rows = [("status", f"{summary['status']} ({summary['stop_reason']})")]
        best, test = summary["best"], summary["test"]
        if best:
            metrics = "  ".join(f"{name} {value:.4f}" for name, value in best["metrics"].items())
            rows.append(("best", f"step {best['step']:,} (epoch {best['epoch']:g})  {metrics}"))
        if test:
            rows.append(("test", f"accuracy {test['accuracy']:.2%}  loss {test['loss']:.4f}"))
        rows += [
            ("parameters", f"{summary['parameters']:,}"),
            ("time", f"{summary['seconds']:.1f} s; {summary['samples_per_second']:,.0f} samples/s in training steps"),
            ("run folder", str(folder)),
        ]
        if summary["status"] in ("finished", "stopped_early"):
            rows += zip(("next", "", ""), next_commands(folder), strict=False)
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in rows:
            table.add_row(name, Text(printable(value)))  # a name with brackets is no markup
        self._print(table)
        self._log("".join(f"{name}: {value}\n" for name, value in rows))

    def _print(self, what: Any, **style: Any) -> None:
        try:
            self.console.print(what, **style)
        except OSError:
            self.console.fall_silent()

    def _log(self, text: str) -> None:
        with suppress(OSError):
            append_regular(self.log_file, text)

"""Terminal output of a run: a progress bar on a terminal, plain lines if standard output is a file or pipe."""

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
from core.intervals import margin_of
from core.regular_files import append_regular


class Terminal(Console):
    """Console that discards its output once its pager or connection is closed, so that the run continues."""

    def on_broken_pipe(self) -> None:
        self.discard_output()

    def discard_output(self) -> None:
        """Discard all further output."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # also discards buffered output


def terminal() -> Terminal:
    """Return the console that a run prints to; 140 columns wide if standard output is not a terminal."""
    return Terminal(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)


def next_commands(folder: Path) -> list[str]:
    """Return the shell commands that are useful after a run."""
    activate = [] if os.environ.get("VIRTUAL_ENV") else ["source .venv/bin/activate"]
    run, parent = (shlex.quote(str(path)) for path in (folder, folder.parent))
    return [*activate, f"python scripts/evaluate.py run={run}", f"tensorboard --logdir {parent}"]


class Display:
    """Display of a run on the terminal and in train.log. If one of them cannot be written, the run continues."""

    def __init__(self, log_file: Path, *, total_steps: int) -> None:
        self.console = terminal()
        self.log_file = log_file
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[measurements]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("train", total=total_steps, epoch="", measurements="")
        self.total_steps = total_steps
        self.shown_at = time.monotonic()

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    @property
    def is_due(self) -> bool:
        """Return whether the bar exists and was last updated more than 0.2 seconds ago."""
        return not self.progress.disable and time.monotonic() - self.shown_at > 0.2

    def move(self, step: int, epoch: float) -> None:
        """Move the bar to this step."""
        self.shown_at = time.monotonic()
        self.progress.update(self.task, completed=step, epoch=f"{epoch:.1f}")

    def measurements(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Show loss, accuracy and throughput of the last steps, next to the bar.

        Without a terminal, print them as a line if nothing was printed for a minute.
        """
        words = [f"{values['throughput/samples_per_second']:,.0f} samples/s"]
        if "step/loss" in values:
            words.insert(0, f"loss {values['step/loss']:.4f}  accuracy {values['step/accuracy']:.2%}")
        self.progress.update(self.task, completed=step, epoch=f"{epoch:.1f}", measurements="  ".join(words))
        if self.progress.disable and time.monotonic() - self.shown_at > 60:
            self.say(f"epoch {epoch:.1f}".ljust(10) + f"  step {step:>7,} of {self.total_steps:,}  " + "  ".join(words))

    def evaluation(self, line: Mapping[str, Any], *, best: bool) -> None:
        """Print an evaluation as one line."""
        words = [f"epoch {line['epoch']:g}".ljust(10), f"step {line['step']:>7,}"]
        for split in ("train", "val"):
            if f"{split}/loss" in line:
                words.append(f"{split} loss {line[f'{split}/loss']:.4f} accuracy {line[f'{split}/accuracy']:.2%}")
        words += [f"lr {line['lr']:.2e}", f"{line['samples_per_second']:,.0f} samples/s", f"{line['seconds']:.1f} s"]
        self.say("  ".join(words) + ("  best so far" if best else ""))

    def say(self, text: str, *, style: str | None = None) -> None:
        """Print a line, and append it with the time to train.log."""
        self.shown_at = time.monotonic()
        text = printable(text)
        self._print(text, style=style, markup=False)
        self._log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def warn(self, text: str) -> None:
        """Print a warning in yellow."""
        self.say(f"warning: {text}", style="yellow")

    def summary(self, summary: Mapping[str, Any], folder: Path) -> None:
        """Print the table at the end of the run."""
        rows = [("status", f"{summary['status']} ({summary['stop_reason']})")]
        best, test = summary["best"], summary["test"]
        if best:
            metrics = "  ".join(f"{name} {value:.4f}" for name, value in best["metrics"].items())
            rows.append(("best", f"step {best['step']:,} (epoch {best['epoch']:g})  {metrics}"))
        if test:
            margin = margin_of(test["accuracy"], summary["samples"]["test"])
            rows.append(("test", f"accuracy {test['accuracy']:.2%} ± {margin:.2%} (95%)  loss {test['loss']:.4f}"))
        rows += [
            ("parameters", f"{summary['parameters']:,}"),
            ("time", f"{summary['seconds']:.1f} s; {summary['samples_per_second']:,.0f} samples/s in training steps"),
            ("run folder", str(folder)),
        ]
        if summary["status"] in ("finished", "stopped_early"):
            rows += zip(("next", "", ""), next_commands(folder), strict=False)
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in rows:
            table.add_row(name, Text(printable(value)))  # Text: brackets in a name are not markup
        self._print(table)
        self._log("".join(f"{name}: {value}\n" for name, value in rows))

    def _print(self, content: Any, **style: Any) -> None:
        try:
            self.console.print(content, **style)
        except OSError:
            self.console.discard_output()

    def _log(self, text: str) -> None:
        with suppress(OSError):
            append_regular(self.log_file, text)

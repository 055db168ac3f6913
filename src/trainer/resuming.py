"""What a resumed run reports: that it is finished already, or how its learning rate changes."""

import shlex

from trainer.state import TrainState
from trainer.storage.run_folder import RunFolder


def is_finished(folder: RunFolder, step: int) -> bool:
    """Return whether the run has ended at this step, and was tested."""
    summary = folder.read_summary()
    return summary.get("status") in ("finished", "stopped_early") and summary.get("step") == step


def nothing_to_do(folder: RunFolder, reason: str) -> str:
    """Return the message for a finished run: why it ended, and what makes it continue."""
    text = f"nothing to do: {folder.path} is finished ({reason})"
    if reason == "early_stopping":
        command = f"python scripts/train.py resume={shlex.quote(str(folder.path))} trainer.early_stopping.patience=null"
        return f"{text}; a larger patience continues it, or none: {command}"
    return f"{text}; a larger trainer.{reason} continues it"


def learning_rate_change(state: TrainState, folder: RunFolder) -> list[str]:
    """Return a line with the learning rate before and after the resume; no line before the first evaluation.

    The learning rate is `optimizer.lr` times the schedule's factor. A changed duration moves the present step to
    another place of the schedule.
    """
    metrics = folder.metrics()
    if not metrics:
        return []
    state.schedule.apply(state.optimizer, state.step)
    following = f"{state.optimizer.param_groups[0]['lr']:.3g} in the next step (optimizer.lr x schedule)"
    return [f"learning rate: {metrics[-1]['lr']:.3g} at the last evaluation, {following}"]

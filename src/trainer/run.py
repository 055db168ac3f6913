"""A run: a training with its folder, from the config to summary.json.

execute:  create | resume -> fit (trainer.loop) -> finish
"""

import shlex
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from core.config import Config, leaves
from core.errors import CheckpointError, NumericalError, StopSignal, StorageError, as_preceptor_error
from core.options.declarations import TrainConfig
from core.resume import Changes, changes_between, refuse_changes
from data.sources.splits import Splits, same_mean
from trainer.build.training import build
from trainer.build.trust import trusted_values
from trainer.device import configure_torch, describe
from trainer.durations import step_name
from trainer.inference.evaluation import Predictions
from trainer.loop import Judge, Loop, never_prune, reason_to_stop
from trainer.monitor import verdict
from trainer.monitor.interrupts import Interrupts
from trainer.report.introduction import device_name, introduce, show_first_batch
from trainer.report.mistakes import record_mistakes
from trainer.report.notices import Notices
from trainer.report.recorder import Recorder
from trainer.report.summary import summary_of
from trainer.report.terminal import terminal
from trainer.resuming import is_finished, learning_rate_change, nothing_to_do
from trainer.snapshot import Snapshot
from trainer.state import require_values
from trainer.storage.background_saver import BackgroundSaver
from trainer.storage.provenance import provenance
from trainer.storage.run_folder import RunFolder, chosen_path
from trainer.training import Training


def execute(config: Config[TrainConfig], *, judge: Judge = never_prune) -> float | None:
    """Create or resume the run that a config describes, and train it to its end.

    Returns the best monitored value; None for a resumed run that is finished already. The judge sees each line of
    metrics.jsonl, and ends the run early by returning true.
    """
    # Where a run starts from; the first that applies decides:
    #   1. resume=RUN       the newest good checkpoint of that run: weights, optimizer, step, everything
    #   2. init_from=...    a new run; the weights that fit, by name and shape, of a run or a safetensors file
    #   3. pretrained       a new run; weights that the constructor of the model loads (model.network.weights)
    #   4. from scratch     a new run; random weights, a function of the seed, fitted to images if the model has `fit`
    run = Run.resume(config, judge=judge) if config.from_run else Run.create(config, judge=judge)
    if run is None:
        return None
    with run:
        run.finish(run.loop.fit())
    return run.best_value


class Run:
    """A training and its open files. Train inside a `with` block: its end records a failure and closes everything."""

    def __init__(
        self,
        training: Training,
        recorder: Recorder,
        *,
        interrupts: Interrupts,
        origin: Mapping[str, Any],
        judge: Judge,
        closing: ExitStack,
    ) -> None:
        self.training, self.state = training, training.state
        self.recorder, self.folder = recorder, recorder.folder
        self.interrupts = interrupts
        self.origin = origin  # its provenance
        self.saver = BackgroundSaver(self.folder.checkpoints, saved=self.state.step)
        self.loop = Loop(training, recorder=recorder, saver=self.saver, interrupts=interrupts, judge=judge)
        closing.callback(recorder.close)
        closing.callback(self.saver.close)
        self._closing = closing  # that of `create` or `resume`, which close everything if they fail

    def _keep_open(self) -> "Run":
        """Take over the files that `create` or `resume` has opened: the end of the run closes them."""
        self._closing = self._closing.pop_all()
        return self

    @classmethod
    def create(cls, config: Config[TrainConfig], *, judge: Judge = never_prune) -> "Run":
        """Build the training, create the run folder, and log the facts of the new run."""
        values = config.values
        with ExitStack() as closing:
            notices = closing.enter_context(Notices())
            configure_torch(values["trainer"])
            training, _ = build(config)
            origin = provenance() | _machine(training)  # before the folder exists, as git could report it as a change
            interrupts = closing.enter_context(Interrupts())  # from here on, a signal stops and saves the run
            folder = _new_folder(training, config)
            closing.callback(folder.close)
            recorder = Recorder(folder, total_steps=training.settings.total_steps)
            run = cls(training, recorder, interrupts=interrupts, origin=origin, judge=judge, closing=closing)
            introduce(training, recorder, config)
            recorder.start(training.record, origin)
            log = values["trainer"]
            show_first_batch(training, recorder, images=log["log_images"], graph=log["log_graph"])
            notices.pass_to(say=recorder.say, warn=run.warn)
            return run._keep_open()

    @classmethod
    def resume(cls, config: Config[TrainConfig], *, judge: Judge = never_prune) -> "Run | None":
        """Restore a run from its newest good checkpoint, its logs cut back to that step; None if it is finished."""
        with ExitStack() as closing:
            notices = closing.enter_context(Notices())
            configure_torch(config.values["trainer"])
            trusted_values(config)  # refuses untrusted classes before the folder is changed
            folder = RunFolder.open(Path(str(config.values["resume"])))
            closing.callback(folder.close)
            snapshot, path, damaged = folder.checkpoints.load("last", "best", "step")
            require_values(snapshot)
            before = snapshot.values["config"]
            changes = changes_between(before, config.record)
            refuse_changes(changes, dict(leaves(before)), source=str(folder.path / "config.yaml"))
            training, splits = build(config, saved=snapshot)
            origin = provenance() | _machine(training)
            interrupts = closing.enter_context(Interrupts())
            _restore(training, splits, snapshot)
            reason = reason_to_stop(training.settings, training.state, interrupts)
            if reason is not None and is_finished(folder, training.state.step):
                terminal().print(nothing_to_do(folder, reason), markup=False)
                return None
            folder.rewind(training.state.evaluated)
            total = training.settings.total_steps
            recorder = Recorder(folder, total_steps=total, resumed_at=training.state.step)
            run = cls(training, recorder, interrupts=interrupts, origin=origin, judge=judge, closing=closing)
            run._record_resume(changes, checkpoint=path, damaged=damaged)
            notices.pass_to(say=recorder.say, warn=run.warn)
            return run._keep_open()

    def _record_resume(self, changes: Changes, *, checkpoint: Path, damaged: Mapping[Path, str]) -> None:
        """Log where the run continues, and what has changed."""
        for file, text in damaged.items():
            file.rename(
                file.with_suffix(".damaged")
            )  # else it would count as one of the newest checkpoints, which are kept
            self.warn(f"{text}; moved to {file.stem}.damaged")
        if changes:
            self.folder.write_config(self.training.record)
        facts = {"checkpoint": checkpoint.name, "changes": changes, "provenance": dict(self.origin)}
        step, total = self.state.step, self.training.settings.total_steps
        self.recorder.event("resume", step=step, **facts)
        self.recorder.say(f"resumed {self.folder.path} at step {step:,} of {total:,} from {checkpoint.name}")
        lines = [f"{name}: {before} -> {now}" for name, (before, now) in changes.items()]
        if changes and not self.loop.evaluation_is_due():  # an evaluation must log the learning rate of its own step
            lines += learning_rate_change(self.state, self.folder)
        self.recorder.changes(lines, self.training.record, step=step)

    def __enter__(self) -> "Run":
        self._closing.enter_context(self.recorder.display)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exception: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._closing:
            if isinstance(exception, Exception):
                self.fail(exception)
        if exception is None and self.interrupts.received is not None:  # also ends a grid of runs
            raise StopSignal(self.interrupts.exit_code)

    @property
    def best_value(self) -> float | None:
        """The best value of the monitored metric."""
        value: float | None = self.state.best.get("metrics", {}).get(self.training.settings.monitor)
        return value

    def warn(self, text: str) -> None:
        """Record a warning at the present step."""
        self.recorder.warn(text, step=self.state.step)

    # The end

    def finish(self, reason: str) -> None:
        """Test the best weights and write summary.json.

        A run that a signal stopped, or that was pruned, is saved but not tested; the resumed run tests.
        """
        self.saver.wait()
        if reason == "early_stopping":
            self.recorder.say(self.state.early_stopping.reason)
        if self.state.best and reason != "pruned" and not self.interrupts.received:
            self._load_best()
        test: dict[str, float] | None = {}
        loader = self.training.test_loader
        predictions = Predictions() if self.training.record["trainer"]["log_images"] else None
        if loader is not None and reason != "pruned":
            test = self.training.measure(loader, abandon=self.interrupts.asked, predictions=predictions)
        if self.interrupts.received is not None or test is None:
            summary = self.write_summary("interrupted", reason)
        else:
            self.recorder.finish(self.training.record, test, self.state.step)
            status = "finished" if reason == self.training.settings.budget else "stopped_early"
            summary = self.write_summary(status, reason, test=test)
            if test and loader is not None and predictions is not None:
                names = self.state.data["class_names"]
                record_mistakes(predictions, loader, names, self.recorder, step=self.state.step)
            for text in verdict.warnings_of(
                test,
                steps=self.state.step,
                first_loss=self.state.sums.first,
                constant_accuracy=self.training.constant_accuracy or 0.0,
            ):
                self.warn(text)
        self.recorder.summary(summary, self.folder.path)
        if summary["status"] == "interrupted":
            self.recorder.say(
                f"saved; continue with: python scripts/train.py resume={shlex.quote(str(self.folder.path))}"
            )
            raise StopSignal(self.interrupts.exit_code)

    def _load_best(self) -> None:
        best, _, damaged = self.folder.checkpoints.load("best")
        for text in damaged.values():
            self.warn(text)
        wanted = self.state.best["step"]
        if best.step != wanted:
            self.warn(f"the best, of step {wanted:,}, is lost: the test uses the checkpoint of step {best.step:,}")
        self.state.unsettle()  # these weights are not those of the last step
        self.state.evaluated_model.load_state_dict(best.weights)

    def fail(self, exception: Exception) -> None:
        """Save the last step, and record the failure. Raises another error if the user can act on that one."""
        step = step_name(self.state.step + 1, self.state.steps_per_epoch)
        error = as_preceptor_error(exception, subject=str(self.folder.path), step=step)
        with suppress(Exception):  # report the first error
            self._keep_last_step(exception)
        with suppress(Exception):
            self.write_summary("failed", str(error))
        if error is not exception:
            raise error from exception

    def _keep_last_step(self, exception: Exception) -> None:
        """Save the last step after a failure between steps, such as in reading data; after NaN, nothing is saved."""
        state = self.state
        self.saver.retry()
        if state.settled and state.step > self.saver.saved and not isinstance(exception, NumericalError):
            self.loop.save(["best", "last"] if state.best.get("step") == state.step else ["last"])
        self.saver.wait()

    def write_summary(self, status: str, reason: str, *, test: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Write summary.json and return its content."""
        summary = summary_of(self.training, status=status, reason=reason, test=test or {}, provenance=self.origin)
        self.folder.write_summary(summary)
        return summary


def _machine(training: Training) -> dict[str, Any]:
    return {"device": device_name(training.device), **describe(training.device), "threads": torch.get_num_threads()}


def _new_folder(training: Training, config: Config[TrainConfig]) -> RunFolder:
    """Create the folder of the config, or a default one, whose name another run may take in the same second."""
    first = training.state.state_dict()
    while True:
        path = chosen_path(config)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return RunFolder.create(path, record=training.record, first=first)
        except OSError as exception:
            raise StorageError(str(path), f"cannot be created: {exception.strerror}") from None
        except StorageError:
            if config.values["run_dir"] is not None or not path.exists():
                raise


def _restore(training: Training, splits: Splits, snapshot: Snapshot) -> None:
    """Load the state. Raises CheckpointError if data or model are not those of the run."""
    training.state.load_state_dict(snapshot)
    size = training.record["data"]["image_size"]
    if not same_mean(splits.train, training.state.normalisation.tensors, image_size=size):
        raise CheckpointError("data", "its mean differs from that of the data this run was trained on")

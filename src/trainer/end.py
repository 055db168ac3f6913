"""How a run ends: its best weights are tested, and summary.json is written."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core.errors import StopSignal

if TYPE_CHECKING:
    from trainer.loop import Trainer


def finish(trainer: "Trainer") -> dict[str, Any]:
    """Test the best weights and write summary.json; a run stopped by a signal, or pruned, is not tested but saved."""
    trainer.saver.wait()
    test: dict[str, float] | None = {}
    if trainer.best and trainer.stop_reason != "pruned" and not trainer.interrupts.received:
        best, _, damaged = trainer.folder.checkpoints.load("best")
        for text in damaged.values():
            trainer.warn(text)
        if best.step != trainer.best["step"]:
            trainer.warn(
                f"the best, of step {trainer.best['step']:,}, is lost: the test is of that of step {best.step:,}"
            )
        trainer.settled = False  # these weights are not those of the last step
        trainer.evaluated_model.load_state_dict(best.weights)
    if trainer.test_loader is not None and trainer.stop_reason != "pruned":  # whoever goes on with it will test
        test = trainer.measure(trainer.test_loader)
    if trainer.interrupts.received is not None or test is None:  # the resumed run will test
        summary = summarise(trainer, "interrupted")
    else:
        trainer.tracker.finish(trainer.record, {f"test/{name}": value for name, value in test.items()}, trainer.step)
        status = "finished" if trainer.stop_reason == trainer.settings.budget else "stopped_early"
        summary = summarise(trainer, status, test=test)
    trainer.display.summary(summary, trainer.folder.path)
    if summary["status"] == "interrupted":
        trainer.display.say(f"saved; go on with resume={trainer.folder.path}")
        raise StopSignal(trainer.interrupts.exit_code)
    return summary


def summarise(trainer: "Trainer", status: str, *, test: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Write summary.json."""
    summary = {
        "status": status,
        "stop_reason": trainer.stop_reason,
        "step": trainer.step,
        "epoch": trainer.epoch,
        "best": trainer.best,
        "test": dict(test or {}),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "seconds": round(trainer.clock.seconds, 3),
        "samples_per_second": round(trainer.clock.samples_per_second, 1),
        "seed": trainer.settings.seed,
        "provenance": dict(trainer.provenance),
    }
    trainer.folder.write_summary(summary)
    return summary

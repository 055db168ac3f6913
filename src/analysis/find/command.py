"""The command find.py: measure, suggest, print the override to paste, write find.png and find.json."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from analysis.figures import save
from analysis.find import batch_size, data_amount, learning_rate
from core.config import Config
from core.durable import write_durably
from core.errors import ConfigError, NumericalError, StorageError
from core.options.commands import FindConfig
from core.options.declarations import TrainConfig
from trainer.build.training import build
from trainer.device import configure_torch
from trainer.training import Training


def find(config: Config[FindConfig]) -> None:
    """Find the value that `find.goal` names, and print the override to paste.

    No run folder is created; find.dir gets find.png and find.json. Raises ConfigError for values that do not fit each
    other, StorageError if the folder exists, and NumericalError if no value can be suggested.
    """
    values = config.values
    config.require_new_run("find.py")
    options: dict[str, Any] = {**values["find"]}
    folder = Path(options["dir"] or f"outputs/find-{options['goal']}-{datetime.now():%Y-%m-%d_%H%M%S}")
    if folder.exists():
        raise StorageError(str(folder), "exists already; choose another find.dir")
    configure_torch(values["trainer"])
    goals = {"lr": find_lr, "batch_size": find_batch_size, "data": find_data}
    report, figure = goals[options["goal"]](config, options)
    folder.mkdir(parents=True)
    write_durably(folder / "find.json", (json.dumps(report, indent=2) + "\n").encode())
    save(figure, folder / "find.png")
    print(f"{report['override']}    # {report['reason']}" if report["override"] else report["reason"])
    print(f"written to {folder / 'find.png'} and {folder / 'find.json'}")
    if not report["override"] and options["goal"] != "data":
        raise NumericalError("find.py", str(report["reason"]))


def find_lr(config: Config[FindConfig], options: Mapping[str, Any]) -> tuple[dict[str, Any], Figure]:
    """Return the report and the plot of a learning-rate range test."""
    if options["highest"] <= options["lowest"]:
        raise ConfigError("find.highest", f"must be above find.lowest = {options['lowest']}", value=options["highest"])
    training, _ = build(cast(Config[TrainConfig], config))
    lowest, highest, steps = options["lowest"], options["highest"], options["steps"]
    curve = learning_rate.range_test(training, lowest=lowest, highest=highest, steps=steps)
    suggestion = learning_rate.suggest(curve)
    rates, smoothed = [lr for lr, _ in curve], learning_rate.smooth([loss for _, loss in curve])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, [loss for _, loss in curve], ".", color="#aeb6bf", label="loss of a step")
    axes.plot(rates, smoothed, color="#2471a3", label="smoothed")
    if suggestion:
        axes.axvline(suggestion.lr, color="#c0392b", label=f"suggestion: {suggestion.lr:g}")
    top = 1.2 * max(smoothed[:5]) if smoothed else 1.0
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", ylim=(0, top))
    axes.grid(alpha=0.3)
    axes.legend()
    reason = "the loss does not fall at any learning rate of the range; try find.lowest, find.highest or find.steps"
    return {
        "find": "lr",
        "override": f"optimizer.lr={suggestion.lr:g}" if suggestion else "",
        "reason": suggestion.reason if suggestion else reason,
        "lr": suggestion.lr if suggestion else None,
        "curve": [
            {"lr": lr, "loss": loss, "smoothed": value} for (lr, loss), value in zip(curve, smoothed, strict=True)
        ],
    }, figure


def find_batch_size(config: Config[FindConfig], options: Mapping[str, Any]) -> tuple[dict[str, Any], Figure]:
    """Return the report and the plot of the throughput over the batch size."""
    smallest, largest = options["smallest"], options["largest"]
    if largest < smallest:
        raise ConfigError("find.largest", f"must be at least find.smallest = {smallest}", value=largest)
    samples = len(build(_with_batch_size(config, smallest))[1].train)
    sizes = [size for size in (smallest * 2**power for power in range(20)) if size <= min(largest, samples)]
    if not sizes:
        raise ConfigError("find.smallest", f"must be at most {samples}, the number of training samples", value=smallest)
    builder: Callable[[int], Training] = lambda size: build(_with_batch_size(config, size))[0]  # noqa: E731
    results, ending = batch_size.measure(builder, sizes, steps=options["steps"])
    if not results:
        raise NumericalError("find.smallest", ending)
    best = batch_size.suggest(results)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([each.batch_size for each in results], [each.samples_per_second for each in results], "o-")
    axes.axvline(best.batch_size, color="#c0392b", label=f"suggestion: {best.batch_size}")
    axes.set(xscale="log", xlabel="batch size", ylabel="training samples per second", ylim=(0, None))
    axes.set_xticks([each.batch_size for each in results], [str(each.batch_size) for each in results])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    lr = config.values["optimizer"].get("lr")
    factor = best.batch_size / config.values["data"]["batch_size"]
    reason = f"the smallest batch with 95% of the highest throughput ({best.samples_per_second:,.0f} samples/s)"
    if ending:
        reason += f"; {ending}"
    if lr and factor != 1:
        reason += f"; by linear scaling, optimizer.lr={lr * factor:.2g}"
    return {
        "find": "batch_size",
        "override": f"data.batch_size={best.batch_size}",
        "reason": reason,
        "batch_size": best.batch_size,
        "largest": results[-1].batch_size,
        "curve": [
            {"batch_size": each.batch_size, "samples_per_second": round(each.samples_per_second, 1)} for each in results
        ],
    }, figure


def find_data(config: Config[FindConfig], options: Mapping[str, Any]) -> tuple[dict[str, Any], Figure]:
    """Return the report and the plot of the error over the number of training images."""
    if len(set(options["fractions"])) < 3:
        raise ConfigError("find.fractions", "must have at least three different values", value=options["fractions"])
    training_config = cast(Config[TrainConfig], config)
    _, splits = build(training_config)
    if splits.val is None:
        raise ConfigError("data.val_fraction", "must be > 0: the error is that of the validation split", value=0)
    total, seed = len(splits.train), config.values["seed"]
    samples, errors = [], []
    for fraction in sorted(set(options["fractions"])):
        number = max(config.values["data"]["batch_size"], round(fraction * total))
        for of_seed in range(seed, seed + options["seeds"]):
            samples.append(number)
            errors.append(data_amount.train_part(training_config, samples=number, seed=of_seed))
            print(f"{number:,} images, seed {of_seed}: error {errors[-1]:.2%}", flush=True)
    result = data_amount.forecast(samples, errors, at=2 * total)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(samples, errors, "o", label="validation error of a training")
    bars = [[result.error - result.low], [result.high - result.error]]
    axes.errorbar([result.samples], [result.error], yerr=bars, fmt="s", color="#c0392b", capsize=4, label="forecast")
    axes.set(xscale="log", yscale="log", xlabel="training images", ylabel="error")
    places = sorted({*samples, result.samples})
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.set_xticks([], minor=True)
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    text = f"with {result.samples:,} training images the error will be {result.error:.2%} ({result.low:.2%} to "
    text += f"{result.high:.2%}); it is {min(errors[-options['seeds'] :]):.2%} with {total:,}"
    if not result.is_reliable:
        text += f". This is not reliable: the errors do not follow a power law (r^2 = {result.r_squared:.2f})"
    return {
        "find": "data",
        "override": "",
        "reason": text,
        "forecast": asdict(result) | {"is_reliable": result.is_reliable},
        "curve": [{"samples": number, "error": error} for number, error in zip(samples, errors, strict=True)],
    }, figure


def _with_batch_size(config: Config[FindConfig], size: int) -> Config[TrainConfig]:
    values: Any = {**config.values, "data": {**config.values["data"], "batch_size": size}}
    return cast(Config[TrainConfig], replace(config, values=values))

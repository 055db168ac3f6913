"""Benchmarks `step`, `own`, `logs` and `growth`: training on a CPU."""

import argparse
import itertools
from contextlib import ExitStack, suppress

from contenders import PEERS, assembled, bare, data_loader, plain, preceptor, whole_run
from tables import Line
from turns import BATCH, CASES, CPU, race


def bench_step(options: argparse.Namespace) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for name, overrides in CASES.items():
        if options.only.lower() not in name.lower():
            continue
        augment = "augment=crop_flip" in overrides
        with whole_run(*overrides) as run:
            trainings = {"limit": bare(assembled(*overrides), one_batch=True), "ours": preceptor(run)}
            for workers in (0, 2):
                other = assembled(*overrides, "trainer.channels_last=false")
                batches = data_loader(other, augment=augment, workers=workers)
                trainings[f"plain, {workers} workers"] = plain(other.state.model, batches)
            for (peer, make), workers in itertools.product(PEERS.items(), (0, 2)):
                other = assembled(*overrides, "trainer.channels_last=false")
                with suppress(ImportError):
                    batches = data_loader(other, augment=augment, workers=workers)
                    trainings[f"{peer}, {workers} workers"] = make(other.state.model, batches)
            lines[name] = race(trainings, of="ours", rounds=options.rounds, seconds=options.seconds)
    return lines


def bench_own(options: argparse.Namespace) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for hidden in ("[32]", "[256,256]"):
        overrides = ("data=mnist", "model=mlp", f"model.hidden={hidden}", *CPU)
        with whole_run(*overrides) as run:
            trainings = {"ours": preceptor(run), "bare": bare(assembled(*overrides), one_batch=False)}
            line = race(trainings, of="own", rounds=options.rounds, seconds=options.seconds, unit="us/step")
        for name in trainings:
            line[name] = [BATCH * 1e6 / throughput for throughput in line[name]]
        line["own"] = [total - bare for total, bare in zip(line["ours"], line["bare"], strict=True)]
        lines[f"MLP of {hidden}, MNIST"] = line
    return lines


def bench_logs(options: argparse.Namespace) -> dict[str, Line]:
    case = CASES["LeNet 20C5-50C5-FC256, MNIST"]
    kinds = {
        "logs every 50 steps": (),
        "logs at every step": ("trainer.log_every=1 steps",),
        "saves at every fifth": ("trainer.checkpoint.every_steps=5",),
    }
    with ExitStack() as stack:
        trainings = {
            name: preceptor(stack.enter_context(whole_run(*case, *overrides))) for name, overrides in kinds.items()
        }
        line = race(trainings, of="logs every 50 steps", rounds=options.rounds, seconds=options.seconds)
    return {"LeNet 20C5-50C5-FC256, MNIST": line}


def bench_growth(options: argparse.Namespace) -> dict[str, Line]:
    """Return one line per size: its contenders differ in that size only."""
    synthetic = ("data=synthetic", "data.image_size=28", "data.channels=1", "trainer.device=cpu")
    sizes: dict[str, list[tuple[str, ...]]] = {
        "samples": [(f"{n:,}", f"data.train_samples={n}", "model=mlp") for n in (4000, 16000, 64000)],
        "batch": [(str(n), f"data.batch_size={n}", "data.train_samples=8000", "model=mlp") for n in (32, 128, 512)],
        "hidden units": [(f"2 x {n}", f"model.hidden=[{n},{n}]", "model=mlp") for n in (128, 256, 512)],
    }
    lines: dict[str, Line] = {}
    for size, kinds in sizes.items():
        with ExitStack() as stack:
            trainings = {
                name: preceptor(stack.enter_context(whole_run(*synthetic, *overrides))) for name, *overrides in kinds
            }
            line = race(trainings, of=kinds[0][0], rounds=options.rounds, seconds=options.seconds, unit="us/sample")
        for name in trainings:
            line[name] = [1e6 / throughput for throughput in line[name]]
        lines[f"MLP, by {size}"] = line
    return lines

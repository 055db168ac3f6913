"""The parts `step`, `own`, `logs` and `growth`: training on a CPU."""

import argparse
import itertools
from contextlib import ExitStack, suppress

from contenders import PEERS, assembled, bare, data_loader, ours, plain, whole_run
from tables import Line
from turns import BATCH, CASES, CPU, race


def bench_step(options: argparse.Namespace) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for name, overrides in CASES.items():
        if options.only.lower() not in name.lower():
            continue
        augment = "augment=crop_flip" in overrides
        with whole_run(*overrides) as run:
            trainings = {"limit": bare(assembled(*overrides), one_batch=True), "ours": ours(run)}
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
        given = ("data=mnist", "model=mlp", f"model.hidden={hidden}", *CPU)
        with whole_run(*given) as run:
            trainings = {"ours": ours(run), "bare": bare(assembled(*given), one_batch=False)}
            line = race(trainings, of="own", rounds=options.rounds, seconds=options.seconds, unit="us a step")
        for name in trainings:
            line[name] = [BATCH * 1e6 / reached for reached in line[name]]
        line["own"] = [mine - theirs for mine, theirs in zip(line["ours"], line["bare"], strict=True)]
        lines[f"MLP of {hidden}, MNIST"] = line
    return lines


def bench_logs(options: argparse.Namespace) -> dict[str, Line]:
    given = CASES["LeNet 20C5-50C5-FC256, MNIST"]
    kinds = {
        "logs every 50 steps": (),
        "logs at every step": ("trainer.log_every=1 steps",),
        "saves at every fifth": ("trainer.checkpoint.every_steps=5",),
    }
    with ExitStack() as stack:
        trainings = {
            name: ours(stack.enter_context(whole_run(*given, *overrides))) for name, overrides in kinds.items()
        }
        line = race(trainings, of="logs every 50 steps", rounds=options.rounds, seconds=options.seconds)
    return {"LeNet 20C5-50C5-FC256, MNIST": line}


def bench_growth(options: argparse.Namespace) -> dict[str, Line]:
    """Each line's contenders differ in one size alone."""
    made_up = ("data=synthetic", "data.image_size=28", "data.channels=1", "trainer.device=cpu")
    sizes: dict[str, list[tuple[str, ...]]] = {
        "samples": [(f"{n:,}", f"data.train_samples={n}", "model=mlp") for n in (4000, 16000, 64000)],
        "batch": [(str(n), f"data.batch_size={n}", "data.train_samples=8000", "model=mlp") for n in (32, 128, 512)],
        "hidden units": [(f"2 x {n}", f"model.hidden=[{n},{n}]", "model=mlp") for n in (128, 256, 512)],
    }
    lines: dict[str, Line] = {}
    for what, kinds in sizes.items():
        with ExitStack() as stack:
            trainings = {name: ours(stack.enter_context(whole_run(*made_up, *given))) for name, *given in kinds}
            line = race(trainings, of=kinds[0][0], rounds=options.rounds, seconds=options.seconds, unit="us a sample")
        for name in trainings:
            line[name] = [1e6 / reached for reached in line[name]]
        lines[f"MLP, by {what}"] = line
    return lines

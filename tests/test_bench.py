"""`scripts/bench.py` measures what it says it does, on made-up data, for a moment."""

import json
import sys
import time
from pathlib import Path
from statistics import median

import pytest

pytest.importorskip("greenlet")
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import bench


def test_contenders_take_turns_and_are_timed_by_their_steps():
    order: list[str] = []

    def training(name: str, pause: float) -> bench.Callable[[bench.Seen], object]:
        def train(seen: bench.Seen) -> None:
            while True:
                time.sleep(pause)
                order.append(name)
                seen(10)

        return train

    line = bench.race(
        {"slow": training("slow", 0.02), "fast": training("fast", 0.002)}, of="fast", rounds=4, seconds=0.05
    )
    assert len(line["slow"]) == len(line["fast"]) == 4
    turns = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert turns.count("slow") > 2 and turns.count("fast") > 2  # by turns, whoever begins a round
    assert median(line["slow"]) <= 500 and median(line["fast"]) <= 5000  # no step is shorter than its pause
    assert median(line["fast"]) > 3 * median(line["slow"])


def test_a_bench_of_a_moment(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("contenders.DATA", tmp_path)  # made-up pictures
    monkeypatch.setattr("bench.keep_freed_memory", lambda: None, raising=False)
    output = tmp_path / "bench.json"
    given = ["bench.py", "step", "own", "--only", "MLP", "--rounds", "2", "--seconds", "0.01", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", given)
    bench.main()
    report = json.loads(output.read_text())
    (line,) = report["step"].values()
    assert {"limit", "ours", "plain, 0 workers", "plain, 2 workers"} <= set(line) and all(map(len, line.values()))
    own = report["own"]["MLP of [32], MNIST"]
    assert own["own"] == [ours - bare for ours, bare in zip(own["ours"], own["bare"], strict=True)]
    told = capsys.readouterr().out
    assert "us a step" in told and "of it" in told and output.with_suffix(".png").stat().st_size > 10_000

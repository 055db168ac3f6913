"""Trains a model as a config says.

    run.py          a run: create or resume, fit, finish; `execute` is the command that trains
    resuming.py     what a resumed run reports
    loop.py         the loop: `Loop.fit`, one screen
    steps.py        one optimizer step of classification: batches -> update, metrics
    state.py        TrainState: whatever survives a restart, in one object
    snapshot.py     the state at a commit point, as a checkpoint holds it
    training.py     what a config is built into: state, step, loaders, settings
    settings.py     the settings of the loop, every duration in steps
    durations.py    epochs, samples and percentages as steps, and back
    device.py       the device, precision, process-wide settings of torch
    interfaces.py   protocols: what the loop requires of step, loaders, recorder, saver
    build/          config -> Training
    optim/          optimizers, schedules, losses, moving average
    monitor/        sums of metrics, early stopping, guard against NaN, signals, clock
    storage/        run folder, checkpoints
    report/         metrics.jsonl, TensorBoard, terminal
    inference/      evaluation, and runs loaded for use

A run goes: config -> build/training.py -> run.py (folder, signals) -> loop.py -> steps.py -> loop.py (evaluate, commit)
-> report/recorder.py, storage/background_saver.py -> run.py (test, summary.json).
"""

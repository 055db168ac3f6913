"""Measure a training, and decide whether it continues.

metrics.py          loss and accuracy as running sums; which of two values is better
early_stopping.py   patience
nonfinite.py        keeps NaN and infinity out of the weights
restorable.py       tensors that a flag on the device restores
interrupts.py       SIGTERM, SIGINT and SIGHUP as requests
clock.py            wall-clock time and throughput
verdict.py          warnings about a finished run that has learned nothing
"""

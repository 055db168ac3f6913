"""What watches a training, and may end it.

metrics.py          loss and accuracy as running sums; which of two values is better
early_stopping.py   patience
nonfinite.py        no NaN or infinity reaches the weights
interrupts.py       SIGTERM, SIGINT and SIGHUP as requests
clock.py            wall-clock time and throughput
"""

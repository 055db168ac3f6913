"""Checks of a training before its first step, for the script `check`.

command.py          config -> evidence -> findings: table, JSON, exit code 8 if one is an error
model_evidence.py   initial loss, gradients of each layer, one batch overfitted
gradient_check.py   gradients against finite differences in float64
data_evidence.py    class counts, constant images, statistics of each split
duplicates.py       exact and near-duplicates between splits
"""

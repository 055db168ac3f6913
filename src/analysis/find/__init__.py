"""Finders: values for a training that are measured in seconds, for the script `find`.

command.py         config -> measurement -> suggestion: table, find.png, find.json
learning_rate.py   learning-rate range test, and the choice from its curve
data_amount.py     trainings on parts of the train split, and a forecast for twice as many images
batch_size.py      samples per second of each batch size, and the choice
"""

"""What a run shows: each report is given to the recorder once.

recorder.py             passes it to metrics.jsonl, events.jsonl, TensorBoard and the terminal
tensorboard_writer.py   the event file
terminal.py             progress bar or lines, and train.log
introduction.py         what is shown before the first step
notices.py              warnings that our packages log
"""

"""Reports of a run: callers report once, and the recorder distributes the report.

recorder.py             recorder: metrics.jsonl, events.jsonl, TensorBoard and terminal
tensorboard_writer.py   TensorBoard event file
terminal.py             progress bar or plain lines, and train.log
introduction.py         facts shown before the first step
mistakes.py             confusion matrix and worst mistakes on the test split, as figures
summary.py              content of summary.json
notices.py              warnings logged by Preceptor's packages
"""

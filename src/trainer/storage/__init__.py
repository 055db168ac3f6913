"""Storage: the files of a run.

    run_folder.py          RunFolder: created atomically; logs are appended, and truncated on resume
    lock.py                lock of a run folder: one process per folder
    checkpoint.py          checkpoints: snapshots as safetensors files, named by the hash of their content
    safetensors_file.py    the safetensors format: serialises tensors without a copy, checks headers before reading
    read_pickle.py         converts a pickle file with weights, in a separate process
    background_saver.py    writes checkpoints in a thread while training continues
    provenance.py          git commit, versions, machine, command line

How a checkpoint is saved: TrainState.state_dict() -> Snapshot -> background_saver -> checkpoint.save -> core.durable.
"""

"""What a run keeps on the disk.

    run_folder.py          the folder: created atomically, logs appended, cut back on resume
    lock.py                one process per folder
    checkpoint.py          snapshots as safetensors files, named by the hash of their content
    safetensors_file.py    the format: written from the tensors' own memory, checked before it is read
    read_pickle.py         converts a pickle file with weights, in a process of its own
    background_saver.py    writes checkpoints while training continues
    provenance.py          git commit, versions, machine, command line

The path of a checkpoint: TrainState.state_dict() -> Snapshot -> background_saver -> checkpoint.save -> core.durable.
"""

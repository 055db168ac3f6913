"""Loading: batches for the training loop and for evaluation, from images in memory or in files.

    loaders.py         TrainLoader and EvalLoader: order of an epoch, groups of batches, device of the augmentation
    pixel_sources.py   Resident, all pixels of a split on the device, or Streamed, decoded batch by batch
    normalisation.py   pixels of 0 to 255 -> float32 input of the model; fitted on the train split
    prefetch.py        on CUDA: the next batch is prepared while a step computes
    workers.py         WorkerPool: starts loader workers, receives their batches, and replaces workers that die
    worker_process.py  the function that each loader worker runs
    parcels.py         parcels: objects whose tensors are shared with the workers through files in memory
    server.py          the fork server that starts all workers of this process

rows of a batch -> Resident, or Streamed (optionally in a worker) -> augmentation -> normalisation -> prefetch -> loop
"""

"""Seeds as a pure function of the run's seed and a purpose.

`fold(seed, "order", epoch)` is the seed of the sample order of an epoch, and `fold(seed, "dropout", step)` the seed of
the dropout masks of a step. No generator lives longer than its purpose, so no generator state is
saved for a resumed run.
"""

import hashlib


def fold(seed: int, *names: int | str) -> int:
    """Return a 63-bit seed for a purpose, given as names. Equal arguments give equal seeds on every machine."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

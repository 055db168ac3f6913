"""The normalisation of a run, from its checkpoint."""

from core.errors import CheckpointError
from data.loading.normalisation import Normalisation
from trainer.snapshot import Snapshot


def saved_normalisation(snapshot: Snapshot, source: str) -> Normalisation:
    """Return the normalisation that a checkpoint holds; CheckpointError, naming the source, if it holds none."""
    try:
        return Normalisation(snapshot.part("data"))
    except (KeyError, TypeError) as exception:
        raise CheckpointError(source, f"its checkpoint does not say what its data was: {exception!r}") from None

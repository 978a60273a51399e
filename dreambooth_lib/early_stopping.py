"""When a run stops before its last step: its looks bring nothing better any more."""

from collections.abc import Sequence

from dreambooth_lib.choice import best_of
from dreambooth_lib.watch_record import Watched

PATIENCE = 5  #: looks without a better one before an early stop


def has_peaked(rows: Sequence[Watched], patience: int = PATIENCE) -> bool:
    """Return whether the last ``patience`` looks brought no better standing than earlier ones."""
    steps = [row.step for row in rows[1:]]
    return len(steps) > patience and best_of(rows).step < steps[-patience]

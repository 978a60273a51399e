"""When a run stops before its last step: its looks bring nothing better any more."""

from collections.abc import Sequence

from dreambooth_lib.training.best_checkpoint import select_best
from dreambooth_lib.training.validation_record import ValidationResult

PATIENCE = 5  #: looks without a better one before an early stop


def should_stop_early(rows: Sequence[ValidationResult], patience: int = PATIENCE) -> bool:
    """Return whether the last ``patience`` looks brought no better score than earlier ones."""
    steps = [row.step for row in rows[1:]]
    return len(steps) > patience and select_best(rows).step < steps[-patience]

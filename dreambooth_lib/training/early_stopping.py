"""Decide when to stop a run before its last step: validation no longer finds it better."""

from collections.abc import Sequence

from dreambooth_lib.training.best_checkpoint import highest_score
from dreambooth_lib.training.validation_record import ValidationResult

PATIENCE = 5  #: validations without a better score before an early stop


def should_stop_early(rows: Sequence[ValidationResult], patience: int = PATIENCE) -> bool:
    """Return whether the highest score is older than the last ``patience`` validations."""
    steps = [row.step for row in rows[1:]]
    return len(steps) > patience and highest_score(rows).step < steps[-patience]

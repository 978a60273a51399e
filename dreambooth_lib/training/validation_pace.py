"""Keep validation to a share of the training time: decide which validations a run can afford.

The first process decides, from the seconds in the run's log and validation rows. A validation that
it skips has a row of its own, so that a resumed run does not decide again; one that could not be
drawn is tried again. Training does not depend on any of this: its weights are the same.
"""

from statistics import median

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.validation_record import history

#: Steps between checkpoints where neither validate_every nor checkpoint_every says otherwise.
CHECKPOINT_INTERVAL = 250
_SKIPPED = "skipped"  #: the key of such a row in ``validation.jsonl``


def share_limit(config: TrainConfig) -> float | None:
    """Return the most of the training time that validation may take; None where all is wanted.

    Early stopping counts validations: with fewer it would stop much later, which costs more.
    """
    return None if config.early_stop else config.validation_share


def due_steps(config: TrainConfig, after: int, until: int) -> int:
    """Count the steps of (after, until] with a validation due: each interval's and the last."""
    every, steps = config.validate_every, config.steps
    return until // every - after // every + (after < steps <= until and steps % every > 0)


def checkpoint_intervals(config: TrainConfig) -> list[int]:
    """Return the intervals of a run's checkpoints: one is due at each of their multiples."""
    own = 0 if config.validate_every else CHECKPOINT_INTERVAL
    return [every for every in (config.validate_every, config.checkpoint_every or own) if every]


def count_validations(config: TrainConfig, step_seconds: float, seconds: float) -> int:
    """Return how many validations, each of ``seconds``, a run makes, the base's among them."""
    if not config.validate_every:
        return 0
    due, share = 1 + due_steps(config, 0, config.steps), share_limit(config)
    if share is None or seconds <= 0:
        return due
    return min(due, max(2, int(share * config.steps * step_seconds / seconds)))


def is_wanted(run: Run, step: int) -> bool:
    """Return whether to validate now, at a step with a validation due; note down if not.

    It is not if that was done or skipped before.
    """
    if step in {result.step for result in history(run)}:
        return False
    # One skipped before is wanted after all where the run now ends there, or stops early.
    is_due = step == run.config.steps or share_limit(run.config) is None
    if step in skipped_steps(run) and not is_due:
        return False
    if _is_affordable(run, step):
        return True
    note_skipped(run, step)
    return False


def note_skipped(run: Run, step: int, why: str | None = None) -> None:
    """Note in a run's validation rows that the one of a step is skipped: for time, or ``why``."""
    run.append("validation", {"step": step, _SKIPPED: why or True})


def skipped_steps(run: Run) -> list[int]:
    """Return the steps whose validations were skipped to save time, oldest first."""
    return [row["step"] for row in run.rows("validation") if row.get(_SKIPPED) is True]


def _is_affordable(run: Run, step: int) -> bool:
    """Return whether a validation fits the run's share, spread evenly over the steps to come.

    The share is of the whole run's training time: the steps so far took their seconds, and those to
    come will take the median's.
    """
    config, results = run.config, history(run)
    seconds, share = [row["seconds"] for row in run.log()], share_limit(config)
    if share is None or step == config.steps or not results or not seconds:
        return True
    training = sum(seconds) + (config.steps - step) * median(seconds)
    spent, one = sum(row.seconds for row in results), median(row.seconds for row in results)
    affordable = int((share * training - spent) / max(one, 1e-9)) - 1  # besides the last step's
    since = due_steps(config, results[-1].step, step)
    intervals = since + due_steps(config, step, config.steps)
    return affordable > 0 and since >= intervals / (affordable + 1)

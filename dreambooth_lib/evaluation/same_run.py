"""Check that a run that is there is the one that an evaluation or a sweep would make."""

from collections.abc import Collection
from pathlib import Path

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.training import runs
from dreambooth_lib.training.config_changes import (
    Difference,
    describe,
    first_difference,
    flat_fields,
    with_settings_of,
)
from dreambooth_lib.training.photo_record import why_other_photos
from dreambooth_lib.training.runs import Run, RunError


def check_same(
    run: Run,
    config: TrainConfig,
    holds: str,
    free: Collection[str] = (),
    of_plan: Difference | None = None,
) -> None:
    """Raise :class:`RunError` if a run differs from ``config``, but in ``free``, or its photos do.

    ``holds`` begins the sentence: "FOLDER holds a run". ``of_plan`` is a difference of its plan.
    """
    old, new = (flat_fields(own) for own in (run.config, with_settings_of(run.config, config)))
    if difference := first_difference(old, new, free) or of_plan:
        raise RunError(
            f"{holds} of {describe(run.config)} {difference}; choose another folder for this one."
        )
    check_photos(run.folder, run.config)


def check_photos(folder: Path, config: TrainConfig) -> None:
    """Raise :class:`RunError` if the run in a folder has begun with other photos."""
    if runs.has_begun(folder) and (why := why_other_photos(folder, config)):
        raise RunError(why)

"""DreamBooth (arXiv 2208.12242) as a thin library: a subject in, new pictures of it out.

    import dreambooth_lib as db

    subject = db.load_subject("photos/", class_noun="dog")
    config = db.TrainConfig(base="toybox", subject=subject, prior_weight=1.0, steps=500)
    run = db.start(config, "runs/my-dog")  # or db.resume("runs/my-dog")
    for step in db.train(run):
        print(step.step, step.instance_loss, step.prior_loss)
    db.sample(run, ["a {} dog on the beach"], seeds=[0, 1, 2, 3])

Names are imported when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreambooth_lib.core.config import TrainConfig
    from dreambooth_lib.core.config_types import ConfigError
    from dreambooth_lib.core.subject import Subject
    from dreambooth_lib.data.identifiers import check_identifier, rare_identifiers
    from dreambooth_lib.data.images import read_photos
    from dreambooth_lib.data.quality_checks import check_photos
    from dreambooth_lib.data.subjects import load_dataset, load_subject
    from dreambooth_lib.training.best_checkpoint import Selection, best_checkpoint
    from dreambooth_lib.training.loop import Step, train
    from dreambooth_lib.training.runs import Run, resume, start
    from dreambooth_lib.training.sampling import Sample, compose, sample
    from dreambooth_lib.training.validation_record import ValidationResult, history

_HOME = {
    "Selection": "training.best_checkpoint",
    "best_checkpoint": "training.best_checkpoint",
    "ConfigError": "core.config_types",
    "Subject": "core.subject",
    "TrainConfig": "core.config",
    "check_photos": "data.quality_checks",
    "load_dataset": "data.subjects",
    "load_subject": "data.subjects",
    "check_identifier": "data.identifiers",
    "rare_identifiers": "data.identifiers",
    "read_photos": "data.images",
    "Run": "training.runs",
    "resume": "training.runs",
    "start": "training.runs",
    "Sample": "training.sampling",
    "sample": "training.sampling",
    "compose": "training.sampling",
    "Step": "training.loop",
    "train": "training.loop",
    "ValidationResult": "training.validation_record",
    "history": "training.validation_record",
}
__all__ = [  # a literal, which type checkers read
    "ConfigError",
    "Run",
    "Sample",
    "Selection",
    "Step",
    "Subject",
    "TrainConfig",
    "ValidationResult",
    "best_checkpoint",
    "check_identifier",
    "check_photos",
    "compose",
    "history",
    "load_dataset",
    "load_subject",
    "rare_identifiers",
    "read_photos",
    "resume",
    "sample",
    "start",
    "train",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dreambooth_lib' has no attribute '{name}'")
    return getattr(import_module(f"dreambooth_lib.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

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
    from dreambooth_lib.choice import Choice, best_checkpoint
    from dreambooth_lib.config import Subject, TrainConfig
    from dreambooth_lib.config_checks import ConfigError
    from dreambooth_lib.data import check_pictures, load_dataset, load_subject
    from dreambooth_lib.identifiers import check_identifier, rare_identifiers
    from dreambooth_lib.pictures import read_pictures
    from dreambooth_lib.runs import Run, resume, start
    from dreambooth_lib.sampling import Sample, compose, sample
    from dreambooth_lib.training import Step, train
    from dreambooth_lib.watch_record import Watched, history

_HOME = {
    "Choice": "choice",
    "best_checkpoint": "choice",
    "ConfigError": "config_checks",
    "Subject": "config",
    "TrainConfig": "config",
    "check_pictures": "data",
    "load_dataset": "data",
    "load_subject": "data",
    "check_identifier": "identifiers",
    "rare_identifiers": "identifiers",
    "read_pictures": "pictures",
    "Run": "runs",
    "resume": "runs",
    "start": "runs",
    "Sample": "sampling",
    "sample": "sampling",
    "compose": "sampling",
    "Step": "training",
    "train": "training",
    "Watched": "watch_record",
    "history": "watch_record",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dreambooth_lib' has no attribute '{name}'")
    return getattr(import_module(f"dreambooth_lib.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

"""What training costs on this machine, measured by a few updates and one look."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from dreambooth_lib import memory, runs
from dreambooth_lib.config import TrainConfig

_NEVER = 10**6  # updates
_UPDATES = 3
_TRIES = 40  # in fp16 the first updates are skipped until the loss is scaled so that it fits


@dataclass(frozen=True)
class Pace:
    """Seconds of one update and of one look, 0 where the config asks for none."""

    update: float
    look: float

    def seconds(self, config: TrainConfig) -> float:
        """Of all updates and looks of a run; an early stop may end it before."""
        looks = 1 + -(-config.steps // config.watch_every) if config.watch_every else 0
        return config.steps * self.update + looks * self.look


def measure(config: TrainConfig) -> Pace:
    """Train for a moment beside all runs, and leave nothing behind.

    That loads the base and draws a batch of class pictures, which is no part of the pace. Raises
    as :func:`dreambooth_lib.training.train` does.
    """
    from dreambooth_lib.training import NonFiniteLoss, Trainer

    memory.free()
    brief = config.replace(
        steps=_NEVER,
        checkpoint_every=_NEVER,
        watch_every=_NEVER if config.watch_every else 0,
        class_pictures=min(config.class_pictures, config.batch_size),
    )
    with TemporaryDirectory() as folder:
        trainer = Trainer(runs.start(brief, Path(folder) / "run"))
        look = trainer.look()
        tried = (trainer.update() for _ in range(_TRIES))
        made = (step.seconds for step in tried if step is not None)
        seconds = list(islice(made, 1, 1 + _UPDATES))  # the first one also warms up
    if not seconds:
        raise NonFiniteLoss(
            f"no update could be measured: of {_TRIES} all but one at most were skipped, as the "
            "gradient is not finite; lower learning_rate, or use mixed_precision 'no'."
        )
    return Pace(median(seconds), look.seconds if look else 0.0)

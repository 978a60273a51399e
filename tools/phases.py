"""The phases of a training step, followed from outside by the library's own functions."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from dreambooth_lib.training.loop import Step, training_steps

#: In the order of a step; "rest" is what no other phase is.
PHASES = ("batch", "forward", "backward", "optimizer step", "EMA", "log", "rest")

#: Takes a phase's name and a function; returns one that is followed.
During = Callable[[str, Callable[..., Any]], Callable[..., Any]]


def follow(trainer: Any, during: During) -> Iterator[Step]:
    """Return a trainer's steps, with the functions of each phase followed."""
    optimizer = trainer.optimizer
    for owner, method, phase in (
        (trainer.batches, "at", "batch"),
        (trainer.batches, "split", "batch"),
        (trainer.model, "forward", "forward"),
        (optimizer, "_backward", "backward"),
        (optimizer, "_take_gradients", "optimizer step"),
        (optimizer, "step", "optimizer step"),
        (optimizer.ema, "update", "EMA"),
        (trainer, "log", "log"),
    ):
        setattr(owner, method, during(phase, getattr(owner, method)))
    return training_steps(trainer)


class Stopwatch:
    """Seconds by phase; a phase inside another one counts by itself."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: Counter[str] = Counter()
        self._inside: list[float] = []  # seconds of phases inside each open one

    def during(self, phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is timed as part of a phase."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self.clock()
            self._inside.append(0.0)
            try:
                return work(*args, **kwargs)
            finally:
                whole = self.clock() - began
                self.seconds[phase] += whole - self._inside.pop()
                if self._inside:
                    self._inside[-1] += whole

        return timed

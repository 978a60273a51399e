"""What a run trains, as one module, and a checkpoint's weights put back into the base."""

from collections.abc import Iterable
from typing import Any

import torch

from dreambooth_lib import families
from dreambooth_lib.families.base import Cond, Family
from dreambooth_lib.runs import Run, RunError


class Trainable(torch.nn.Module):
    """What is trained, as one module: the denoiser, and the text encoders where they train."""

    def __init__(self, family: Family, with_text: bool):
        super().__init__()
        self.denoiser = family.denoiser
        self.text_encoders = torch.nn.ModuleList(family.text_encoders if with_text else [])
        self._family = [family]  # in a list, so that its modules are not registered twice

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond | None, prompts: list[str]
    ) -> torch.Tensor:
        (family,) = self._family
        return family.predict(x_t, t, family.encode_prompts(prompts) if cond is None else cond)


def restored(run: Run, step: int) -> Family:
    """The family as it was at a checkpoint, with the averaged weights if the run keeps them.

    Raises :class:`RunError` where the run has no checkpoint of that step.
    """
    config = run.config
    family = families.load(config.base, config.revision, config.variant)
    put_back(Trainable(family, config.train_text_encoder), run, step)
    return family


def put_back(trainable: Trainable, run: Run, step: int) -> None:
    """Load a checkpoint's weights into ``trainable``, as :func:`restored` does."""
    from dreambooth_lib.state import load_state

    found = run.checkpoints()
    if step not in found:
        have = ", ".join(map(str, found)) or "none"
        raise RunError(
            f"{run.folder} has no checkpoint of step {step}; it has {have}: choose one of those, "
            "or raise checkpoints_kept."
        )
    state = load_state(found[step], ("model", "ema"))
    if "ema" in state:
        copy_weights(state["ema"]["shadow_params"], trainable.parameters())
    else:
        trainable.load_state_dict(state["model"])


@torch.no_grad()
def copy_weights(source: Iterable[torch.Tensor], target: Iterable[Any]) -> None:
    for one, other in zip(source, target, strict=True):
        other.copy_(one)

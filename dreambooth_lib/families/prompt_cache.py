"""Prompts encoded once and looked up from then on, where the text encoders do not train."""

from collections.abc import Collection

import torch

from dreambooth_lib.families.base import Cond, Family, rows
from dreambooth_lib.families.precision import NonFinite


class PromptCache:
    """Prompts that were encoded once, looked up from then on.

    Raises :class:`NonFinite` where the text encoders give NaN or infinity.
    """

    def __init__(self, family: Family, prompts: Collection[str]):
        distinct = sorted(set(prompts))
        self.row = {prompt: row for row, prompt in enumerate(distinct)}
        with torch.no_grad():
            self.cond = family.conditioning(distinct)
        for value in self.cond.values():
            if not value.isfinite().all():
                gave = "conditioning that is not finite"
                raise NonFinite.of("a text encoder", family.name, gave, value.dtype)

    def __call__(self, prompts: list[str]) -> Cond:
        """Return what the denoiser is told of each prompt; raises KeyError for an unknown one."""
        return rows(self.cond, [self.row[prompt] for prompt in prompts])

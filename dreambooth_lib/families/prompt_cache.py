"""Encode prompts once and look them up from then on, where the text encoders do not train."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from dreambooth_lib.families.base import Cond, Family
from dreambooth_lib.families.device_copies import rows
from dreambooth_lib.families.precision import NonFinite, computed_in


class PromptCache:
    """Conditioning of a set of prompts, each encoded once.

    Raises :class:`NonFinite` where a text encoder gives NaN or infinity.
    """

    def __init__(self, family: Family, prompts: Collection[str]):
        distinct = sorted(set(prompts))
        self.row = {prompt: row for row, prompt in enumerate(distinct)}
        with torch.no_grad():
            self.cond = family.conditioning(distinct)
        for value in self.cond.values():
            if not value.isfinite().all():
                gave = "conditioning that is not finite"
                dtype = computed_in(value.dtype, value.device)
                raise NonFinite.of("a text encoder", family.name, gave, dtype)

    def __call__(self, prompts: list[str]) -> Cond:
        """Return the conditioning of the prompts; raise ``KeyError`` for an unknown one."""
        return rows(self.cond, [self.row[prompt] for prompt in prompts])

    @contextmanager
    def used_by(self, family: Family) -> Iterator[None]:
        """Let the family look its prompts up here, while it draws them."""
        before, family.prompt_cache = family.prompt_cache, self
        try:
            yield
        finally:
            family.prompt_cache = before

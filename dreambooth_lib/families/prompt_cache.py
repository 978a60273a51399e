"""Encode prompts once and look them up from then on, where the text encoders do not train."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import pad

from dreambooth_lib.families.base import Cond, Family
from dreambooth_lib.families.device_copies import rows, to_device
from dreambooth_lib.families.precision import NonFinite, computed_in

BATCH = 8  #: prompts that a large text encoder encodes at once: T5-XXL takes 70 MB for each


class PromptCache:
    """Conditioning of a set of prompts, each encoded once.

    It stays on the CPU, since that of hundreds of prompts may take gigabytes, and a call moves what
    it returns to where the prompts were encoded. Raises :class:`NonFinite` where a text encoder
    gives NaN or infinity.
    """

    def __init__(self, family: Family, prompts: Collection[str]):
        distinct = sorted(set(prompts))
        self.row = {prompt: row for row, prompt in enumerate(distinct)}
        # All at once where prompts may take several chunks: they are made of one length together.
        at_once = BATCH if family.large_encoder_names else len(distinct)
        parts = []
        for start in range(0, len(distinct), at_once):
            with torch.no_grad():
                part = family.conditioning(distinct[start : start + at_once])
            for value in part.values():
                if not value.isfinite().all():
                    gave = "NaN or infinite embeddings"
                    dtype = computed_in(value.dtype, value.device)
                    raise NonFinite.of("a text encoder", family.name, gave, dtype)
                self._device = value.device
            parts.append({name: value.cpu() for name, value in part.items()})
        self.cond = {name: _join([part[name] for part in parts]) for name in parts[0]}

    def __call__(self, prompts: list[str]) -> Cond:
        """Return the conditioning of the prompts; raise ``KeyError`` for an unknown one."""
        chosen = rows(self.cond, [self.row[prompt] for prompt in prompts])
        return {name: to_device(value, self._device) for name, value in chosen.items()}

    @contextmanager
    def used_by(self, family: Family) -> Iterator[None]:
        """Let the family look its prompts up here, while it draws them."""
        before, family.prompt_cache = family.prompt_cache, self
        try:
            yield
        finally:
            family.prompt_cache = before


def _join(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Join batches, [B, L, D] of different L padded with zeros to the longest."""
    if tensors[0].ndim < 3:
        return torch.cat(tensors)
    length = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([pad(tensor, (0, 0, 0, length - tensor.shape[1])) for tensor in tensors])

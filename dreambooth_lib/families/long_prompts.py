"""Encode prompts beyond a CLIP's 75 tokens in chunks, one after another along the sequence.

Each chunk has its own start and end token, as a short prompt has. Cross-attention reads a sequence
that is repeated as it reads it once, since every weight is split evenly among the copies: so
prompts of different lengths are repeated to a common one, and a short prompt among long ones means
what it means alone.
"""

from collections.abc import Callable, Sequence
from math import ceil, lcm
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Cond, Family


def chunks_of(family: "Family", prompts: Sequence[str]) -> list[int]:
    """Return how many chunks each prompt takes, at most ``family.prompt_chunks``."""
    tokenizers = [tokenizer for tokenizer, _ in family.tokenizers]

    def count(prompt: str) -> int:
        sizes = [len(_ids(t, prompt)) / (t.model_max_length - 2) for t in tokenizers]
        return min(family.prompt_chunks, max(1, ceil(max(sizes))))

    return [count(prompt) for prompt in prompts]


def how_to_read_more(most: int, chunks: int) -> str:
    """Return what to do for more of a prompt to be read, "" if nothing can be done."""
    return f"set prompt_chunks to {most} to read {most} times as much" if chunks < most else ""


def encode_in_chunks(
    family: "Family",
    prompts: list[str],
    encode_short: Callable[[list[str]], "Cond"],
    encode_ids: Callable[[list[torch.Tensor]], "Cond"],
) -> "Cond":
    """Encode prompts that may have several chunks; those of one chunk by ``encode_short``.

    ``encode_ids`` encodes token ids, [B, T] of each tokenizer. Of the tensors returned, [B, L, D]
    are sequences as long as the lengths' least common multiple, and [B, D] are the first chunk's.
    """
    counts = chunks_of(family, prompts)
    length = lcm(*counts)
    parts: list[Cond] = []
    order: list[int] = []
    for count in sorted({*counts}):
        places = [place for place, own in enumerate(counts) if own == count]
        group = [prompts[place] for place in places]
        if count == 1:
            cond = encode_short(group)
        else:
            ids = [chunk_ids(tokenizer, group, count) for tokenizer, _ in family.tokenizers]
            cond = {
                name: value.unflatten(0, (-1, count)).flatten(1, 2)
                if value.ndim == 3
                else value[::count]
                for name, value in encode_ids(ids).items()
            }
        parts.append({
            name: value.repeat(1, length // count, 1) if value.ndim == 3 else value
            for name, value in cond.items()
        })  # fmt: skip
        order += places
    back = torch.tensor(order).argsort()
    return {
        name: (joined := torch.cat([part[name] for part in parts]))[back.to(joined.device)]
        for name in parts[0]
    }


def chunk_ids(tokenizer: Any, prompts: Sequence[str], chunks: int) -> torch.Tensor:
    """Return the token ids of prompts, [B * chunks, T], with each prompt's chunks in a row."""
    room = tokenizer.model_max_length - 2
    rows = []
    for prompt in prompts:
        ids = _ids(tokenizer, prompt)
        for start in range(0, chunks * room, room):
            own = ids[start : start + room]
            padding = [tokenizer.pad_token_id] * (room - len(own))
            rows.append([tokenizer.bos_token_id, *own, tokenizer.eos_token_id, *padding])
    return torch.tensor(rows)


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    ids: list[int] = tokenizer(
        prompt, add_special_tokens=False, truncation=False, verbose=False
    ).input_ids
    return ids

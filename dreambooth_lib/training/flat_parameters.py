"""Trained weights side by side in a few flat tensors, so that one call updates many of them.

An optimizer that steps each weight by itself spends a step on launching kernels: Stable Diffusion
1.5 has 686 weights. Here each weight becomes a view of a bucket's tensor. Its gradient is copied
beside the others' when they are needed together.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

#: Numbers to which each weight's place is rounded up. 8-bit AdamW scales so many moments together,
#: so that a block never spans two weights and its moments are those of a weight by itself.
BLOCK = 256
#: Weights of fewer numbers have moments in float32, as in bitsandbytes.
LEAST_8BIT = 4096

#: Of an optimizer's state, by torch's and bitsandbytes' names, what a bucket has once, and what it
#: has once for each ``BLOCK``. It has other single numbers once, too; all else has the weights'
#: shape.
_SHARED = {"step", "qmap1", "qmap2"}
_BY_BLOCK = {"absmax1", "absmax2"}
#: The 8-bit code of 0 in bitsandbytes' signed map, which the first moments have.
_CODE_OF_ZERO = 127


class Bucket:
    """Weights of one dtype, one after the other in ``weights`` [N]; the rest of N is zero.

    ``stepped`` is what the optimizer steps: the weights themselves, or for bfloat16 ones a float32
    stand-in, which is empty except while it is being stepped.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.parameters = parameters
        sizes = [parameter.numel() for parameter in parameters]
        self.places: list[slice] = []
        end = 0
        for size in sizes:
            self.places.append(slice(end, end + size))
            end += -(-size // BLOCK) * BLOCK
        first = parameters[0]
        self._zeros = first.detach().new_zeros(BLOCK)
        self.weights = self._joined([parameter.detach() for parameter in parameters])
        for parameter, view in zip(parameters, self.split(self.weights), strict=True):
            parameter.data = view
        own = self.weights if first.dtype is torch.float32 else self.weights.new_empty(0).float()
        self.stepped = torch.nn.Parameter(own)
        self._gradients: torch.Tensor | None = None

    @property
    def has_8bit_moments(self) -> bool:
        """Return whether 8-bit AdamW keeps its moments in 8 bits."""
        return self.parameters[0].numel() >= LEAST_8BIT

    def keep_gradients(self) -> None:
        """Let the backward pass add to gradients that lie side by side, and are never freed.

        On a CPU that costs no time, and fresh memory at each step would. On a GPU it would cost
        the memory of all gradients during the forward pass.
        """
        self._gradients = torch.zeros_like(self.weights)
        for parameter, view in zip(self.parameters, self.split(self._gradients), strict=True):
            parameter.grad = view

    def take_gradients(self) -> torch.Tensor:
        """Return the parameters' gradients [N] in float32, and free their own; none counts as 0."""
        if self._gradients is not None:
            return self._gradients
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.parameters
        ]
        for parameter in self.parameters:
            parameter.grad = None
        return self._joined(gradients).float()

    def clear_gradients(self) -> None:
        """Make room for the next step's gradients, whether these were taken or not."""
        self.stepped.grad = None
        if self._gradients is not None:
            self._gradients.zero_()
            return
        for parameter in self.parameters:
            parameter.grad = None

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return the parts of a tensor [N] as views, in the parameters' order and shapes."""
        return [
            flat[place].view(parameter.shape)
            for parameter, place in zip(self.parameters, self.places, strict=True)
        ]

    def split_state(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """Return an optimizer's state of the bucket as one for each parameter, of views."""

        def part(name: str, value: Any, number: int) -> Any:
            if isinstance(value, dict):
                return {inner: part(inner, v, number) for inner, v in value.items()}
            place, shape = self.places[number], self.parameters[number].shape
            if name in _SHARED or not isinstance(value, torch.Tensor) or value.ndim == 0:
                return value
            if name in _BY_BLOCK:
                return value[place.start // BLOCK : -(-place.stop // BLOCK)]
            return value[place].view(shape)

        return [part("", state, number) for number in range(len(self.parameters))]

    def join_state(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Reverse :meth:`split_state`."""

        def joined(name: str, values: list[Any]) -> Any:
            if isinstance(values[0], dict):
                return {inner: joined(inner, [v[inner] for v in values]) for inner in values[0]}
            if name in _SHARED or not isinstance(values[0], torch.Tensor):
                return values[0]
            # The moments of a weight that is a single number are, too, but not those beside it.
            if all(value.ndim == 0 for value in values) and any(p.ndim for p in self.parameters):
                return values[0]
            if name in _BY_BLOCK:
                return torch.cat(values)
            is_coded = name == "state1" and values[0].dtype is torch.uint8
            return self._joined(values, _CODE_OF_ZERO if is_coded else 0)

        return joined("", list(parts))

    def _joined(self, tensors: Iterable[torch.Tensor], padding: int = 0) -> torch.Tensor:
        """Return tensors of the parameters' shapes as one [N], with ``padding`` between them.

        On a GPU ``cat`` joins a hundred tensors or so in a launch.
        """
        pieces = []
        for tensor in tensors:
            pieces.append(tensor.reshape(-1))
            if rest := -tensor.numel() % BLOCK:
                like = (tensor.dtype, tensor.device) == (self._zeros.dtype, self._zeros.device)
                is_ready = padding == 0 and like  # as for gradients, which must not cost a launch
                fill = self._zeros[:rest] if is_ready else tensor.new_full([rest], padding)
                pieces.append(fill)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def make_buckets(
    parameters: Iterable[torch.nn.Parameter],
    largest: int,
    apart: Collection[torch.nn.Parameter] = (),
) -> list[Bucket]:
    """Lay parameters out in buckets of at most ``largest`` numbers, or of a single larger one.

    The last parameters come first, as their gradients do. Those in ``apart`` share no bucket with
    others.
    """
    buckets: list[list[torch.nn.Parameter]] = []
    open_buckets: dict[tuple[torch.dtype, bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in reversed(list(parameters)):
        kind = (parameter.dtype, parameter.numel() >= LEAST_8BIT, parameter in apart)
        bucket = open_buckets.get(kind)
        if bucket is None or sum(p.numel() for p in bucket) + parameter.numel() > largest:
            bucket = open_buckets[kind] = []
            buckets.append(bucket)
        bucket.append(parameter)
    return [Bucket(bucket) for bucket in buckets]

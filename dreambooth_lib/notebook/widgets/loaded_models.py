"""Keep the models that playgrounds draw with in memory, as many of them as fit."""

from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.training.drawing_memory import NotEnoughMemory
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import load_source

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family

#: What draws: a run, a base, a config for its base, or a run with the step of a checkpoint.
Source = Run | TrainConfig | str | tuple[Run, int]

#: The models of the last playground that drew. A notebook keeps every playground that a cell ever
#: made, so that models held by each would stay in memory.
LOADED: "dict[Source, Family]" = {}


def release_models() -> None:
    """Free the models that playgrounds have loaded."""
    release_all_but(())


def release_all_but(sources: Collection[Source]) -> None:
    """Free the loaded models, but for those of these sources."""
    for source in set(LOADED) - set(sources):
        del LOADED[source]
    gpu_memory.free_memory()


def load_together(sources: Collection[Source], prompts: list[str]) -> None:
    """Free all other models, and load these sources, as many of them as fit into memory."""
    release_all_but(sources)
    with suppress(NotEnoughMemory):
        for source in sources:
            if source not in LOADED:
                LOADED[source] = _load(source, prompts)


def load(source: Source, prompts: list[str]) -> None:
    """Load a source if it is not loaded, or not with these prompts.

    Where it does not fit into memory beside the others, they are freed first.
    """
    if source in LOADED:
        cache = LOADED[source].prompt_cache
        if cache is None or set(prompts) <= cache.row.keys():
            return
        release_all_but(set(LOADED) - {source})
    with suppress(NotEnoughMemory):
        LOADED[source] = _load(source, prompts)
    if source not in LOADED:
        release_models()
        LOADED[source] = _load(source, prompts)


def _load(source: Source, prompts: list[str]) -> "Family":
    run, at = source if isinstance(source, tuple) else (source, None)
    return load_source(run, at, prompts)

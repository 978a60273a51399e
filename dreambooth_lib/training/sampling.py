"""Generate images from a base or a run by seed, through its own diffusers pipeline."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import shown
from dreambooth_lib.core.errors import InputError
from dreambooth_lib.core.processes import drawing_gpu
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.captions import warning_of_length
from dreambooth_lib.families import loading
from dreambooth_lib.training.drawing_memory import options_that_fit
from dreambooth_lib.training.image_sizes import fit_to_run
from dreambooth_lib.training.native_precision import dtype_of, native_precision
from dreambooth_lib.training.runs import Run, RunError, resume
from dreambooth_lib.training.trainable import drawing_config, load_at_checkpoint, load_base

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from dreambooth_lib.families.base import Family
    from dreambooth_lib.families.inference_settings import Inference


@dataclass(frozen=True)
class Sample:
    """An image, its prompt and its seed."""

    prompt: str
    seed: int
    image: "Image.Image"


def fill(prompt: str, subject: Subject | None) -> str:
    """Put the subject's identifier in place of each ``{}``, as in ``a {} dog on the beach``.

    Raises ``InputError`` for a prompt with ``{}`` if there is no subject.
    """
    if "{}" not in prompt:
        return prompt
    if subject is None:
        raise InputError(
            f"the prompt '{prompt}' has {{}} for an identifier, but the base has no subject; "
            "sample from a run, or write the prompt out."
        )
    return prompt.replace("{}", subject.identifier)


def sample(
    source: "Run | Family | str",
    prompts: list[str],
    seeds: list[int],
    *,
    at: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    batch_size: int | None = None,
) -> list[Sample]:
    """Generate every prompt with every seed, prompts outermost.

    ``source`` is a finished run, a run's checkpoint of step ``at``, a loaded family, or a base as
    in ``TrainConfig.base``. Each image's noise comes from its seed alone, whatever the batch size:
    base and tuned model start from the same noise at the same seed. ``steps`` (inference steps) and
    ``guidance_scale`` default to :func:`inference_settings`. A negative prompt that the base does
    not use is ignored, with a warning. Raises ``InputError`` for what cannot be generated, and
    :class:`RunError` for a run that has not finished.
    """
    return list(
        iter_samples(
            source, prompts, seeds, at=at, steps=steps, guidance_scale=guidance_scale,
            negative_prompt=negative_prompt, batch_size=batch_size,
        )
    )  # fmt: skip


def iter_samples(
    source: "Run | Family | str",
    prompts: list[str],
    seeds: list[int],
    *,
    at: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    batch_size: int | None = None,
) -> Iterator[Sample]:
    """Generate as :func:`sample` does, and yield each batch's images as soon as they are ready."""
    _check_asked(prompts, seeds, steps)
    subject = source.config.subject if isinstance(source, Run) else None
    filled = [fill(prompt, subject) for prompt in prompts]
    family = load_source(source, at, [*filled, negative_prompt])
    own = inference_settings(source)
    steps = own.steps if steps is None else steps
    schedule = family.pipeline.scheduler.config
    most = schedule.get("original_inference_steps") or schedule["num_train_timesteps"]
    if steps > most:
        raise InputError(
            f"steps is {steps}, but '{family.name}' supports at most {most}; lower it."
        )
    guidance_scale = own.guidance_scale if guidance_scale is None else guidance_scale
    batch_size = batch_size or family.default_batch_size
    if negative_prompt and not family.reads_negative(guidance_scale):
        warnings.warn(
            f"The negative prompt '{negative_prompt}' is ignored: '{family.name}' does not use one "
            f"at guidance scale {guidance_scale:g}.",
            stacklevel=3,
        )
        negative_prompt = ""
    for prompt in (*filled, negative_prompt):
        if message := warning_of_length(prompt, family.tokenizers, family.how_to_read_more):
            warnings.warn(message, stacklevel=3)
    pairs = [(prompt, seed) for prompt in filled for seed in seeds]
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        images = family.generate(part, steps, guidance_scale, negative_prompt)
        yield from (Sample(p, s, image) for (p, s), image in zip(part, images, strict=True))


def _check_asked(prompts: object, seeds: object, steps: object) -> None:
    """Raise ``InputError`` for prompts, seeds or inference steps that no base can take."""
    if isinstance(prompts, str):
        raise InputError(f"prompts is the text '{prompts}'; give a list of prompts.")
    if steps is not None and not (isinstance(steps, Integral) and int(steps) >= 1):
        raise InputError(f"steps is {steps!r}; give a whole number of 1 or more.")
    if not isinstance(seeds, Collection) or not all(
        isinstance(seed, Integral) and 0 <= int(seed) < 2**63 for seed in seeds
    ):
        raise InputError(
            f"seeds is {shown(seeds)}; give a list of whole numbers from 0 to 2**63 - 1."
        )


def check_counts(plan: object, *names: str) -> None:
    """Raise ``InputError`` where one of a plan's counts is below 1; None is the base's own."""
    for name in names:
        value = getattr(plan, name)
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; give 1 or more.")


def inference_settings(source: "Run | Family | TrainConfig | str") -> "Inference":
    """Return a source's inference steps and guidance scale: its config's, or else its base's own.

    Those of a config's ``draw_base`` come before its base's.

    Raises ``BaseError`` for a missing base.
    """
    if not isinstance(source, Run | TrainConfig | str):
        return source.inference
    if isinstance(source, str):
        return loading.base_inference(source)
    config = drawing_config(source.config if isinstance(source, Run) else source)
    if isinstance(source, Run) and source.finished and source.config.draw_base is None:
        own = loading.base_inference(str(source.folder))  # its base may have been deleted
    else:
        own = loading.base_inference(config.base, config.revision, config.prediction_type)
    scale, steps = config.guidance_scale, config.validation_inference_steps
    return replace(
        own,
        guidance_scale=own.guidance_scale if scale is None else scale,
        validation_steps=own.validation_steps if steps is None else steps,
    )


def load_source(
    source: "Run | Family | TrainConfig | str",
    at: int | None = None,
    prompts: Collection[str] | None = None,
) -> "Family":
    """Load a source to generate images from, on the GPU in half precision if there is one.

    For a config, load its base. Where RAM is too small for a large base's text encoders and
    denoiser together, the family knows only ``prompts``, as ``load_pretrained`` describes. Raises
    as :func:`sample` does, and :class:`NotEnoughMemory` where it would not fit at all.
    """
    if not isinstance(source, Run | TrainConfig | str):
        return source
    if isinstance(source, Run) and at is None:
        _check_pipeline(source)
    dtype = sampling_dtype()
    more = options_that_fit(source, dtype, at, prompts)
    if isinstance(source, str):
        return _place(loading.load_model(source, dtype=dtype, trained=(), **more))
    if isinstance(source, TrainConfig):
        family = load_base(source, dtype, **more)
    elif at is not None:
        family = load_at_checkpoint(source, at, dtype, **more)
    else:
        options = _options([source.config]) | {"dtype": dtype} | more
        draw_base, folder = source.config.draw_base, str(source.folder)
        if draw_base is not None:
            family = loading.compose({folder: 1.0}, on=draw_base, **options)
        else:
            family = loading.load_model(folder, **options)
    fit_to_run(family, source, at)
    return _place(family)


def _options(configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """Return the options to load what runs trained, to generate as they did.

    Of several runs the longest prompts are read, and images are of the base's own size where
    theirs differ.
    """
    sides = {config.resolution for config in configs}
    return {
        "resolution": sides.pop() if len(sides) == 1 else None,
        "prompt_chunks": max((config.prompt_chunks for config in configs), default=1),
        "trained": (),
    }


def _check_pipeline(run: Run) -> None:
    """Raise :class:`RunError` for a run without a pipeline; warn if it is of fewer steps."""
    if not run.has_pipeline:
        steps = ", ".join(map(str, run.checkpoints()))
        instead = f", or sample a checkpoint, of step {steps}" if steps else ""
        raise RunError(f"{run.folder} has not finished; train it to its end{instead}.")
    if not run.finished:
        warnings.warn(
            f"{run.folder} has more steps to train; these images come from its earlier pipeline.",
            stacklevel=2,
        )


def compose(loras: Mapping[Run | str, float]) -> "Family":
    """Load a base with several LoRAs on it: runs or their folders, each with its weight.

    Prompts name the subjects by their identifiers, as in "a ohwx dog beside a qxy cat"; weight 1 is
    a LoRA as it was trained. Raises ``BaseError`` if they were not all trained on one base.
    """
    if not isinstance(loras, Mapping):
        raise InputError(f"loras is {loras!r}; give a dict of runs with weights, {{run: 1.0}}.")
    folders = {str(s.folder if isinstance(s, Run) else s): w for s, w in loras.items()}
    configs = [
        resume(folder).config for folder in folders if (Path(folder) / "config.toml").exists()
    ]
    options = _options(configs) | {"dtype": sampling_dtype()}
    for folder in list(folders)[:1]:  # all are of one base
        options_that_fit(folder, options["dtype"])
    return _place(loading.compose(folders, **options))


def sampling_dtype() -> "torch.dtype":
    """Return the dtype to generate images in: half precision on a GPU, float32 on a CPU."""
    device = drawing_gpu()
    return dtype_of("no" if device is None else native_precision("auto", device))


def _place(family: "Family") -> "Family":
    """Move a family to the GPU if there is one, or offload it if it would fill over half of that.

    So generating takes no more of a GPU than training, which offloads what it does not need.
    """
    import torch

    device, pipeline = drawing_gpu(), family.pipeline
    if device is None:
        return family
    modules = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]
    weights = [weight for module in modules for weight in module.state_dict().values()]
    on_gpu = sum(w.nbytes for w in weights if w.is_cuda)  # a quantized base is there already
    free, _ = gpu_memory.gpu_bytes(device)
    if sum(w.nbytes for w in weights) > (free + on_gpu) / 2:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return family

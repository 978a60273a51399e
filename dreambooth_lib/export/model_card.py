"""Write a model card: what the model is, how it was trained, and the code that loads it."""

import re
from pathlib import Path

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import KitError, printable
from dreambooth_lib.core.files import replace_file, save_png
from dreambooth_lib.core.user_text import markdown, python_string
from dreambooth_lib.data import images
from dreambooth_lib.export import hub
from dreambooth_lib.families import clip_skip, loading, one_file, peft_adapters, textual_inversion
from dreambooth_lib.families.prediction_type import V_PREDICTION
from dreambooth_lib.families.pretrained import DTYPE
from dreambooth_lib.figures import image_grids, plots
from dreambooth_lib.training import best_checkpoint, image_sizes, validation_record
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import inference_settings

_MOST_PHOTOS = 60  #: that a card shows

_LOAD_LORA = """\
# If this raises an ImportError about torchao (as on Colab), run: pip uninstall -y torchao
pipeline.load_lora_weights({}, weight_name="{}")"""
_LOAD_ADAPTER = """\
adapter = PeftModel.from_pretrained(pipeline.{part}, {model}, subfolder="{part}")
pipeline.{part} = adapter.merge_and_unload()"""


def write_card(run: Run, step: int, folder: str | Path, photos: bool = False) -> Path:
    """Write ``README.md`` and its images into a model's folder; return the card's path.

    ``step`` is the checkpoint that the folder holds. ``samples.png`` shows its validation images,
    ``curves.png`` the validation scores of the run and, only if ``photos`` is true, ``photos.png``
    the instance images. Raises ``RunError`` if the run has no validation at that step, and
    ``DataError`` if the photos cannot be read.
    """
    folder, subject = Path(folder), run.config.subject
    shown = validation_record.load_images(run, step)
    heads = [f"step {step}", f"class: {subject.class_noun}"]
    samples = image_grids.matrix([subject.token], heads, [[shown.subject, shown.class_images]])
    save_png(samples, folder / "samples.png")
    plots.validation_curves(validation_record.history(run), folder / "curves.png")
    if photos:
        instance_images = images.read_photos(subject)[:_MOST_PHOTOS]
        grid = image_grids.grid([photo.image for photo in instance_images], 6)
        save_png(grid, folder / "photos.png")
    replace_file(folder / "README.md", _card(run, step, photos).encode())
    return folder / "README.md"


def usage(run: Run, model: str | Path, base: str = "", dtype_name: str = DTYPE) -> str:
    """Return Python that generates an image of a run's subject with plain diffusers.

    It computes in half precision on a GPU and in float32 elsewhere, with the base's own inference
    steps and guidance scale. ``model`` is a folder or, if there is none of that name, a name on
    the Hub; ``base`` says where a LoRA's base is if not where the run had it. Raises ``BaseError``
    if the run trained a token, or an adapter other than LoRA, and its base is missing.
    ``dtype_name`` is what a pipeline's loader calls the dtype, by default in this diffusers.
    """
    config = run.config
    lora = config.method == "lora"
    loaded_first = (base or config.base) if lora else str(model)
    load = _load_lines(_adapted(config), model) if lora else []
    if lora and (below := _loras_below(config)):
        elsewhere = bool(base) and not Path(base).exists()
        loaded_first = loading.resolve(config.base, config.revision).name
        if elsewhere and Path(loaded_first).is_absolute():
            loaded_first = Path(loaded_first).name
        shown = _names_of(below) if elsewhere else [b.path for b in below]
        load = [*_lines_below(below, shown), *load]
    if config.train_token:
        family = loading.resolve(config.base, config.revision).family
        load += textual_inversion.usage_lines(family, model, config.subject.identifier)
    pipeline_class, scheduler, method = "DiffusionPipeline", tuple[str, ...](), "from_pretrained"
    place, options, imports = "", "", list[str]()
    try:
        if lora:
            asked = config.base, config.revision, config.variant, config.prediction_type
            first = loading.resolve(*asked)
            named = [(name, python_string(value)) for name, value in first.hub.items() if value]
            options = "".join(f", {name}={value}" for name, value in named)
            revision = first.loras[0].trained_on["revision"] if first.loras else config.revision
            file = None if Path(loaded_first).is_dir() else _one_file(first.name, revision)
            if file is not None:
                pipeline_class, method = first.index["_class_name"], "from_single_file"
                loaded_first = file.address or loaded_first
                if file.revision:  # from_single_file would look for the base's configs there, too
                    imports = ["from huggingface_hub import hf_hub_download"]
                    words = map(python_string, (file.repository, file.file, file.revision))
                    place = "hf_hub_download({}, {}, revision={})".format(*words)
            elif loaded_first != "toybox" and (not base or Path(base).exists()):
                loaded_first = loading.locate(loaded_first)  # of a run, its pipeline
            scheduler = _scheduler_lines(first, file is not None)
            scheduler += clip_skip.usage_lines(first, config.clip_skip)
        inference = inference_settings(run)
        trained = str(run.folder) if run.finished else config.base
        dtype = loading.resolve(trained, config.revision).family.card_dtype
        settings = (
            f", num_inference_steps={inference.steps}, guidance_scale={inference.guidance_scale:g}"
        )
        if size := image_sizes.size_of_images(run):
            settings += ", width={}, height={}".format(*size)
    except loading.BaseError:  # a LoRA's base is missing: leave it to the pipeline's defaults
        dtype, settings = "float16", ""
    if loaded_first == "toybox":
        imports = ["from dreambooth_lib.families import loading"]
        place = 'loading.locate("toybox")'
    place = place or python_string(loaded_first)
    prompt = python_string(f"{config.subject.instance_prompt} on the beach")
    given = f"{dtype_name}=torch.{dtype} if gpu else torch.float32"
    return "\n".join([
        "import torch",
        f"from diffusers import {pipeline_class}",
        *imports,
        "gpu = torch.cuda.is_available()",
        f"pipeline = {pipeline_class}.{method}({place}, {given}{options})",
        *scheduler,
        *load,
        'pipeline.to("cuda" if gpu else "cpu")',
        f"pipeline({prompt}{settings}).images[0]",
    ])  # fmt: skip


def _adapted(config: TrainConfig) -> list[str]:
    """Return the parts of a pipeline that have an adapter of peft; none for a LoRA.

    Raises ``BaseError`` for an adapter whose base is missing.
    """
    if config.adapter is None:
        return []
    base = loading.resolve(config.base, config.revision)
    encoders = base.family.encoder_names if config.train_text_encoder else ()
    return [base.family.denoiser_name, *(name for name in encoders if name in base.index)]


def _load_lines(parts: list[str], model: str | Path) -> list[str]:
    """Return Python lines that load a LoRA, or other adapters of ``parts``, into a ``pipeline``."""
    if not parts:
        return [_LOAD_LORA.format(python_string(model), loading.LORA_FILE)]
    lines = [_LOAD_ADAPTER.format(part=part, model=python_string(model)) for part in parts]
    return ["from peft import PeftModel", *lines]


def _one_file(base: str, revision: str | None = None) -> one_file.OneFile | None:
    """Return the file that a base is, which may be gone; None for any other base."""
    try:
        return one_file.parse(base, revision)
    except KitError:
        return one_file.OneFile(path=Path(base))


def _scheduler_lines(base: loading.ResolvedBase, in_one_file: bool) -> tuple[str, ...]:
    """Return Python that gives a ``pipeline`` the scheduler of its base, where it has another."""
    if base.prediction_type is None and not (
        in_one_file and base.scheduler.get("prediction_type") == V_PREDICTION
    ):
        return ()
    config, names = base.scheduler, ("rescale_betas_zero_snr", "timestep_spacing", "clip_sample")
    kind, more = config["_class_name"], {"prediction_type": config.get("prediction_type")}
    more |= {name: config[name] for name in names if name in config}
    said = ", ".join(f"{name}={value!r}" for name, value in more.items())
    return (
        f"from diffusers import {kind}",
        f"pipeline.scheduler = {kind}.from_config(pipeline.scheduler.config, {said})",
    )


def _loras_below(config: TrainConfig) -> tuple[loading.Lora, ...]:
    """Return the LoRAs that a run was trained on; none where its base is missing."""
    try:
        return loading.resolve(config.base, config.revision).loras
    except loading.BaseError:
        return ()


def _names_of(loras: tuple[loading.Lora, ...]) -> list[str]:
    """Return the names of LoRAs' runs or folders, without this machine's paths."""
    return [Path(lora.path.removesuffix("/pipeline")).name for lora in loras]


def _lines_below(loras: tuple[loading.Lora, ...], shown: list[str]) -> list[str]:
    """Return Python lines that merge the LoRAs that a LoRA was trained on into a ``pipeline``."""
    lines = []
    for lora, model in zip(loras, shown, strict=True):
        if lora.token is not None:
            family = loading.resolve(lora.path).family
            lines += textual_inversion.usage_lines(family, model, lora.token)
        parts = peft_adapters.parts(lora.path)
        lines += _load_lines(parts, model)
        if not parts:
            lines.append("pipeline.fuse_lora(components=pipeline._lora_loadable_modules)")
            lines.append("pipeline.unload_lora_weights()")
    return lines


def _code_span(name: str) -> str:
    """Return a name as Markdown's code, in which nothing but a backtick is markup."""
    return f"`{printable(name).replace('`', '_')}`"


def _card(run: Run, step: int, photos: bool) -> str:
    from huggingface_hub import ModelCardData

    config, subject, noun = run.config, run.config.subject, markdown(run.config.subject.class_noun)
    lora, below = config.method == "lora", _loras_below(config)
    origin = loading.resolve(config.base, config.revision).name if below else config.base
    file = _one_file(origin)
    if file is not None:
        repository, name = file.repository or "", file.name
    else:
        local = Path(origin).is_absolute() or Path(loading.locate(origin)).exists()
        repository, name = "" if local else origin, Path(origin).name
    # A local path would reveal the machine's folders and mean nothing elsewhere.
    base = "/".join(part for part in (repository, file and file.file) if part) or name
    # All of diffusers' versions so far take this name, and those of its readers are not known.
    code = usage(run, "this model's name", base, "torch_dtype")
    kinds = [config.adapter or "lora"] if lora else []
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    header = ModelCardData(
        base_model=repository or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["dreambooth", "text-to-image", "diffusers", *kinds],
        **(hub.licence_of(repository) if repository else {}),
    )
    rows = {row.step: row for row in validation_record.history(run)}
    ratios, ceiling = best_checkpoint.ratios_of(rows[step], rows[0]), rows[step].reference_fidelity
    scores = best_checkpoint.describe_ratios(ratios, ceiling)
    trained = "denoiser and text encoder" if config.train_text_encoder else "denoiser"
    merged = " and ".join(map(_code_span, _names_of(below)))
    on_loras = f" with {merged}, which this folder does not hold" if lora and below else ""
    shown = _code_span(base)
    kind = "LoRA" if config.adapter is None else f"{config.adapter} adapter of peft"
    size = "rank" if config.adapter is None else "size"
    what = f"A {kind} for {shown}{on_loras}, trained" if lora else f"{shown}, fine-tuned"
    where = "its name on the Hub" + ("" if config.train_token else " or the path of its folder")
    return f"""---
{header.to_yaml()}
---

# {markdown(subject.token)}

{what} with DreamBooth ([arXiv 2208.12242](https://arxiv.org/abs/2208.12242)) on a few photos of
one {noun}. Write “{markdown(subject.token)}” in a prompt to generate images of it.

![generated images of the subject and of its class](samples.png)
![validation scores during training](curves.png)
{"![the photos it was trained on](photos.png)" if photos else ""}

## Use

{fence}python
{code}
{fence}

Replace “this model's name” with {where}.

## Training

- Checkpoint: step {step} of {config.steps}.
- Measured on validation images: {scores}.
- Trained weights: {trained}{f", as a {kind} of {size} {config.lora_rank}" if lora else ""}.
- Settings: learning rate {config.learning_rate:g}, batch size {config.batch_size},
  {_prior(config)}.

## Licence

The licence and terms of the base model apply to this model too. Before you share it, ask the
people in the photos, and the owners of what they show, for their consent.
"""


def _prior(config: TrainConfig) -> str:
    if not config.prior_weight:
        return "no prior preservation"
    weight = f"λ {config.prior_weight:g}"
    if config.keep_class is not None:
        weight = f"an adaptive λ (target class loss ratio {config.keep_class:.0%})"
    prior = f"prior preservation with {weight}"
    of_class = f"“{markdown(config.subject.class_prompt)}”"
    if config.prior_prompts is not None:
        of_class += f" and {len(config.prior_prompts)} other prompts"
    if config.prior == "distilled":
        return f"{prior} on the base model's own predictions for {of_class}"
    if config.class_folder is not None:
        return f"{prior} on the trainer's own class images"
    if config.distills:
        prior += ", the base model's own predictions as targets,"
    return f"{prior} on {config.class_images} class images of {of_class}"

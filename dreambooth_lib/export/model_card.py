"""A tuned model's card: what it is, how it was made, and the lines that draw with it."""

from pathlib import Path
from typing import Any

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.hub_token import hub_token
from dreambooth_lib.data import images
from dreambooth_lib.families import loading, textual_inversion
from dreambooth_lib.figures import image_grids, plots
from dreambooth_lib.training import best_checkpoint, validation_record
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import inference_settings

_LOAD_LORA = """\
# If this raises an ImportError about torchao (as on Colab), run: pip uninstall -y torchao
pipeline.load_lora_weights("{}", weight_name="{}")"""


def write_card(run: Run, step: int, folder: str | Path, photos: bool = False) -> Path:
    """Write ``README.md`` and its pictures into a pipeline's folder; gives the card's path.

    The card says how to draw the subject, what it was trained on and with, and how the pictures of
    ``step``, the checkpoint that the folder holds, scored; ``samples.png`` has the pictures and
    ``curves.png`` the looks at the run. Only if ``photos`` is asked for does ``photos.png`` show
    what it was trained on. Raises ``RunError`` where the run has no look at that step, and
    ``DataError`` where the photos that are asked for cannot be read.
    """
    from dreambooth_lib.core.files import replace_file, save_png

    folder, subject = Path(folder), run.config.subject
    seen = validation_record.load_images(run, step)
    heads = [f"at step {step}", "others of its class"]
    page = image_grids.matrix([subject.token], heads, [[seen.subject, seen.class_images]])
    save_png(page, folder / "samples.png")
    plots.validation_curves(validation_record.history(run), folder / "curves.png")
    if photos:
        shown = [photo.image for photo in images.read_pictures(subject.pictures)]
        save_png(image_grids.grid(shown, 6), folder / "photos.png")
    replace_file(folder / "README.md", _card(run, step, photos).encode())
    return folder / "README.md"


def usage(run: Run, model: str | Path, base: str = "") -> str:
    """Return the Python that draws a run's subject by plain diffusers, its model at ``model``.

    On a GPU in half precision and else in float32, in the steps and with the guidance of the base.
    ``model`` is a folder or, if there is none, a name on the Hub; ``base`` is where that of a LoRA
    is, if not where the run had it. Raises ``BaseError`` where the base of a run that learnt a new
    word is gone.
    """
    config = run.config
    lora = config.method == "lora"
    first = (base or config.base) if lora else model
    load = [_LOAD_LORA.format(model, loading.LORA_FILE)] if lora else []
    if config.train_token:
        family = loading.resolve(config.base, config.revision).family
        load += textual_inversion.usage_lines(family, model, config.subject.identifier)
    try:
        own = inference_settings(run)
        where = str(run.folder) if run.finished else config.base
        dtype = loading.resolve(where, config.revision).family.card_dtype
        settings = f", num_inference_steps={own.steps}, guidance_scale={own.guidance_scale:g}"
    except loading.BaseError:  # a LoRA's base that is gone; the pipeline's own will have to do
        dtype, settings = "float16", ""
    # diffusers calls it dtype since 0.40, and takes this name from 0.36 to 0.42 at least.
    given = f"torch_dtype=torch.{dtype} if gpu else torch.float32"
    return "\n".join([
        "import torch",
        "from diffusers import DiffusionPipeline",
        "gpu = torch.cuda.is_available()",
        f'pipeline = DiffusionPipeline.from_pretrained("{first}", {given})',
        *load,
        'pipeline.to("cuda" if gpu else "cpu")',
        f'pipeline("{config.subject.instance_prompt} on the beach"{settings}).images[0]',
    ])  # fmt: skip


def licence_of(base: str) -> dict[str, Any]:
    """Return the licence of a base's card on the Hub, as a card's fields; empty if none is known.

    Nothing is raised for a Hub that does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    network: Any = HfHubHTTPError.__bases__  # of its HTTP library, which is one of two
    try:
        found = HfApi(token=hub_token() or False).model_info(base, timeout=5.0)
    except (OSError, *network):
        return {}
    card: Any = found.card_data or {}
    fields = {name: card.get(name) for name in ("license", "license_name", "license_link")}
    if not str(fields["license_link"]).startswith("http"):  # a file that this model has not
        del fields["license_link"]
    return {name: value for name, value in fields.items() if isinstance(value, str)}


def _card(run: Run, step: int, photos: bool) -> str:
    from huggingface_hub import ModelCardData

    config, subject = run.config, run.config.subject
    of_hub = not Path(loading.locate(config.base)).exists()
    lora = config.method == "lora"
    # A folder's path would tell of the machine, and be of no use elsewhere.
    base = config.base if of_hub else Path(config.base).name
    header = ModelCardData(
        base_model=config.base if of_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["dreambooth", "text-to-image", "diffusers", *(["lora"] if lora else [])],
        **(licence_of(config.base) if of_hub else {}),
    )
    rows = {row.step: row for row in validation_record.history(run)}
    fidelity, adherence, kept = best_checkpoint.ratios_of(rows[step], rows[0])
    trained = "denoiser and text encoder" if config.train_text_encoder else "denoiser"
    how = f", by LoRA of rank {config.lora_rank}" if lora else ""
    what = f"A LoRA of `{base}`, to be loaded on top of it" if lora else f"`{base}` personalised"
    code = usage(run, "this model's name", base).replace("\n", "\n    ")
    return f"""---
{header.to_yaml()}
---

# {subject.token}

{what}, by DreamBooth ([arXiv 2208.12242](https://arxiv.org/abs/2208.12242)):
“{subject.token}” is one {subject.class_noun}, learnt from a few photos.

![what was learnt, and its class](samples.png)
![the looks at it while it trained](curves.png)
{"![the photos](photos.png)" if photos else ""}

    {code}

- Step {step} of {config.steps}: pictures of the subject are {fidelity:.0%} as close to the photos
  as those to each other, follow prompts {adherence:.0%} as well as the base's, and {kept:.0%} of
  the class is as it was.
- Trained: {trained}{how}; learning rate {config.learning_rate:g}, {config.batch_size} photos an
  update; {_prior(config)}.
- The base's licence and terms hold for this model too. Ask whoever is in the photos or owns what
  they show before you share it.
"""


def _prior(config: TrainConfig) -> str:
    if not config.prior_weight:
        return "no prior preservation"
    by = f"prior preservation with λ {config.prior_weight:g}"
    if config.prior == "distilled":
        return f"{by}, by the base's own predictions of “{config.subject.class_prompt}”"
    if config.class_folder is not None:
        return f"{by} and the trainer's own class images"
    return f"{by} and {config.class_images} class images of “{config.subject.class_prompt}”"

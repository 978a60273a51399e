"""A tuned model for others: its card, and the way to the Hub."""

from pathlib import Path
from typing import Any

from dreambooth_lib import choice, colab, families, pages, pictures, plots, watch
from dreambooth_lib.config import TrainConfig
from dreambooth_lib.families import tokens
from dreambooth_lib.runs import Run
from dreambooth_lib.sampling import inference_of

#: Seconds until a Hub that does not answer is not asked for the base's licence.
TIMEOUT = 5.0
_LOAD_LORA = """\
# If this raises an ImportError about torchao (as on Colab), run: pip uninstall -y torchao
pipeline.load_lora_weights("{}", weight_name="{}")"""


class HubError(ValueError):
    """What the Hub did not take."""


def write_card(run: Run, step: int, folder: str | Path, photos: bool = False) -> Path:
    """Write ``README.md`` and its pictures into a pipeline's folder; gives the card's path.

    The card says how to draw the subject, what it was trained on and with, and how the pictures of
    ``step``, the checkpoint that the folder holds, scored; ``samples.png`` has the pictures and
    ``curves.png`` the looks at the run. Only if ``photos`` is asked for does ``photos.png`` show
    what it was trained on. Raises ``RunError`` where the run has no look at that step, and
    ``DataError`` where the photos that are asked for cannot be read.
    """
    from dreambooth_lib.state import replace_file, save_png

    folder, subject = Path(folder), run.config.subject
    seen = watch.drawn(run, step)
    page = pages.matrix(
        [subject.token],
        [f"at step {step}", "others of its class"],
        [[seen.subject, seen.of_class]],
    )
    save_png(page, folder / "samples.png")
    plots.watched(watch.history(run), folder / "curves.png")
    if photos:
        shown = [photo.image for photo in pictures.read_pictures(subject.pictures)]
        save_png(pages.grid(shown, 6), folder / "photos.png")
    card = folder / "README.md"
    replace_file(card, _card(run, step, photos).encode())
    return card


def push(folder: str | Path, name: str, private: bool = True) -> str:
    """Upload a folder as the model ``name`` ("you/my-dog"), made if it is not there; its address.

    The token is :func:`colab.hub_token`'s. A model that is there stays as visible as it is. Raises
    :class:`HubError` without a token and where the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    token = colab.hub_token()
    if token is None:
        where = "Colab's secret HF_TOKEN" if colab.in_colab() else "HF_TOKEN in the environment"
        raise HubError(
            f"the Hub needs a token that may write; make one there and give it as {where}."
        )
    hub = HfApi(token=token)
    try:
        there = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=there.repo_id, folder_path=folder, commit_message="DreamBooth pipeline"
        )
    except (RuntimeError, HFValidationError, *_failures()) as error:
        wrapped = isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
        cause = error.__cause__ if wrapped else error
        if isinstance(cause, (HfHubHTTPError, HFValidationError)):
            raise HubError(
                f"the Hub did not take '{name}' ({_first_line(cause)}); check that the name is "
                "your-name/model and that the token may write there."
            ) from error
        raise HubError(
            f"'{name}' could not be sent to the Hub ({_first_line(cause)}); check the network, and "
            "run this again: what is there already is not sent twice."
        ) from error
    return str(there)


def _failures() -> tuple[Any, ...]:
    """What the Hub's client raises where the Hub refuses or the network fails.

    The latter are errors of its HTTP library, which is another one by its version.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, *HfHubHTTPError.__bases__


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def usage(run: Run, model: str | Path, base: str = "") -> str:
    """The Python that draws a run's subject by plain diffusers, its model being at ``model``.

    On a GPU in half precision and else in float32, in the steps and with the guidance of the base.
    ``model`` is a folder or, if there is none, a name on the Hub; ``base`` is where that of a LoRA
    is, if not where the run had it. Raises ``BaseError`` where the base of a run that learnt a new
    word is gone.
    """
    config = run.config
    lora = config.method == "lora"
    first = (base or config.base) if lora else model
    load = [_LOAD_LORA.format(model, families.LORA_FILE)] if lora else []
    if config.train_token:
        adapter = families.adapter(config.base, config.revision)
        load += tokens.usage(adapter, model, config.subject.identifier)
    settings, dtype = _drawing(run)
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


def _drawing(run: Run) -> tuple[str, str]:
    """Steps and guidance as a pipeline's call takes them, and the half precision to draw in.

    Of a LoRA whose base is gone neither is known: the pipeline's own will have to do.
    """
    config = run.config
    where = str(run.folder) if run.finished else config.base
    try:
        own, adapter = inference_of(run), families.adapter(where, config.revision)
    except families.BaseError:
        return "", "float16"
    return (
        f", num_inference_steps={own.steps}, guidance_scale={own.guidance_scale:g}",
        adapter.card_dtype,
    )


def licence_of(base: str) -> dict[str, Any]:
    """The licence that a base's card on the Hub gives, as a card's fields; empty if none is known.

    Nothing is raised for a Hub that does not answer.
    """
    from huggingface_hub import HfApi

    try:
        found = HfApi(token=colab.hub_token() or False).model_info(base, timeout=TIMEOUT)
    except _failures():
        return {}
    card: dict[str, Any] = found.card_data.to_dict() if found.card_data else {}
    fields = {name: card.get(name) for name in ("license", "license_name", "license_link")}
    if not str(fields["license_link"]).startswith("http"):  # a file that this model has not
        del fields["license_link"]
    return {name: value for name, value in fields.items() if isinstance(value, str)}


def _card(run: Run, step: int, photos: bool) -> str:
    from huggingface_hub import ModelCardData

    config, subject = run.config, run.config.subject
    of_hub = not Path(families.locate(config.base)).exists()
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
    rows = {row.step: row for row in watch.history(run)}
    fidelity, adherence, kept = choice.shares_of(rows[step], rows[0])
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
        return f"{by} and the trainer's own class pictures"
    return f"{by} and {config.class_pictures} class pictures of “{config.subject.class_prompt}”"

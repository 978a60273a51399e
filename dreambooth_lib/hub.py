"""A tuned model for others: its card, and the way to the Hub."""

from pathlib import Path

from dreambooth_lib import choice, colab, families, pages, watch
from dreambooth_lib.runs import Run
from dreambooth_lib.weights import restored


class HubError(ValueError):
    """What the Hub did not take."""


def keep(run: Run, step: int, folder: str | Path) -> Path:
    """Write a checkpoint as a pipeline that diffusers loads alone, with its card; gives the folder.

    It is there when it is whole; until then a former one stays. Raises as :func:`write_card` does
    and ``RunError`` where the run has no checkpoint of that step.
    """
    from dreambooth_lib.state import replacing_folder

    with replacing_folder(folder) as partial:
        restored(run, step).pipeline.save_pretrained(partial)
        write_card(run, step, partial)
    return Path(folder)


def write_card(run: Run, step: int, folder: str | Path) -> Path:
    """Write ``README.md`` and ``samples.png`` into a pipeline's folder; gives the card's path.

    The card says how to draw the subject, what it was trained on and with, and how the pictures of
    ``step``, the checkpoint that the folder holds, scored. Raises ``RunError`` where the run has no
    look at that step.
    """
    from dreambooth_lib.state import replace_file, save_png

    folder, seen = Path(folder), watch.drawn(run, step)
    page = pages.matrix(
        [f"step {step}"], [run.config.subject.token, run.config.subject.class_prompt],
        [[seen.subject, seen.of_class]],
    )  # fmt: skip
    save_png(page, folder / "samples.png")
    card = folder / "README.md"
    replace_file(card, _card(run, step).encode())
    return card


def push(folder: str | Path, name: str, private: bool = True) -> str:
    """Upload a folder as the model ``name`` ("you/my-dog"), made if it is not there; its address.

    The token is :func:`colab.hub_token`'s. A model that is there stays as visible as it is. Raises
    :class:`HubError` without a token and where the Hub refuses.
    """
    import httpx
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
    except (HfHubHTTPError, HFValidationError) as error:
        raise HubError(
            f"the Hub did not take '{name}' ({_first_line(error)}); check that the name is "
            "your-name/model and that the token may write there."
        ) from error
    except (OSError, httpx.HTTPError) as error:
        raise HubError(
            f"the way to the Hub broke off ({_first_line(error)}); push again, and what is there "
            "already is not sent twice."
        ) from error
    return str(there)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _card(run: Run, step: int) -> str:
    from huggingface_hub import ModelCardData

    config, subject = run.config, run.config.subject
    of_hub = not Path(families.locate(config.base)).exists()
    header = ModelCardData(
        base_model=config.base if of_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["dreambooth", "text-to-image", "diffusers"],
    )
    rows = {row.step: row for row in watch.history(run)}
    fidelity, adherence, kept = choice.shares_of(rows[step], rows[0])
    trained = "denoiser and text encoder" if config.train_text_encoder else "denoiser"
    if config.method == "lora":
        trained += f", by LoRA of rank {config.lora_rank}, merged"
    prior = f"prior preservation with λ {config.prior_weight:g}"
    if config.prior_weight == 0:
        prior = "no prior preservation"
    elif config.prior == "distilled":
        prior += f", taught by the base's own predictions for “{subject.class_prompt}”"
    elif config.class_folder is None:
        prior += f" and {config.class_pictures} class pictures of “{subject.class_prompt}”"
    return f"""---
{header.to_yaml()}
---

# {subject.token}

`{config.base if of_hub else Path(config.base).name}` personalised by DreamBooth ([arXiv 2208.12242](https://arxiv.org/abs/2208.12242)):
“{subject.token}” is one {subject.class_noun}, learnt from a few photos of it.

![the subject and its class](samples.png)

    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained("this model's name")
    prompt = "{subject.instance_prompt} on the beach"
    pipeline(prompt, guidance_scale={config.guidance_scale:g}).images[0]

- Step {step} of {config.steps}: pictures of the subject are {fidelity:.0%} as close to the photos
  as those to each other, follow prompts {adherence:.0%} as well as the base's, and {kept:.0%} of
  the rest is as it was.
- Trained: {trained}; learning rate {config.learning_rate:g}, {config.batch_size} photos an update;
  {prior}.
- The base's licence and terms hold for this model too. Ask whoever is in the photos or owns what
  they show before you share it.
"""

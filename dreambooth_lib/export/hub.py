"""Upload a trained model to the Hugging Face Hub."""

from pathlib import Path
from typing import Any

from dreambooth_lib.core.errors import one_line, printable
from dreambooth_lib.core.hub_refusals import hub_error, status_of
from dreambooth_lib.core.hub_token import HubError, hub_token, in_colab, place_of_token
from dreambooth_lib.families.resolving import LORA_BASE_FILE, LORA_FILE
from dreambooth_lib.families.textual_inversion import TOKEN_FILE

#: What the Hub's answers mean, and what to do.
_ANSWERS = {
    401: "the Hub does not accept your token for '{name}'; create a new one with write access at "
    "https://huggingface.co/settings/tokens and put it into {place}.",
    403: "your token may not write to '{name}'{said}; create one with write access to it at "
    "https://huggingface.co/settings/tokens and put it into {place}.",
    429: "the Hub's rate limit was reached, so '{name}' was not uploaded; try again in a few "
    "minutes.",
}

#: Files that a model of this kit may have, as patterns: those of an older one must not stay beside
#: a newer one's, where loaders would take them for its own, and photos would stay public.
_FILES_OF_A_MODEL = [
    "samples.png", "curves.png", "photos.png", "model_index.json", LORA_FILE, LORA_BASE_FILE,
    TOKEN_FILE,
    *(
        f"{part}/*{ending}"
        for part in ("unet", "transformer", "vae", "scheduler", "text_encoder*", "tokenizer*",
                     "safety_checker", "feature_extractor", "image_encoder")
        for ending in (".json", ".safetensors", ".txt", ".model", ".jinja")
    ),
]  # fmt: skip


def login() -> bool:
    """Return whether there is a token for the Hub; if not, show the Hub's own login below the cell.

    The login keeps the token on this machine, where :func:`hub_token` finds it. Raises
    :class:`HubError` where the Hub's login cannot be shown.
    """
    if hub_token(ask_again=True) is not None:
        return True
    from huggingface_hub import notebook_login

    secret = f", or put a token with write access into {place_of_token()}" if in_colab() else ""
    print(f"Log in below as the Hub asks you to{secret}; then run this cell again.")
    try:
        notebook_login()
    except Exception as error:  # of many kinds, by its version
        raise HubError(
            f"the Hub's login failed ({one_line(error)[:200]}); check the network and run this "
            f"cell again{secret}."
        ) from error
    return False


def push(folder: str | Path, name: str, private: bool = True) -> str:
    """Upload a folder as the model ``name`` ("you/my-dog") and return its address.

    The repository is created if it is missing; an existing one stays as public or private as it is.
    It loses files with names of a model's files that this one lacks, which its history keeps; other
    files stay. The token is :func:`hub_token`'s. Raises :class:`HubError` without a
    folder or a token, or if the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not Path(folder).is_dir():
        raise HubError(f"{folder} is not a folder; give the folder of a model.")
    token, place = hub_token(ask_again=True), place_of_token()
    if token is None:
        raise HubError(
            "the Hub needs a token with write access; create one at "
            f"https://huggingface.co/settings/tokens and put it into {place}."
        )
    hub = HfApi(token=token)
    network: Any = HfHubHTTPError.__bases__  # those of its HTTP library, which is one of two
    try:
        repository = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message="DreamBooth pipeline",
            delete_patterns=_FILES_OF_A_MODEL,
        )
    except (RuntimeError, ValueError, OSError, *network) as error:
        raise HubError(_refusal(error, name, place)) from error
    return str(repository)


def _refusal(error: BaseException, name: str, place: str) -> str:
    """Say why ``name`` could not be uploaded, and what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    status, said = status_of(error), getattr(hub_error(error), "server_message", None)
    said = printable(f" ({said})")[:300] if said else ""
    if status == 403 and "storage" in said.lower():
        return (
            f"your storage on the Hub has no room for '{name}'{said}; delete models there that you "
            "no longer need, and upload again."
        )
    if answer := _ANSWERS.get(status or 0):
        return answer.format(name=name, place=place, said=said)
    if type(error) is ValueError:  # huggingface_hub's own, of the card that the Hub has checked
        return (
            f"the Hub refused '{name}' ({printable(str(error))[:300]}); correct that, and upload "
            "again."
        )
    cause = (isinstance(error, RuntimeError) and error.__cause__) or error
    message = (str(cause).splitlines() or [type(cause).__name__])[0]
    if isinstance(cause, (HfHubHTTPError, HFValidationError)):
        return (
            f"the Hub refused '{name}' ({message}); check that the name is your-name/model "
            "and that your token has write access to it."
        )
    return (
        f"'{name}' could not be uploaded to the Hub ({message}); check the network and try "
        "again: files that are already there are not uploaded twice."
    )


def licence_of(base: str) -> dict[str, Any]:
    """Return the licence fields of a base's card on the Hub; empty if there are none.

    They are ``license``, ``license_name`` and ``license_link``. A Hub that does not answer raises
    nothing.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    network: Any = HfHubHTTPError.__bases__  # those of its HTTP library, which is one of two
    try:
        model = HfApi(token=hub_token() or False).model_info(base, timeout=5.0)
    except (OSError, ValueError, *network):
        return {}
    card: Any = model.card_data or {}
    fields = {name: card.get(name) for name in ("license", "license_name", "license_link")}
    if not str(fields["license_link"]).startswith("http"):  # a file in the base's own repository
        del fields["license_link"]
    return {name: value for name, value in fields.items() if isinstance(value, str)}

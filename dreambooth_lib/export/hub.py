"""Upload a trained model to the Hugging Face Hub."""

from pathlib import Path
from typing import Any

from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.hub_token import hub_token, in_colab


class HubError(KitError, ValueError):
    """An upload that the Hub refused, or that did not reach it."""


def push(folder: str | Path, name: str, private: bool = True) -> str:
    """Upload a folder as the model ``name`` ("you/my-dog") and return its address.

    The repository is created if it is missing; an existing one stays as public or private as it
    is. The token is :func:`hub_token`'s. Raises :class:`HubError` without a token, or if the Hub
    refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    token = hub_token()
    if token is None:
        place = "Colab's secret HF_TOKEN" if in_colab() else "the environment variable HF_TOKEN"
        raise HubError(
            "the Hub needs a token with write access; create one at "
            f"https://huggingface.co/settings/tokens and put it into {place}."
        )
    hub = HfApi(token=token)
    network: Any = HfHubHTTPError.__bases__  # those of its HTTP library, which is one of two
    try:
        repository = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message="DreamBooth pipeline"
        )
    except (RuntimeError, HFValidationError, OSError, *network) as error:
        cause = (isinstance(error, RuntimeError) and error.__cause__) or error
        message = (str(cause).splitlines() or [type(cause).__name__])[0]
        if isinstance(cause, (HfHubHTTPError, HFValidationError)):
            raise HubError(
                f"the Hub refused '{name}' ({message}); check that the name is your-name/model "
                "and that your token has write access to it."
            ) from error
        raise HubError(
            f"'{name}' could not be uploaded to the Hub ({message}); check the network and try "
            "again: files that are already there are not uploaded twice."
        ) from error
    return str(repository)

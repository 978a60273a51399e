"""The way of a tuned model to the Hub."""

from pathlib import Path
from typing import Any

from dreambooth_lib.core.hub_token import hub_token, in_colab


class HubError(ValueError):
    """What the Hub did not take."""


def push(folder: str | Path, name: str, private: bool = True) -> str:
    """Upload a folder as the model ``name`` ("you/my-dog"), made if it is not there; its address.

    The token is :func:`hub_token`'s. A model that is there stays as visible as it is. Raises
    :class:`HubError` without a token and where the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    token = hub_token()
    if token is None:
        where = "Colab's secret HF_TOKEN" if in_colab() else "HF_TOKEN in the environment"
        raise HubError(
            f"the Hub needs a token that may write; make one there and give it as {where}."
        )
    hub = HfApi(token=token)
    network: Any = HfHubHTTPError.__bases__  # of its HTTP library, which is one of two
    try:
        there = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=there.repo_id, folder_path=folder, commit_message="DreamBooth pipeline"
        )
    except (RuntimeError, HFValidationError, OSError, *network) as error:
        cause = (isinstance(error, RuntimeError) and error.__cause__) or error
        said = (str(cause).splitlines() or [type(cause).__name__])[0]
        if isinstance(cause, (HfHubHTTPError, HFValidationError)):
            raise HubError(
                f"the Hub did not take '{name}' ({said}); check that the name is your-name/model "
                "and that the token may write there."
            ) from error
        raise HubError(
            f"'{name}' could not be sent to the Hub ({said}); check the network, and run this "
            "again: what is there already is not sent twice."
        ) from error
    return str(there)

"""Find the Hub's token: Colab's secret, or what huggingface_hub finds."""

import sys
from contextlib import suppress

SECRET = "HF_TOKEN"  #: the token's name among Colab's secrets


def in_colab() -> bool:
    """Return whether this is a notebook on Colab; a script on its machine has no page to ask by."""
    return "google.colab" in sys.modules


def hub_token() -> str | None:
    """Return the Hub's token: Colab's secret, else huggingface_hub's, else None: anonymous.

    It is read anew each time and kept nowhere; pass it to huggingface_hub and to nothing else.
    huggingface_hub asks for the secret, too, but once a session: one that the user adds or grants
    after that is not seen.
    """
    if in_colab():
        from google.colab import userdata

        with suppress(  # NotebookAccessError: it is there, but not for this notebook
            userdata.SecretNotFoundError, userdata.NotebookAccessError, userdata.TimeoutException
        ):
            if token := (userdata.get(SECRET) or "").strip():
                return token
    from huggingface_hub import get_token

    return get_token()

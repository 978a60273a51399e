"""Find the Hub's token: Colab's secret, or what huggingface_hub finds."""

import re
import sys
from contextlib import suppress

from dreambooth_lib.core.errors import KitError

SECRET = "HF_TOKEN"  #: the token's name among Colab's secrets


def in_colab() -> bool:
    """Return whether this is a notebook on Colab; a script on its machine has no page to ask by."""
    return "google.colab" in sys.modules


#: Whether the user did not answer when Colab asked for the secret; each time takes half a minute.
_unanswered = False

#: What a token has no place for, and how to call it.
_ODD = {
    r"['\"`´‘’‚“”„«»]": "a quotation mark",
    r"\s": "a space or a line break",
    r"[^\w\-]|[^\x00-\x7f]": "a character that is no letter or digit",
}


class HubError(KitError, ValueError):
    """The Hub refused something, or could not be reached; or the token can be none."""


def place_of_token() -> str:
    """Return where the user has to put a token, in words."""
    return f"Colab's secret {SECRET}" if in_colab() else f"the environment variable {SECRET}"


def hub_token(ask_again: bool = False) -> str | None:
    """Return the Hub's token: Colab's secret, else huggingface_hub's, else None: anonymous.

    It is read anew each time and kept nowhere; pass it to huggingface_hub and to nothing else.
    Where the user did not answer Colab's question for the secret, it is asked once more only if
    ``ask_again``, as what needs a token does.
    huggingface_hub asks for the secret, too, but once a session: one that the user adds or grants
    after that is not seen. Raises :class:`HubError`, which does not show it, for what can be no
    token: it would fail as a header of a request.
    """
    token = _find_token(ask_again)
    for odd, name in _ODD.items():
        if token and re.search(odd, token):
            raise HubError(
                f"your token has {name} in it; copy it again from "
                f"https://huggingface.co/settings/tokens into {place_of_token()}."
            )
    return token


def _find_token(ask_again: bool) -> str | None:
    global _unanswered
    if in_colab() and (ask_again or not _unanswered):
        from google.colab import userdata

        # NotebookAccessError: it is there, but not for this notebook
        with suppress(userdata.SecretNotFoundError, userdata.NotebookAccessError):
            try:
                token = (userdata.get(SECRET) or "").strip()
                _unanswered = False
            except userdata.TimeoutException:
                token, _unanswered = "", True
            if token:
                return token
    from huggingface_hub import get_token

    return get_token()

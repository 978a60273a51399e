"""Find the Hub's token: Colab's secret, or what huggingface_hub finds."""

import os
import re
import sys

from dreambooth_lib.core.errors import KitError

SECRET = "HF_TOKEN"  #: the token's name among Colab's secrets


def in_colab() -> bool:
    """Return whether this is a notebook on Colab; a script on its machine has no page to ask by."""
    return "google.colab" in sys.modules


#: Whether the user refused, or did not answer, when Colab last asked for the secret.
_asked_in_vain = False
#: The secret that is in the environment by :func:`hub_token`, not by the user.
_passed_on: str | None = None

#: What a token has no place for, as it is a header of requests, and how to call it.
_ODD = {
    r"['\"`´‘’‚“”„«»]": "a quotation mark",
    r"\s": "a space or a line break",
    r"[^!-~]": "a character that no token has",
}


class HubError(KitError, ValueError):
    """The Hub refused something, or could not be reached; or the token can be none."""


def place_of_token() -> str:
    """Return where the user has to put a token, in words."""
    return f"Colab's secret {SECRET}" if in_colab() else f"the environment variable {SECRET}"


def hub_token(ask_again: bool = False) -> str | None:
    """Return the Hub's token: Colab's secret, else huggingface_hub's, else None: anonymous.

    It is read anew each time; pass it to huggingface_hub and to nothing else.
    Where the user refused the secret, or did not answer Colab's question for it in time, it is
    asked once more only if ``ask_again``, as what needs a token does.
    huggingface_hub asks for the secret, too, but once a session: one that the user adds or grants
    after that is not seen. So Colab's secret is put into the environment variable of its name,
    where every download and child process finds it. Raises :class:`HubError`, which does not show
    it, for what can be no token: it would fail as a header of a request.
    """
    global _passed_on
    from huggingface_hub import get_token
    from huggingface_hub.utils import _auth

    secret = _colab_secret(ask_again)
    if in_colab() and hasattr(_auth, "_IS_GOOGLE_COLAB_CHECKED"):
        _auth._IS_GOOGLE_COLAB_CHECKED = True  # or it would ask for the same secret once more
    token = secret or get_token()
    for odd, name in _ODD.items():
        if token and re.search(odd, token):
            raise HubError(
                f"your token has {name} in it; copy it again from "
                f"https://huggingface.co/settings/tokens into {place_of_token()}."
            )
    if secret:
        os.environ[SECRET] = _passed_on = secret
    return token


def _colab_secret(ask_again: bool) -> str | None:
    """Return Colab's secret; if there is none, or none any more, take it from the environment."""
    global _asked_in_vain
    if not in_colab() or (_asked_in_vain and not ask_again):
        return None
    from google.colab import userdata

    secret, _asked_in_vain = "", False
    try:
        secret = (userdata.get(SECRET) or "").strip()
    except userdata.SecretNotFoundError:  # which asks the user for nothing
        pass
    except userdata.NotebookAccessError:  # it is there, but not for this notebook
        _asked_in_vain = True
    except userdata.TimeoutException:
        _asked_in_vain = True
        return None
    if not secret and os.environ.get(SECRET) == _passed_on:
        os.environ.pop(SECRET, None)  # it was removed
    return secret

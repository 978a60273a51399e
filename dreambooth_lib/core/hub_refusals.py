"""Say in a sentence why the Hub refused something, and what to do about it."""

from pathlib import Path

from dreambooth_lib.core.hub_token import hub_token, place_of_token


def what_to_do(
    error: BaseException, repository: str, instead: str = "train the bundled base 'toybox'"
) -> str:
    """Return what to do about an error of huggingface_hub's, as the end of a sentence.

    ``error`` may be another library's that was caused by it.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    place, status = place_of_token(), status_of(error)
    error = hub_error(error) or error
    if isinstance(error, GatedRepoError):
        return (
            f"accept the terms on the Hub's page of {repository}, and put your token into {place}"
        )
    if status == 401 and hub_token():
        return f"the Hub rejects your token; replace or remove it in {place}"
    folder = Path(repository)
    if folder.parent.is_dir():  # as in runs/my-dog, mistyped
        return f"check its name: the folder '{folder.parent}' here has no '{folder.name}'"
    if isinstance(error, RepositoryNotFoundError):
        return f"check its name; if it is private, put a token with read access into {place}"
    if constants.HF_HUB_OFFLINE:
        return "check its name, or unset HF_HUB_OFFLINE once: it is set, and the cache lacks a file"
    if isinstance(error, RevisionNotFoundError):
        return "check its revision"
    if status in (401, 403):
        return (
            f"your access is refused: accept the terms on the Hub's page of {repository}, and put "
            f"a token with read access into {place}"
        )
    if status == 429:
        return "the Hub's rate limit was reached: wait a few minutes and try again"
    if status is not None and status >= 500:
        return "the Hub is having problems: wait a few minutes and try again"
    return f"check its name and the network, or {instead}"


def hub_error(error: BaseException | None) -> BaseException | None:
    """Return the error of huggingface_hub that an error is or came from; None if there is none."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    while error is not None and not isinstance(error, HfHubHTTPError | LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error, or what caused it, came from."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None

"""Download a base's small files from the Hub, and say in a sentence why one cannot be had."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.hub_refusals import status_of, what_to_do
from dreambooth_lib.core.hub_token import hub_token
from dreambooth_lib.families import base_files
from dreambooth_lib.families.base_files import BaseError


def download(repository: str, name: str, revision: str | None) -> Path | None:
    """Return a file of the Hub in the local cache; None where the repository has no such file.

    Raises :class:`BaseError` where the repository cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    token = None
    while True:
        try:
            return Path(hf_hub_download(repository, name, revision=revision, token=token))
        except Exception as error:  # huggingface_hub raises many kinds for the same problem
            if isinstance(error, EntryNotFoundError) and not isinstance(
                error, LocalEntryNotFoundError
            ):
                return None
            # Colab's secret may be newer than what huggingface_hub knows of it.
            if token or status_of(error) != 401 or not (token := hub_token(ask_again=True)):
                raise _unreachable(repository, error) from error


@contextmanager
def explain_download(
    repository: str, revision: str | None, variant: str | None, parts: Collection[str]
) -> Iterator[None]:
    """Say in a sentence why a library could not load a base of the Hub, where its files tell.

    ``parts`` are those with weights. The libraries' own words do not name what is missing, and hide
    a refusal of the Hub. Raises :class:`BaseError`, or what was raised where the files are sound.
    """
    from huggingface_hub import HfApi

    try:
        yield
    except (KitError, ImportError, MemoryError):
        raise
    except Exception as error:  # of any kind: see explain_loading
        cause = error
        if status_of(error) is None:
            try:
                names = HfApi(token=hub_token()).list_repo_files(repository, revision=revision)
            except Exception as refusal:  # huggingface_hub raises many kinds for the same problem
                cause = refusal
            else:
                _check_files(repository, revision, variant, parts, [*map(Path, names)])
                raise
        raise _unreachable(repository, cause) from error


def _check_files(
    repository: str, revision: str | None, variant: str | None, parts: Collection[str],
    names: Collection[Path],
) -> None:  # fmt: skip
    """Check a base's files by their names on the Hub, and those in the cache by their content."""
    from huggingface_hub import try_to_load_from_cache

    for part in parts:
        own = [name for name in names if name.parent == Path(part)]
        base_files.check_part_names(Path(repository) / part, own, variant)
        config = try_to_load_from_cache(repository, f"{part}/config.json", revision=revision)
        for file in base_files.weights_to_load(Path(str(config)).parent, variant) if config else ():
            base_files.check_weights(file)


def _unreachable(repository: str, error: BaseException) -> BaseError:
    return BaseError(
        f"the base '{repository}' could not be reached on the Hub ({type(error).__name__}); "
        f"{what_to_do(error, repository)}."
    )

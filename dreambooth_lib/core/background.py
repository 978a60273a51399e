"""Call what may never return, such as a drive that hangs, without waiting for it for ever."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.files import copy_file, retry

T = TypeVar("T")

#: Seconds that a drive has to list a folder, and to copy a file or to show photos. 5 GB to Drive
#: take a few minutes.
ANSWER_LIMIT, FILE_LIMIT = 60.0, 900.0


class NoAnswerError(KitError, TimeoutError):
    """A call that did not return in time; being an OSError, it counts as a fault of the drive."""


def start(operation: Callable[..., T], *given: Any) -> "Future[T]":
    """Start an operation in a thread of its own, and return its future result.

    The thread is a daemon: it does not keep the process from exiting, as an executor's would.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(operation(*given))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future


def call(operation: Callable[..., T], *given: Any, place: object, limit: float) -> T:
    """Call an operation on ``place`` and return its result, or raise what it raises.

    Raises :class:`NoAnswerError`, which names the place, if that takes more than ``limit`` seconds.
    The call itself is left behind in its thread.
    """
    future = start(operation, *given)
    try:
        return future.result(limit)
    except TimeoutError:
        if future.done():
            raise
        raise NoAnswerError(
            f"{place} did not answer within {limit:.0f} seconds; check that its drive is mounted, "
            "and try again."
        ) from None


def copy(source: Path, place: Path, drive: object) -> None:
    """Copy a file from or to a drive, and try again if that fails.

    Raises :class:`NoAnswerError`, which names the drive, if a try takes more than
    :data:`FILE_LIMIT` seconds. It is the last one: the thread that is left behind writes nothing
    to a folder that is gone by then.
    """

    def attempt() -> NoAnswerError | None:
        try:
            call(copy_file, source, place, place=drive, limit=FILE_LIMIT)
        except NoAnswerError as error:  # returned, or it would be tried again
            return error
        return None

    if error := retry(attempt):
        raise error

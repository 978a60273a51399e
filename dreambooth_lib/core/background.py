"""Call what may never return, such as a drive that hangs, without waiting for it for ever."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

from dreambooth_lib.core.errors import KitError

T = TypeVar("T")

#: Seconds that a drive has to list a folder or to show some photos, and to copy one file.
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

"""End training in good order when the process is told to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: What a terminal, a closing session and a scheduler send; Windows has no SIGHUP.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]

_open_blocks = 0  # of raise_on_termination


class Terminated(KeyboardInterrupt):
    """A signal that asks the process to end; ``number`` is the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def raise_on_termination() -> Iterator[None]:
    """Raise :class:`Terminated` for SIGTERM and SIGHUP, as Python does for SIGINT, in the block.

    A signal that the program handles in another way, or ignores, stays as it is. Several blocks may
    be open at a time, and end in any order.
    """
    global _open_blocks
    _open_blocks += 1
    ends = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    _set_handlers(dict.fromkeys(ends, _raise_terminated))
    try:
        yield
    finally:
        _open_blocks -= 1
        if not _open_blocks:
            own = [n for n in _SIGNALS if signal.getsignal(n) is _raise_terminated]
            _set_handlers(dict.fromkeys(own, signal.SIG_DFL))


def _raise_terminated(number: int, frame: Any) -> None:
    raise Terminated(number)


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Hold back such signals until the block ends, so that what it writes is written whole."""
    caught: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    _set_handlers(dict.fromkeys(handlers, lambda number, _: caught.append(number)))
    try:
        yield
    finally:
        _set_handlers(handlers)
        if caught:
            signal.raise_signal(caught[0])


def _set_handlers(handlers: dict[Any, Any]) -> None:
    """Set signal handlers, which only the main thread can, and only it receives signals."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)

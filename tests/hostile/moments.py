"""Count what a process writes inside a folder, and do something at a chosen moment of it.

A moment is a call that makes or changes something on disk: opening a file to write, writing to it,
copying into it, making a folder, renaming, flushing. What is written by code in Rust or C alone is
not seen.
"""

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

#: Is told the number of a moment, from 1, and what is written; may raise or end the process.
Act = Callable[[int, str], None]
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@contextmanager
def watched(folder: Path, act: Act = lambda number, what: None) -> Iterator[list[str]]:
    """Call ``act`` at each moment inside the folder; yield the list of them that grows."""
    seen: list[str] = []
    place = os.path.abspath(folder)

    def is_inside(path: Any) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}") if os.path.isdir("/proc/self/fd") else ""
        return os.path.abspath(os.fsdecode(path)).startswith(place)

    def reached(what: str, path: Any) -> None:
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path
        seen.append(f"{what} {os.path.relpath(os.fsdecode(name), place)}")
        act(len(seen), seen[-1])

    def counted(module: Any, name: str, which: int = 0) -> Any:
        """Wrap a function; its argument number ``which`` is the path or descriptor it changes."""
        real = getattr(module, name)

        def call(*given: Any, **named: Any) -> Any:
            if len(given) > which and is_inside(given[which]):
                reached(name, given[which])
            return real(*given, **named)

        return mock.patch.object(module, name, call)

    class Counted(io.FileIO):
        def write(self, data: Any) -> int:
            try:
                reached("write", self.name)
            except OSError:
                super().write(bytes(data)[: len(data) // 2])  # a full disk takes a part
                raise
            return super().write(data)

    real_open, real_os_open = io.open, os.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None,
               errors: Any = None, newline: Any = None, closefd: bool = True,
               opener: Any = None) -> Any:  # fmt: skip
        if isinstance(file, int) or not set(mode) & set("wax+") or not is_inside(file):
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        reached("open", file)
        raw = Counted(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def os_opened(path: Any, flags: int, *given: Any, **named: Any) -> int:
        if flags & _WRITES and "dir_fd" not in named and is_inside(path):
            reached("os.open", path)
        return real_os_open(path, flags, *given, **named)

    with ExitStack() as stack:
        for module, name, which in ((os, "rename", 1), (os, "replace", 1), (os, "mkdir", 0),
                                    (os, "fsync", 0), (os, "sendfile", 0),
                                    (os, "truncate", 0)):  # fmt: skip
            stack.enter_context(counted(module, name, which))
        stack.enter_context(mock.patch.object(builtins, "open", opened))
        stack.enter_context(mock.patch.object(io, "open", opened))
        stack.enter_context(mock.patch.object(os, "open", os_opened))
        yield seen

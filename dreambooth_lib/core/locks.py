"""Let one process at a time use a folder."""

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dreambooth_lib.core.disk import DiskError, explain_disk_errors
from dreambooth_lib.core.errors import KitError

#: The lock's file in the folder; it may lie there without a process that holds it.
LOCK_FILE = ".lock"
#: What drives without locks answer.
_NO_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)


class LockError(KitError, RuntimeError):
    """A folder that another process uses."""


@contextmanager
def lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder's lock. Raises :class:`LockError` where another process holds it.

    With ``wait`` it is waited for instead.

    The operating system frees the lock of a process that ends, however it ends. Within one process
    the lock can be held several times: an interrupted cell may not have let go of it yet. On a
    drive without locks, warn and go on without one.
    """
    from filelock import FileLock, Timeout

    held = FileLock(
        folder / LOCK_FILE, timeout=-1 if wait else 0, is_singleton=True, thread_local=False
    )
    try:
        with explain_disk_errors(folder / LOCK_FILE):
            held.acquire()
    except (DiskError, NotImplementedError) as error:  # the second by an earlier filelock
        if isinstance(error, DiskError) and error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{folder} is on a drive without locks; use it from one process at a time.",
                      stacklevel=3)  # fmt: skip
    except Timeout:
        raise LockError(
            f"{folder} is in use by another process; stop that one, or choose another folder."
        ) from None
    try:
        yield
    finally:
        held.release()

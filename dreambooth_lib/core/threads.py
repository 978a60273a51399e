"""Let one thread at a time load a model."""

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_LOADING = threading.RLock()  # a base loads its encoders


def one_at_a_time(load: Callable[P, R]) -> Callable[P, R]:
    """Make a function wait while another thread is in any function of this kind.

    A notebook answers widgets in threads of their own, and transformers and diffusers are not made
    for that: while one thread loads a model, torch makes the other's weights without values, for
    good, and a class that is being imported looks as if it were missing.
    """

    @wraps(load)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _LOADING:
            return load(*args, **kwargs)

    return call

"""Ctrl-C as in a terminal, wherever the tests run."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ctrl_c(handled: Any = signal.default_int_handler) -> Iterator[None]:
    """Within the context SIGINT interrupts, here and in processes that are started.

    In the background of a script it's ignored, and programs started there inherit that.

    Args:
        handled: how; signal.SIG_IGN ignores it, wherever the tests run.
    """
    before = signal.signal(signal.SIGINT, handled)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

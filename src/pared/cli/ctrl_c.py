"""Ctrl-C for a command that works through pieces as they come, and loses none that it took."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Piece = TypeVar("Piece")


class CtrlC:
    """Within the context, Ctrl-C ends a wait for the next piece at once, and work on it only after.

    A second Ctrl-C ends that too. Where the signal is ignored, as in the background of a script, or
    handled by somebody else, it's left alone.
    """

    def __init__(self) -> None:
        self._waiting = self._pressed = False
        self._before: Any = None

    def __enter__(self) -> CtrlC:
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if usual and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: object) -> None:
        if self._waiting or self._pressed:
            raise KeyboardInterrupt
        self._pressed = True

    def pieces(self, source: Iterable[Piece]) -> Iterator[Piece]:
        """Those of `source`, one after another.

        Raises:
            KeyboardInterrupt: it was pressed, at the latest once the piece before is done with.
        """
        pieces = iter(source)
        while True:
            if self._pressed:
                raise KeyboardInterrupt
            try:
                self._waiting = True
                piece = next(pieces)
            except StopIteration:
                return
            finally:
                self._waiting = False
            yield piece

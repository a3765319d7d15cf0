"""The processes of a run, before and behind its training loop."""

import atexit
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState


def this_process() -> PartialState:
    """This process among those that train, made as the training loop makes it."""
    return PartialState(cpu=not torch.accelerator.is_available())


def to_accelerator(pipeline: Any) -> Any:
    """The pipeline, moved to where this process will train, so that its encoders run there too."""
    return pipeline.to(this_process().device)


def saved_once(folder: Path, *writers: Callable[[Path], Any]) -> None:
    """Let the main process write into `folder`; the others wait until it has."""
    if this_process().is_main_process:
        for write in writers:
            write(folder)
    this_process().wait_for_everyone()


@contextmanager
def left_in_order() -> Iterator[None]:
    """After what the context holds went well, the process leaves its group before Python ends.

    Otherwise a thread of gloo may free its last tensor while Python already ends, and abort a
    process that has done all its work. One that failed leaves by itself: others may still wait for
    it, and it would wait for them.
    """
    atexit.unregister(_leave)
    yield
    if this_process().num_processes > 1:
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # a wrapped model is part of cycles, and holds the group and its threads

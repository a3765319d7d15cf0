"""The processes of a run, before and behind its training loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
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

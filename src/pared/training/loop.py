"""One training loop for all that trains here: pretraining, healing, tuning. It knows no method."""

import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from pared import processor
from pared.errors import InputError
from pared.method import note_drawn
from pared.training import checkpoints
from pared.training.beginning import Beginning, beginning_of
from pared.training.data import Bucketed, Dataset, Order, beside, generator_for, order_of
from pared.training.ema import EMA
from pared.training.processes import left_in_order
from pared.training.recomputing import recompute
from pared.training.settings import TrainingSettings

# What accelerate puts on a model.
WRAPPED = ("forward", "_original_forward", "_is_accelerate_prepared")
# Steps in a row that may be without finite gradients before training gives up; the scale of float16
# needs a dozen at its start.
PATIENCE = 50
# (model, batch, generator) -> named loss terms, already weighted; their sum is minimised.
Terms = dict[str, Tensor]


@dataclass
class Run:
    """What a training run came to."""

    folder: Path
    steps: int
    finished: bool
    seconds: float
    last: dict[str, float] = field(default_factory=dict)


def train(
    model: nn.Module,
    objective: nn.Module,
    data: Dataset,
    settings: TrainingSettings,
    folder: str | Path,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    accelerator: Accelerator | None = None,
) -> Run:
    """Train `model` in place; resume by itself when `folder` holds a checkpoint of the same run.

    Every random number of step s comes from (seed, s, process), never from what ran before. So a
    run that was killed and resumed ends with the same weights as one that was not (bit for bit on
    CPU).

    A step whose gradients aren't finite leaves the weights as they are. `log.jsonl` counts such
    steps of the process as `skipped`, and the end tells their number.

    Args:
        model: the module whose `settings.trainable` parameters are optimised. At the end it carries
            the averaged weights where `settings.ema` is set.
        objective: called as `objective(model, batch, generator)`; returns named, weighted loss
            terms. One with a method `at_step` is told the number of every step, from 0, before it;
            one with a `label` has it shown before the progress bar.
        data: see `pared.training.data.Dataset`.
        settings: everything that decides the result.
        folder: takes `log.jsonl` and the newest checkpoint.
        on_step: called after each step with the step's number (from 1) and its mean loss terms.
        accelerator: one made by the caller; by default one with `settings.precision` is made, which
            obeys `accelerate launch` and its config file (DDP, FSDP).

    Raises:
        InputError: the model has no gradient checkpointing, which the settings ask for; no
            parameter matches `trainable`; the batch doesn't divide over the processes; the folder
            holds another run: of other settings or data, or begun from other weights, conversions,
            or another objective; or, in the midst of training, its gradients aren't finite any
            more.
    """
    with released(model), left_in_order() if accelerator is None else nullcontext():
        run = _Run.prepare(model, objective, data, settings, Path(folder), accelerator)
        start, step, means = time.monotonic(), run.resume(), {}
        every = settings.log_every if on_step is None else 1
        log = Log(run.folder / "log.jsonl", step, run.main)
        begun = step
        with run.progress(step) as bar, interruptible() as interrupted:
            while step < settings.steps and not run.anywhere(interrupted()):
                terms = run.one_step(step)
                step += 1
                bar.update()
                # Reading a number waits for the accelerator, which should be kept supplied.
                if step % every == 0 or step in (begun + 1, settings.steps):
                    means = run.read(terms)
                    bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
                if step % settings.log_every == 0 or step == settings.steps:
                    rate = {"rate": settings.rate(step - 1)}
                    skipped = {"skipped": run.skipped} if run.skipped else {}
                    log.write(step, means | rate | skipped, time.monotonic() - start)
                    run.accelerator.log(means | skipped, step=step)
                if on_step is not None:
                    on_step(step, means)
                if step % settings.checkpoint_every == 0 and step < settings.steps:
                    run.save(step)
            if step > begun:
                means = run.read(terms)
                run.save(step)
        log.close()
        run.finish(step)
    return Run(run.folder, step, step == settings.steps, time.monotonic() - start, means)


@dataclass
class _Run:
    """The parts of a run, prepared for the processes and devices it runs on."""

    accelerator: Accelerator
    model: nn.Module
    prepared: nn.Module
    objective: nn.Module
    optimizer: AcceleratedOptimizer
    ema: EMA | None
    data: Dataset
    order: Order | Bucketed
    settings: TrainingSettings
    folder: Path
    beginning: Beginning
    skipped: int = 0  # steps without finite gradients, since this process began
    skipped_in_row: int = 0

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        objective: nn.Module,
        data: Dataset,
        settings: TrainingSettings,
        folder: Path,
        accelerator: Accelerator | None,
    ) -> "_Run":
        """Freeze, wrap and place everything; nothing is trained yet."""
        if settings.gradient_checkpointing:
            recompute(model, settings.compile)
        folder.mkdir(parents=True, exist_ok=True)
        if accelerator is None:
            _allow_precision(settings.precision)
        accelerator = accelerator or Accelerator(
            mixed_precision=settings.precision,
            cpu=not torch.accelerator.is_available(),
            log_with=list(settings.trackers) or None,
            project_dir=str(folder),
            # A last block without a text output leaves its text projections without gradients.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        _check_batch(settings, accelerator.num_processes)
        if accelerator.is_main_process:
            _warn_of_precision(accelerator)
        freeze_all_but(model, settings.trainable)
        if settings.compile:
            model.compile()  # in place: names of weights stay as they are
        beginning = beginning_of(model, objective)
        objective.to(accelerator.device)
        prepared = accelerator.prepare(model.train())
        optimizer = torch.optim.AdamW(
            [p for p in prepared.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        ema = EMA(prepared, settings.ema) if settings.ema else None
        order = order_of(data, settings.batch_size, settings.seed)
        if settings.trackers:
            accelerator.init_trackers("pared", config=settings.scalars())
        optimizer = accelerator.prepare(optimizer)
        data = beside(data, accelerator.device)
        return cls(
            accelerator, model, prepared, objective, optimizer, ema, data, order, settings, folder,
            beginning,
        )  # fmt: skip

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.accelerator.is_main_process

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with this one; reading it goes through all data once."""
        return self.settings.identity() | {"data": self.data.identity()}

    def resume(self) -> int:
        """Read the newest checkpoint, if there is one; the number of steps already done."""
        if (checkpoint := checkpoints.latest(self.folder)) is None:
            return 0
        return checkpoints.read(
            checkpoint, self.prepared, self.optimizer.optimizer, self.ema, self.identity,
            self.beginning, self.optimizer.scaler,
        )  # fmt: skip

    def save(self, step: int) -> None:
        """Write the state after `step` steps."""
        checkpoints.write(
            self.folder, step, self.prepared, self.optimizer.optimizer, self.ema, self.identity,
            self.main, self.beginning, self.optimizer.scaler,
        )  # fmt: skip
        self.accelerator.wait_for_everyone()

    def anywhere(self, flag: bool) -> bool:
        """Whether `flag` is set in any process: all must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        mine = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(mine, "sum") > 0)

    def progress(self, done: int) -> tqdm:
        """The progress bar, with loss and time left."""
        return tqdm(
            desc=getattr(self.objective, "label", None),
            total=self.settings.steps,
            initial=done,
            disable=not self.main,
            name="pared.train",
        )

    def one_step(self, step: int) -> dict[str, Tensor]:
        """One optimizer step over all micro-batches; gives this process's mean loss terms."""
        accelerator, settings = self.accelerator, self.settings
        for group in self.optimizer.optimizer.param_groups:
            group["lr"] = settings.rate(step)
        generator = generator_for(settings.seed, step, accelerator.process_index)
        set_seed(int(torch.randint(2**31, (1,), generator=generator)))  # dropout, anything global
        if hasattr(self.objective, "at_step"):  # something of it changes in the course of training
            self.objective.at_step(step)
        mine = self.order.indices(step)[accelerator.process_index :: accelerator.num_processes]
        micro = mine.split(len(mine) // settings.accumulation)
        totals: dict[str, Tensor] = {}
        for number, indices in enumerate(micro, start=1):
            batch = self.data.batch(indices, generator)
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            # Gradients are exchanged between processes on the last micro-batch only.
            last = number == len(micro)
            alone = nullcontext() if last else accelerator.no_sync(self.prepared)
            with alone, accelerator.autocast():
                terms = self.objective(self.prepared, batch, generator)
                accelerator.backward(sum(terms.values()) / settings.accumulation)
            for name, value in terms.items():
                share = value.detach().float() / settings.accumulation
                totals[name] = totals.get(name, 0) + share
        trained = [p for p in self.prepared.parameters() if p.requires_grad]
        norm = accelerator.clip_grad_norm_(trained, settings.clip or math.inf)
        self.note(step, finite=norm is None or math.isfinite(norm))  # DeepSpeed may give None
        # One step along NaN ends all weights. Float16's scaler skips it, and lowers its scale.
        if not self.skipped_in_row or self.optimizer.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(step + 1)
        return totals

    def note(self, step: int, finite: bool) -> None:
        """Count steps whose gradients aren't finite.

        Raises:
            InputError: there were too many in a row.
        """
        self.skipped += not finite
        self.skipped_in_row = 0 if finite else self.skipped_in_row + 1
        if self.skipped_in_row == PATIENCE:
            raise InputError(
                f"no finite gradients in {PATIENCE} steps up to {step + 1}, where the learning "
                f"rate is {self.settings.rate(step):.3g} and precision "
                f"{self.settings.precision!r}; lower learning_rate, or choose precision 'no'."
            )

    def read(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Loss terms as numbers, averaged over the processes."""
        means = self.accelerator.reduce(terms, "mean")
        return {name: float(value) for name, value in means.items()}

    def finish(self, step: int) -> None:
        """Close trackers, tell how to go on or put the averaged weights in, leave training mode."""
        if self.settings.trackers:
            # `end_training` would take the processes apart as well.
            for tracker in self.accelerator.trackers:
                tracker.finish()
        if self.skipped and self.main:
            steps = "1 step" if self.skipped == 1 else f"{self.skipped} steps"
            tqdm.write(f"Left out {steps} that had no finite gradients.")
        if step < self.settings.steps:
            if self.main:
                tqdm.write(
                    f"Stopped after step {step}; the state is in {self.folder}. "
                    "The same command goes on from there."
                )
        elif self.ema is not None:
            self.ema.write_to_model()
        note_drawn(self.model, ())  # what conversions drew has trained now, and is told apart
        self.model.eval()


@contextmanager
def released(model: nn.Module) -> Iterator[None]:
    """Behind the context the model runs as it did before, in its own types.

    Accelerate leaves its autocast on a model that it has prepared, and takes such a model as it is
    when it comes again.
    """
    before = {name: vars(model)[name] for name in WRAPPED if name in vars(model)}
    try:
        yield
    finally:
        for name in WRAPPED:
            vars(model).pop(name, None)
        vars(model).update(before)


def freeze_all_but(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Let exactly the parameters train whose names match one of the glob `patterns`."""
    count = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch(name, pattern) for pattern in patterns))
        count += parameter.requires_grad
    if not count:
        example = next(iter(dict(model.named_parameters())), "none")
        raise InputError(
            f"no parameter matches trainable={list(patterns)}; names look like {example!r}, "
            "and '*' trains everything."
        )


def _allow_precision(precision: str) -> None:
    """Let an accelerator be made of this precision, whatever the process's last one had.

    Accelerate keeps one precision for a process, and refuses another one; stages of a recipe may
    differ in it.
    """
    known = AcceleratorState._shared_state.get("_mixed_precision")
    if known is not None and known != precision:
        AcceleratorState._reset_state()


def _warn_of_precision(accelerator: Accelerator) -> None:
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu and accelerator.mixed_precision == "bf16" and not processor.multiplies_bf16():
        warnings.warn(
            "this processor has no units for bfloat16, with which it trains several times as "
            "long as with float32; precision = 'no' is faster here.",
            stacklevel=2,
        )


def _check_batch(settings: TrainingSettings, processes: int) -> None:
    share = settings.accumulation * processes
    if settings.batch_size % share:
        raise InputError(
            f"batch_size {settings.batch_size} doesn't divide over {processes} processes x "
            f"{settings.accumulation} micro-batches; choose a multiple of {share}."
        )


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the context one Ctrl-C (or SIGTERM) ends the loop after its step, a second kills."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    # What is ignored stays so: in the background of a script Ctrl-C is for something else.
    wanted = [
        s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN
    ]
    try:
        previous = {s: signal.signal(s, note) for s in wanted}
    except ValueError:  # not in the main thread: signals stay as they are
        previous = {}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Log:
    """Appends one JSON line per logged step; lines after the resumed step are dropped first."""

    def __init__(self, path: Path, done: int, enabled: bool) -> None:
        self.file = None
        if not enabled:
            return
        kept = []
        if path.exists():
            kept = [x for x in path.read_text().splitlines() if x and json.loads(x)["step"] <= done]
        path.write_text("".join(x + "\n" for x in kept))
        self.file = path.open("a")

    def write(self, step: int, values: dict[str, float], seconds: float) -> None:
        if self.file:
            self.file.write(
                json.dumps({"step": step, **values, "seconds": round(seconds, 2)}) + "\n"
            )
            self.file.flush()

    def close(self) -> None:
        if self.file:
            self.file.close()

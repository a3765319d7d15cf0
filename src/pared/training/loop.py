"""One training loop for all that trains here: pretraining, healing, tuning. It knows no method."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from pared.errors import InputError
from pared.training import checkpoints
from pared.training.data import Dataset, Order, generator_for
from pared.training.ema import EMA
from pared.training.settings import TrainingSettings

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

    Args:
        model: the module whose `settings.trainable` parameters are optimised. At the end it carries
            the averaged weights where `settings.ema` is set.
        objective: called as `objective(model, batch, generator)`; returns named, weighted loss
            terms.
        data: see `pared.training.data.Dataset`.
        settings: everything that decides the result.
        folder: takes `log.jsonl` and the newest checkpoint.
        on_step: called after each step with the step's number (from 1) and its mean loss terms.
        accelerator: one made by the caller; by default one with `settings.precision` is made, which
            obeys `accelerate launch` and its config file (DDP, FSDP).

    Raises:
        InputError: no parameter matches `trainable`; the batch doesn't divide over the processes;
            the folder holds another run.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = accelerator or Accelerator(
        mixed_precision=settings.precision,
        cpu=not torch.accelerator.is_available(),
        log_with=list(settings.trackers) or None,
        project_dir=str(folder),
    )
    freeze_all_but(model, settings.trainable)
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if settings.compile:
        model.compile()  # in place: names of weights stay as they are
    model.train()
    objective.to(accelerator.device)
    prepared = accelerator.prepare(model)
    optimizer = accelerator.prepare(
        torch.optim.AdamW(
            [p for p in prepared.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
    )
    ema = EMA(prepared, settings.ema) if settings.ema else None
    identity = settings.identity() | {"data": data.identity()}
    inner = optimizer.optimizer
    done = 0
    if (checkpoint := checkpoints.latest(folder)) is not None:
        done = checkpoints.read(checkpoint, prepared, inner, ema, identity)
    log = _Log(folder / "log.jsonl", done, accelerator.is_main_process)
    if settings.trackers:
        accelerator.init_trackers("pared", config=settings.model_dump(mode="json"))

    micro = _micro_batch(settings, accelerator.num_processes)
    order = Order(len(data), settings.batch_size, settings.seed)
    start, means = time.monotonic(), {}

    def save() -> None:
        checkpoints.write(folder, step, prepared, inner, ema, identity, accelerator.is_main_process)
        accelerator.wait_for_everyone()

    step = done
    bar = tqdm(
        total=settings.steps,
        initial=done,
        disable=not accelerator.is_main_process,
        name="pared.train",
    )
    with bar, _interruptible() as interrupted:
        while step < settings.steps and not interrupted():
            _set_rate(inner, settings.rate(step))
            means = _one_step(
                accelerator, prepared, objective, optimizer, data, order, settings, step, micro
            )
            step += 1
            if ema is not None:
                ema.update(step)
            bar.update()
            bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
            if step % settings.log_every == 0 or step == settings.steps:
                log.write(step, means | {"rate": settings.rate(step - 1)}, time.monotonic() - start)
                if settings.trackers:
                    accelerator.log(means, step=step)
            if on_step is not None:
                on_step(step, means)
            if step % settings.checkpoint_every == 0 and step < settings.steps:
                save()
        if step > done:
            save()
    log.close()
    if settings.trackers:
        accelerator.end_training()
    if step < settings.steps and accelerator.is_main_process:
        tqdm.write(
            f"Stopped after step {step}; the state is in {folder}. The same command goes on from "
            "there."
        )
    if ema is not None and step == settings.steps:
        ema.write_to_model()
    model.eval()
    return Run(folder, step, step == settings.steps, time.monotonic() - start, means)


def _one_step(
    accelerator: Accelerator,
    model: nn.Module,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Dataset,
    order: Order,
    settings: TrainingSettings,
    step: int,
    micro: int,
) -> dict[str, float]:
    """One optimizer step over `settings.accumulation` micro-batches; gives the mean loss terms."""
    rank = accelerator.process_index
    generator = generator_for(settings.seed, step, rank)
    # For dropout and anything else that draws globally.
    set_seed(int(torch.randint(2**31, (1,), generator=generator)))
    mine = order.indices(step)[rank :: accelerator.num_processes]
    totals: dict[str, Tensor] = {}
    for number, indices in enumerate(mine.split(micro)):
        batch = {k: v.to(accelerator.device) for k, v in data.batch(indices, generator).items()}
        last = (number + 1) * micro >= len(mine)
        with _gradient_sync(accelerator, model, last), accelerator.autocast():
            terms = objective(model, batch, generator)
            loss = sum(terms.values()) / settings.accumulation
            accelerator.backward(loss)
        for name, value in terms.items():
            totals[name] = totals.get(name, 0) + value.detach().float() / settings.accumulation
    if settings.clip is not None:
        accelerator.clip_grad_norm_(
            [p for p in model.parameters() if p.requires_grad], settings.clip
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {name: float(value) for name, value in accelerator.reduce(totals, "mean").items()}


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


def _micro_batch(settings: TrainingSettings, processes: int) -> int:
    share = settings.accumulation * processes
    if settings.batch_size % share:
        raise InputError(
            f"batch_size {settings.batch_size} doesn't divide over {processes} processes x "
            f"{settings.accumulation} micro-batches; choose a multiple of {share}."
        )
    return settings.batch_size // share


@contextmanager
def _gradient_sync(accelerator: Accelerator, model: nn.Module, last: bool) -> Iterator[None]:
    """Exchange gradients between processes on the last micro-batch only."""
    if last:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within the context one Ctrl-C (or SIGTERM) ends the loop after its step, a second kills."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    try:
        previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals stay as they are
        previous = {}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Log:
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

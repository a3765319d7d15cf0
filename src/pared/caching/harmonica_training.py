"""How the table of HarmoniCa (arXiv 2410.01723) is learned: SDT and IEPO.

Step-wise denoising training (SDT) goes down whole trajectories that reuse itself bends. At each
step the model predicts twice, as it is and softly mixed with what earlier steps kept; the row of
that step learns from the difference, and the mixed prediction takes the trajectory on. The image
error proxy (IEPO) weights each step's difference by what reuse there does to the final latents. No
pictures are needed, only conditions. Steps count from 0, the noisiest; the paper's index counts
down.

Implemented from the paper and from what its code is known to do: `reading="telescoping"` of the
proxy is the code's, in which reuse is let in step by step; `"single"` is the paper's words, reuse
at one step alone. Chosen here: the difference is that of the guided predictions, in all channels.
With `target_reuse` the price beta isn't given but found: ahead of each trajectory it's set to that
quantile of the entries' worth (how much the weighted difference falls with r, a running mean) below
which the wanted share lies, and at the end tau is put where that share is met. AdamW's epsilon is
next to nothing, so that its steps don't depend on the scale of the loss. Not verified: the paper's
figures of training time.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pared.anatomy import Family
from pared.caching.harmonica import INFO
from pared.caching.harmonica_soft import Mixing, ProxyReading, Router, ends, iepo, proxies
from pared.caching.harmonica_tables import Routing, cur_of, require_possible
from pared.caching.trajectory import Condition, Conditions, Point, Trajectories
from pared.errors import InputError
from pared.nn.modes import in_eval_mode
from pared.training import Run, checkpoints, generator_for
from pared.training.loop import Log, interruptible

# Trajectories between checkpoints.
CHECKPOINT_EVERY = 25
# Of the running mean of the entries' worth, per trajectory.
WORTH_RATE = 0.1
# Of AdamW. Weighted by lambda, gradients fall far below the usual 1e-8, which would stop the rows
# of late steps.
EPSILON = 1e-20


class RouterTraining(BaseModel):
    """The settings of a training; the defaults are the paper's for DiT-XL/2."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=20, ge=2, description="T of the runs that the table is for")
    guidance: float = Field(default=1.5, description="scale in training; 1 is none")
    size: tuple[int, int] | tuple[int, int, int] | None = Field(
        default=None,
        description="(frames,) height and width of the latents; None: the model's own",
    )
    batch_size: int = Field(default=64, ge=1, description="samples of a trajectory")
    updates: int = Field(default=20_000, ge=1, description="of a row; T - 1 in a trajectory")
    learning_rate: float = Field(default=0.01, gt=0, description="of AdamW")
    beta: float = Field(default=7e-8, ge=0, description="price of a computed entry")
    target_reuse: float | None = Field(
        default=None, gt=0, lt=1, description="share of entries to reuse; beta is found then"
    )
    tau: float = Field(default=0.1, gt=0, lt=1, description="an entry is computed iff r > tau")
    refresh: int = Field(default=500, ge=1, description="C, updates between refreshes of lambda")
    reading: ProxyReading = Field(default="telescoping", description="of lambda: code or words")
    seed: int = Field(default=0, ge=0)

    @property
    def trajectories(self) -> int:
        """Trajectories that make up the updates."""
        return -(-self.updates // (self.steps - 1))


@dataclass(frozen=True)
class Learned:
    """What a training came to.

    Attributes:
        routing: the table, as far as it has come.
        run: its `steps` are trajectories; not `finished` where it was interrupted.
    """

    routing: Routing
    run: Run


class State(nn.Module):
    """All that learns or is measured on the way: what a checkpoint holds.

    Attributes:
        router: the scores.
        proxy: lambda, (T,).
        worth: how much the weighted difference falls with each entry's r, a running mean,
            (T, sites).
    """

    proxy: Tensor
    worth: Tensor

    def __init__(self, steps: int, sites: int, generator: torch.Generator) -> None:
        super().__init__()
        self.router = Router(steps, sites, generator)
        self.register_buffer("proxy", torch.zeros(steps))
        self.register_buffer("worth", torch.zeros(steps, sites))


class Lesson:
    """The parts of a training, for one pipeline.

    Args:
        pipeline: whose denoiser learns nothing itself.
        conditions: to draw from.
        settings: of the training.
        undo: gets what puts the denoiser back as it was.
    """

    def __init__(
        self,
        pipeline: Any,
        conditions: Conditions,
        settings: RouterTraining,
        undo: ExitStack,
    ) -> None:
        self.conditions, self.settings = conditions, settings
        self.trajectories = Trajectories(pipeline, settings.steps, settings.guidance, settings.size)
        family = self.trajectories.family
        _require(family, settings)
        undo.enter_context(_frozen(family.model))
        self.timesteps = self.trajectories.told(conditions)
        self.sites = tuple(branch.path for branch in family.branches)
        self.mixing = Mixing(family, settings.tau, undo)
        generator = generator_for(settings.seed)
        self.state = State(self.trajectories.steps, len(self.sites), generator)
        self.state.to(self.trajectories.device)
        rows = [theta for theta in self.router.theta if theta.requires_grad]
        self.optimizer = torch.optim.AdamW(
            rows, lr=settings.learning_rate, weight_decay=0, eps=EPSILON
        )

    @property
    def router(self) -> Router:
        return self.state.router

    def one_trajectory(self, number: int) -> dict[str, Any]:
        """SDT along trajectory `number` (from 0); gives what the log keeps."""
        settings, trajectories = self.settings, self.trajectories
        generator = generator_for(settings.seed, number, 1)
        given = self.conditions.draw(settings.batch_size, generator)
        condition = trajectories.condition(given, self.conditions.null)
        noise = torch.randn(settings.batch_size, *trajectories.shape, generator=generator)
        point = start = trajectories.start(noise, number)
        if self._refreshes(number):
            found = ends(
                trajectories, self.mixing, self.router.scores(), start, condition, settings.reading
            )
            self.state.proxy.copy_(proxies(found, settings.reading))
        beta, losses = self.beta(), []
        self.mixing.kept = {}
        with torch.no_grad(), self.mixing.soft(self.router(0)):
            point = trajectories.move(point, trajectories.predict(point, condition))
        while point.step < trajectories.steps:
            loss, prediction = self.one_step(point, condition, beta, number)
            losses.append(loss)
            # The trajectory that reuse makes, not the teacher's.
            point = trajectories.move(point, prediction)
        scores = self.router.scores()
        return {
            "loss": float(torch.stack(losses).mean()),
            "usage": float(scores[1:].mean()),
            "cur": cur_of(scores > settings.tau),
            "beta": beta,
            "lambda": self.state.proxy.tolist(),
        }

    def one_step(
        self, point: Point, condition: Condition, beta: float, number: int
    ) -> tuple[Tensor, Tensor]:
        """One update of the row of a point's step.

        Args:
            point: of the trajectory, not the first.
            condition: of the call.
            beta: price of an entry.
            number: of the trajectory.

        Returns:
            The weighted difference, and the mixed prediction; neither has a graph.
        """
        with torch.no_grad():
            full = self.trajectories.predict(point, condition)
        row = self.router(point.step)
        row.retain_grad()
        with self.mixing.soft(row):
            cached = self.trajectories.predict(point, condition)
        data, price = iepo(full, cached, self.state.proxy[point.step], row, beta)
        (data + price).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.router.clamp_(point.step)
        worth = beta - torch.as_tensor(row.grad)
        self.state.worth[point.step].lerp_(worth, max(WORTH_RATE, 1 / (number + 1)))
        return data.detach(), cached.detach()

    def _refreshes(self, number: int) -> bool:
        """Whether lambda is measured anew before a trajectory: every C updates."""
        updates, before = (n * (self.trajectories.steps - 1) for n in (number, number - 1))
        return number == 0 or updates // self.settings.refresh > before // self.settings.refresh

    def beta(self) -> float:
        """The price of an entry: given or, for a target, what the entries to reuse aren't worth."""
        if self.settings.target_reuse is None:
            return self.settings.beta
        worth = self.state.worth[1:].flatten().sort().values
        return max(0.0, float(worth[self._reused(self.settings.target_reuse) - 1]))

    def _reused(self, share: float) -> int:
        """Entries that make up a share of the table; at least one, at most all behind step 0."""
        steps, sites = self.state.worth.shape
        return min(max(1, round(share * steps * sites)), (steps - 1) * sites)

    def routing(self, model: str) -> Routing:
        """The table as it is now."""
        settings, scores = self.settings, self.router.scores().cpu()
        tau = settings.tau
        if settings.target_reuse is not None:
            ordered = scores[1:].flatten().sort().values
            tau = float(ordered[self._reused(settings.target_reuse) - 1])
        return Routing(
            scores,
            self.sites,
            self.timesteps,
            tau,
            model=model,
            sampler=type(self.trajectories.scheduler).__name__,
            guidance=settings.guidance,
            beta=self.beta(),
        )

    def identity(self) -> dict[str, Any]:
        """What a resumed training must share with this one."""
        found = self.settings.model_dump(mode="json", exclude={"updates"})
        found["conditions"] = _digest([self.conditions.entries, self.conditions.null])
        return found | {"sites": list(self.sites), "timesteps": list(self.timesteps)}


def learn(
    pipeline: Any,
    conditions: Conditions,
    folder: str | Path,
    settings: RouterTraining | None = None,
    model: str = "",
    on_trajectory: Callable[[int, dict[str, Any]], None] | None = None,
    **changes: Any,
) -> Learned:
    """Learn which branch of which step a pipeline needs to compute.

    Called again after a stop, it goes on from where it was, to the same scores (bit for bit on the
    CPU). The pipeline is left as it was.

    Args:
        pipeline: a stock pipeline; its scheduler decides how it samples.
        conditions: see `conditions_of` in `pared.caching.trajectory`.
        folder: takes the log (`log.jsonl`, a line for each trajectory) and the newest checkpoint.
        settings: of the training.
        model: what to call the model in the router's file.
        on_trajectory: called after each trajectory with its number (from 1) and its log entries.
        changes: single settings to change, e.g. `steps=10, target_reuse=0.5`.

    Raises:
        InputError: harmonica doesn't serve the model, the target can't be reached with so few
            steps, or the folder holds another training.
    """
    settings = RouterTraining(**((settings or RouterTraining()).model_dump() | changes))
    folder, begin, entries = Path(folder), time.monotonic(), dict[str, Any]()
    with ExitStack() as undo:
        lesson = Lesson(pipeline, conditions, settings, undo)
        identity = lesson.identity()
        done = begun = _resume(folder, lesson, identity)
        log = Log(folder / "log.jsonl", done, True)
        undo.callback(log.close)
        total = settings.trajectories
        bar = undo.enter_context(tqdm(total=total, initial=done, name="pared.train"))
        interrupted = undo.enter_context(interruptible())
        while done < total and not interrupted():
            entries = lesson.one_trajectory(done)
            done += 1
            log.write(done, entries, time.monotonic() - begin)
            bar.update()
            bar.set_postfix({name: f"{entries[name]:.3g}" for name in ("loss", "usage", "cur")})
            if on_trajectory is not None:
                on_trajectory(done, entries)
            if done % CHECKPOINT_EVERY == 0 and done < total:
                checkpoints.write(folder, done, lesson.state, lesson.optimizer, None, identity)
        if done > begun:
            checkpoints.write(folder, done, lesson.state, lesson.optimizer, None, identity)
        run = Run(folder, done, done >= total, time.monotonic() - begin, entries)
        return Learned(lesson.routing(model), run)


def _resume(folder: Path, lesson: Lesson, identity: dict[str, Any]) -> int:
    """Read the newest checkpoint, if there is one; the trajectories already done."""
    folder.mkdir(parents=True, exist_ok=True)
    if (checkpoint := checkpoints.latest(folder)) is None:
        return 0
    return checkpoints.read(checkpoint, lesson.state, lesson.optimizer, None, identity)


def _require(family: Family, settings: RouterTraining) -> None:
    if family.name not in INFO.families:
        raise family.refuse(INFO.slug, f"it serves the families {', '.join(INFO.families)}.")
    if getattr(family.model, "is_gradient_checkpointing", False):
        raise InputError(
            "harmonica can't learn through gradient checkpointing, which computes layers twice; "
            "call disable_gradient_checkpointing() on the model."
        )
    if settings.target_reuse is not None:
        require_possible(settings.target_reuse, settings.steps)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the context a model is in eval mode and has no gradients."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        with in_eval_mode(model):
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _digest(conditions: list[Condition]) -> str:
    found = hashlib.sha256()
    for condition in conditions:
        for name, entry in sorted(condition.items()):
            found.update(f"{name} {tuple(entry.shape)} {entry.dtype}".encode())
            found.update(entry.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]

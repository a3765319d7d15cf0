"""The contract's functions for run-time methods: whole runs of toy models, since a single call
reuses nothing.

Each takes a method and the name of a family and raises an AssertionError that says what is wrong.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import itemgetter
from typing import Any

import accelerate
import accelerate.hooks
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_map_only

from pared import anatomy
from pared.anatomy.denoiser import Grid
from pared.bench.contract_toys import (
    ROUNDING,
    STEPS,
    apply,
    example,
    guided,
    require_close,
    sampled,
    toy,
)
from pared.method import RuntimeMethod, attached_to

CPU = torch.device("cpu")

Run = Callable[[nn.Module], Tensor]


def spared(stats: dict[str, Any]) -> int:
    """Everything that a method counts as not computed."""
    patches = stats.get("patches", 0) - stats.get("active_patches", 0)
    return patches + sum(stats.get(key, 0) for key in ("reused", "forecast"))


def run_with(model: nn.Module, method: RuntimeMethod, run: Run = sampled) -> Tensor:
    """A run of a model with the method attached for it alone, which reuses something."""
    with apply(model, method) as handle:
        found = run(model)
    stats = handle.stats[method.info.slug]
    assert spared(stats) > 0, f"nothing was reused: {stats}"
    return found


# On and off -----------------------------------------------------------------------------------


@torch.no_grad()
def contract_removal(method: RuntimeMethod, family: str) -> None:
    """Attached and removed again, it leaves outputs bit-identical and nothing behind."""
    model = toy(family)
    modules, wanted = dict(model.named_modules()), sampled(model)
    before = {path: _marks(module) for path, module in modules.items()}
    with apply(model):
        assert torch.equal(sampled(model), wanted), "applying nothing changed the output"
    found = run_with(model, method)
    assert not torch.equal(found, wanted), "attached, it changes nothing, whatever it counts"
    assert torch.equal(sampled(model), wanted), "the output stays changed after removal"
    assert dict(model.named_modules()) == modules, "other modules are left behind"
    assert not attached_to(model), f"the model says that {attached_to(model)} is attached"
    for path, module in modules.items():
        for what, left in _marks(module).items():
            assert left == before[path][what], (
                f"{what} of {path or 'the model'} stay changed: {left}"
            )


def _marks(module: nn.Module) -> dict[str, Any]:
    """What a method may leave on a module. Grids may stay: they change nothing, and are shared."""
    tables = {name: table for name, table in vars(module).items() if name.endswith("_hooks")}
    marks: dict[str, Any] = {
        name: [hook for hook in table.values() if not isinstance(hook, Grid)]
        for name, table in tables.items()
    }
    # Ours alone keeps a list of what is attached, which is empty by then.
    marks["attributes"] = sorted(vars(module).keys() - {"pared_attached"})
    return marks | {"processors": getattr(module, "processor", None)}


@torch.no_grad()
def contract_fresh_start(method: RuntimeMethod, family: str) -> None:
    """Attached again, it starts afresh: the second sample equals the first."""
    model = toy(family)
    first, second = run_with(model, method), run_with(model, method)
    assert torch.equal(first, second), "something of the first sample was kept"


@torch.no_grad()
def contract_next_run(method: RuntimeMethod, family: str) -> None:
    """A run after others, of other sizes and numbers of steps, equals the first of a model."""
    model = toy(family)
    runs: list[dict[str, int]] = [{}, anatomy.of(model).sizes[1], {"steps": 5}, {"batch": 2}, {}]
    wanted = []
    for run in runs:
        with apply(other := toy(family), method):
            wanted.append(sampled(other, **run))
    with apply(model, method):
        for run, right in zip(runs, wanted, strict=True):
            assert torch.equal(sampled(model, **run), right), f"run {run} depends on those before"


@torch.no_grad()
def contract_attached_copy(method: RuntimeMethod, family: str) -> None:
    """A deep copy carries the method along; taking it off the original leaves the copy alone."""
    model = toy(family)
    plain = sampled(model)
    with apply(model, method):
        wanted = sampled(model)
        twin = copy.deepcopy(model)
        assert torch.equal(sampled(twin), wanted), "the copy samples otherwise"
    assert torch.equal(sampled(twin), wanted), "the copy lost the method with the original"
    assert torch.equal(sampled(model), plain), "the original keeps something of its copy"


# Ways of calling ------------------------------------------------------------------------------


@torch.no_grad()
def contract_turns(method: RuntimeMethod, family: str) -> None:
    """Guidance by two calls in turn gives the same as guidance on a joint batch."""
    model = toy(family)
    joint, turns = (run_with(model, method, partial(guided, joint=j)) for j in (True, False))
    torch.testing.assert_close(turns, joint, **ROUNDING)


@torch.no_grad()
def contract_batched_run(method: RuntimeMethod, family: str) -> None:
    """A run of a batch of two gives the same as runs of its samples one by one."""
    model = toy(family)
    both = example(model, batch=2)
    whole = run_with(model, method, partial(sampled, given=both))
    for i in range(2):
        one = tree_map_only(Tensor, itemgetter(slice(i, i + 1)), both)
        single = run_with(model, method, partial(sampled, given=one))
        torch.testing.assert_close(whole[:, i : i + 1], single, **ROUNDING)


@torch.no_grad()
def contract_bfloat16_run(method: RuntimeMethod, family: str) -> None:
    """A run in bfloat16 is finite, and close to one in float32."""
    wanted = run_with(toy(family), method)
    require_close(run_with(toy(family, torch.bfloat16), method), wanted)


def contract_autocast_run(method: RuntimeMethod, family: str) -> None:
    """A run under autocast to bfloat16 is close to float32, with gradients and without."""
    model = toy(family)
    with torch.no_grad():
        wanted = run_with(model, method)
    for gradients in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
            require_close(run_with(model, method), wanted)


@torch.no_grad()
def contract_compiled_blocks(method: RuntimeMethod, family: str) -> None:
    """Blocks under torch.compile sample the same."""
    model = toy(family)
    with apply(model, method):
        wanted = sampled(model)
        torch._dynamo.reset()
        try:
            for block in anatomy.of(model).blocks:
                block.module.compile(backend="eager")
            torch.testing.assert_close(sampled(model), wanted, rtol=1e-6, atol=1e-6)
        finally:
            torch._dynamo.reset()


@torch.no_grad()
def contract_threads(method: RuntimeMethod, family: str) -> None:
    """Two threads that sample from one model at the same time get what each gets alone."""
    model = toy(family)
    small, large = anatomy.of(model).sizes
    runs = small, large | {"steps": STEPS + 2}
    wanted = [run_with(toy(family), method, partial(sampled, **run)) for run in runs]
    barrier, found = threading.Barrier(len(runs), timeout=30), dict[int, Any]()

    def work(number: int) -> None:
        try:
            with torch.no_grad(), _together(model, barrier):  # each thread has its own
                found[number] = sampled(model, **runs[number])
        except Exception as error:
            barrier.abort()
            found[number] = error

    with apply(model, method):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(runs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, run in enumerate(runs):
        got = found[number]
        assert isinstance(got, Tensor), f"the thread of {run} failed: {got}"
        assert torch.equal(got, wanted[number]), f"the thread of {run} got something else"


@contextmanager
def _together(model: nn.Module, barrier: threading.Barrier) -> Iterator[None]:
    """The running thread waits for the others in its first calls of the model, behind its hooks."""
    own, left = threading.get_ident(), STEPS

    def wait(module: nn.Module, args: Any) -> None:
        nonlocal left
        if threading.get_ident() == own and left:
            left -= 1
            barrier.wait()

    hook = model.register_forward_pre_hook(wait)
    try:
        barrier.wait()  # nobody begins before all hooks are there
        yield
    finally:
        hook.remove()


# What goes wrong ------------------------------------------------------------------------------


@torch.no_grad()
def contract_faults(method: RuntimeMethod, family: str) -> None:
    """After errors, Ctrl-C, and guidance or samples that end in mid-run, a run equals the first."""
    wanted, model, half = run_with(toy(family), method), toy(family), STEPS // 2
    cut: dict[str, Run] = {
        "guidance on a joint batch ended": partial(guided, joint=True, ends=half),
        "guidance in turn ended": partial(guided, joint=False, ends=half),
        "a sample of two ended": partial(sampled, batch=2, ends=half),
    }
    alone = {}
    for name, run in cut.items():
        with apply(other := toy(family), method):
            alone[name] = run(other)
    with apply(model, method):
        calls = _calls(model)
        for part, error in ((1, ZeroDivisionError), (3, KeyboardInterrupt), (4, ZeroDivisionError)):
            _break_off(model, calls * part // 5, error)
            assert torch.equal(sampled(model), wanted), (
                f"a run depends on one that broke off by {error.__name__} at {part} fifths of it"
            )
        for name, run in cut.items():
            assert torch.equal(run(model), alone[name]), f"where {name}, a run depends on another"
            assert torch.equal(sampled(model), wanted), f"a run depends on one in which {name}"


def _calls(model: nn.Module) -> int:
    """Calls of all modules of a model in one run."""
    calls: list[int] = []
    hook = register_module_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        sampled(model)
    finally:
        hook.remove()
    return len(calls)


def _break_off(model: nn.Module, after: int, error: type[BaseException]) -> None:
    """Begin a run, and break it off after so many calls of modules."""
    left = after

    def strike(module: nn.Module, args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise error

    hook = register_module_forward_pre_hook(strike)
    try:
        sampled(model)
    except error:
        return
    finally:
        hook.remove()
    raise AssertionError(f"{error.__name__} inside of the model was swallowed")


# Offloading -----------------------------------------------------------------------------------


@torch.no_grad()
def contract_offload(method: RuntimeMethod, family: str) -> None:
    """Weights moved in and out by layer, by model or by group: it samples the same."""
    given, plain = example(toy(family)), sampled(toy(family))
    wanted = run_with(toy(family), method)
    for name, offload in OFFLOADS.items():
        for first in ("offload", "method"):
            model, undo = toy(family), ExitStack()
            attach = partial(_attach, model, method, undo)
            put = partial(offload, model)
            for step in (put, attach) if first == "offload" else (attach, put):
                step()
            where = f"offloaded by {name}, the {first} put on first,"
            assert torch.equal(sampled(model, given), wanted), f"{where} it samples otherwise"
            undo.close()
            assert torch.equal(sampled(model, given), plain), f"{where} it stays after removal"


def _attach(model: nn.Module, method: RuntimeMethod, undo: ExitStack) -> None:
    undo.enter_context(apply(model, method))


def _by_layer(model: nn.Module) -> None:
    accelerate.cpu_offload(model, CPU)


def _by_model(model: nn.Module) -> None:
    """As pipelines of diffusers do, which put the hook on anew behind every call."""
    _, hook = accelerate.cpu_offload_with_hook(model, CPU)
    hook.remove()
    accelerate.cpu_offload_with_hook(model, CPU)


def _by_group(model: nn.Module) -> None:
    apply_group_offloading(
        model,
        onload_device=CPU,
        offload_device=CPU,
        offload_type="block_level",
        num_blocks_per_group=1,
    )


OFFLOADS: dict[str, Callable[[nn.Module], None]] = {
    "layer": _by_layer,
    "model": _by_model,
    "group": _by_group,
}

RUNTIME_METHODS: tuple[Callable[[RuntimeMethod, str], None], ...] = (
    contract_removal,
    contract_fresh_start,
    contract_next_run,
    contract_attached_copy,
    contract_turns,
    contract_batched_run,
    contract_bfloat16_run,
    contract_autocast_run,
    contract_compiled_blocks,
    contract_threads,
    contract_faults,
    contract_offload,
)

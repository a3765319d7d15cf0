"""What every method must do on every model family that it serves, shown on toy models.

One table for all methods, run by `pared check` and by the tests. Each function takes a method and
the name of a family and raises an AssertionError that says what is wrong.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pared import anatomy, checkpoint
from pared.anatomy import presets
from pared.errors import InputError
from pared.info import Info
from pared.method import Conversion, Handle, Method, RuntimeMethod, convert, stack_of
from pared.method import apply as _apply

Function = Callable[[Any, str], None]  # of a method of the fitting kind, and a family's name

# A batched matrix product adds up in another order than a single one.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}

# Of a run, unless it says otherwise.
STEPS = 8


def cases(record: Info) -> Iterator[tuple[str, Function]]:
    """The functions that a method must pass, each with the family to pass it on."""
    if record.kind in ("objective", "model"):
        return
    table = CONVERSIONS if record.kind == "conversion" else RUNTIME_METHODS
    for family in record.families:
        for function in table:
            yield family, function
    for family in toy_families():
        if family not in record.families:
            yield family, contract_refusal


def toy_families() -> list[str]:
    """The families that have a toy, by name."""
    names = {family.name for family in anatomy.families().values()}
    return sorted(name for name in names if f"toy:{name}" in presets.names())


# Conversions ----------------------------------------------------------------------------------


def contract_weights(method: Conversion, family: str) -> None:
    """Converting keeps the weights, adds names only where the method says, and is strict."""
    before, model = _toy(family), _toy(family)
    claims = method.claims(anatomy.of(model))
    replaced = tuple(f"{claim.site}." for claim in claims if claim.how == "replaces")
    convert(model, method)
    old, new = before.state_dict(), model.state_dict()
    for name, weight in old.items():
        if name not in new:
            assert name.startswith(replaced), f"{name} is gone, outside of what the method replaces"
        elif new[name].shape == weight.shape:
            assert torch.equal(new[name], weight), f"{name} was changed"
        else:
            assert name.startswith(replaced), f"{name} has another shape"
    for name in sorted(new.keys() - old.keys()):
        assert name.startswith(replaced), f"{name} is new, outside of what the method replaces"
    convert(before, method)
    before.load_state_dict(new, strict=True)


def contract_twice(method: Conversion, family: str) -> None:
    """Converting twice is the same as once."""
    model = _converted(method, family)
    modules, weights = dict(model.named_modules()), _weights(model)
    again = type(method)(**method.model_dump(mode="json"))
    assert again == method, "the settings change when they are written down and read again"
    convert(model, again)
    assert dict(model.named_modules()) == modules, "the second time put other modules in"
    _assert_same_weights(model, weights)
    assert stack_of(model) == [method], f"the model carries {stack_of(model)}"


def contract_saving(method: Conversion, family: str) -> None:
    """Saved and loaded, the model gives the same output bit for bit."""
    model = _converted(method, family)
    with tempfile.TemporaryDirectory() as folder:
        again = checkpoint.load(checkpoint.save(model, Path(folder) / "model"))
        assert stack_of(again) == [method], f"the loaded model carries {stack_of(again)}"
        assert not again.training, "the loaded model is in training mode"
        assert torch.equal(_output(again), _output(model)), "the outputs differ"


def contract_gradients(method: Conversion, family: str) -> None:
    """After one optimiser step gradients reach every new parameter that healing trains."""
    old = dict(_toy(family).named_parameters())
    model = convert(_toy(family), method).requires_grad_(True)
    trained = method.trainable(anatomy.of(model))
    parameters = {
        n: p
        for n, p in model.named_parameters()
        if n not in old and any(fnmatch(n, pattern) for pattern in trained)
    }
    # Branches that start at zero hold the gradient back from what comes before them, for one step.
    optimizer = torch.optim.AdamW(parameters.values() or model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        output = _output(model)
        (output * torch.randn(output.shape, generator=_generator())).sum().backward()
        optimizer.step()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} isn't finite"
        assert parameter.grad.any(), f"the gradient of {name} is zero"


def contract_copy(method: Conversion, family: str) -> None:
    """A deep copy of a converted model works, and shares nothing with it."""
    model = _converted(method, family)
    wanted = _output(model)
    twin = copy.deepcopy(model)
    assert torch.equal(_output(twin), wanted), "the copy's output differs"
    # Another size in between: what a copy shared would still be set to that size.
    _output(twin, **anatomy.of(twin).sizes[1])
    assert torch.equal(_output(model), wanted), "a call of the copy changed the original"
    _perturb(twin)
    assert torch.equal(_output(model), wanted), "the original shares weights with its copy"


def contract_compile(method: Conversion, family: str) -> None:
    """torch.compile takes the model in one graph, or each block in one, with the same output."""
    model = _converted(method, family)
    wanted = _output(model)
    torch._dynamo.reset()
    try:
        if anatomy.of(model).compiles_whole:
            model.compile(backend="eager", fullgraph=True)
        else:
            for block in anatomy.of(model).blocks:
                block.module.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(_output(model), wanted, rtol=1e-6, atol=1e-6)
    finally:
        torch._dynamo.reset()


# Run-time methods -----------------------------------------------------------------------------


def contract_removal(method: RuntimeMethod, family: str) -> None:
    """Attached and removed again, it leaves outputs bit-identical and nothing behind."""
    model = _toy(family)
    modules, wanted = dict(model.named_modules()), _sampled(model)
    with apply(model):
        assert torch.equal(_sampled(model), wanted), "applying nothing changed the output"
    with apply(model, method):
        _sampled(model)
    assert torch.equal(_sampled(model), wanted), "the output stays changed after removal"
    assert dict(model.named_modules()) == modules, "other modules are left behind"
    hooks = [n for n, m in modules.items() if m._forward_hooks or "forward" in vars(m)]
    assert not hooks, f"hooks are left on {', '.join(hooks)}"


def contract_fresh_start(method: RuntimeMethod, family: str) -> None:
    """Attached again, it starts afresh: the second sample equals the first."""
    model = _toy(family)
    samples = []
    for _ in range(2):
        with apply(model, method):
            samples.append(_sampled(model))
    assert torch.equal(*samples), "something of the first sample was kept"


def contract_next_run(method: RuntimeMethod, family: str) -> None:
    """A run after others, of other sizes and numbers of steps, equals the first in a process."""
    model = _toy(family)
    runs: list[dict[str, int]] = [{}, anatomy.of(model).sizes[1], {"steps": 5}, {"batch": 2}, {}]
    wanted = []
    for run in runs:
        with apply(model, method):
            wanted.append(_sampled(model, **run))
    with apply(model, method):
        for run, right in zip(runs, wanted, strict=True):
            assert torch.equal(_sampled(model, **run), right), f"run {run} depends on those before"


def contract_turns(method: RuntimeMethod, family: str) -> None:
    """Guidance by two calls in turn gives the same as guidance on a joint batch."""
    model = _toy(family)
    with apply(model, method):
        torch.testing.assert_close(_guided(model, True), _guided(model, False), **ROUNDING)


def contract_attached_copy(method: RuntimeMethod, family: str) -> None:
    """A deep copy carries the method along; taking it off the original leaves the copy alone."""
    model = _toy(family)
    plain = _sampled(model)
    with apply(model, method):
        wanted = _sampled(model)
        twin = copy.deepcopy(model)
        assert torch.equal(_sampled(twin), wanted), "the copy samples otherwise"
    assert torch.equal(_sampled(twin), wanted), "the copy lost the method with the original"
    assert torch.equal(_sampled(model), plain), "the original keeps something of its copy"


def contract_compiled_blocks(method: RuntimeMethod, family: str) -> None:
    """Blocks under torch.compile sample the same."""
    model = _toy(family)
    with apply(model, method):
        wanted = _sampled(model)
        torch._dynamo.reset()
        try:
            for block in anatomy.of(model).blocks:
                block.module.compile(backend="eager")
            torch.testing.assert_close(_sampled(model), wanted, rtol=1e-6, atol=1e-6)
        finally:
            torch._dynamo.reset()


# All methods ----------------------------------------------------------------------------------


def contract_batch(method: Method, family: str) -> None:
    """A batch of two gives the same as its samples one by one."""
    model, attached = _prepared(method, family)
    example = _example(model, batch=2)
    whole = _attached_output(model, attached, *example)
    for i in range(2):
        one = tree_map_only(Tensor, itemgetter(slice(i, i + 1)), example)
        single = _attached_output(model, attached, *one)
        torch.testing.assert_close(whole[i : i + 1], single, **ROUNDING)


def contract_bfloat16(method: Method, family: str) -> None:
    """It runs in bfloat16, all finite, and close to float32."""
    wanted = _prepared_output(method, family, torch.float32)
    output = _prepared_output(method, family, torch.bfloat16)
    assert output.dtype == torch.bfloat16, f"the output is {output.dtype}"
    assert output.isfinite().all(), "the output isn't finite"
    error = (output.float() - wanted).norm() / wanted.norm()
    # Eight bits of mantissa through a few layers: some percent; a wrong path is off by far more.
    assert error < 0.1, f"the output is {error:.0%} away from that in float32"


def contract_autocast(method: Method, family: str) -> None:
    """It runs under autocast to bfloat16, with gradients and without, close to float32."""
    wanted = _prepared_output(method, family, torch.float32)
    model, attached = _prepared(method, family)
    example = _example(model)
    with torch.autocast("cpu", torch.bfloat16):
        with apply(model, *attached):
            outputs = [anatomy.of(model).run(model, *example)]
        outputs.append(_attached_output(model, attached, *example))
    for output in outputs:
        assert output.isfinite().all(), "the output isn't finite"
        error = (output.float() - wanted).norm() / wanted.norm()
        assert error < 0.1, f"the output is {error:.0%} away from that in float32"


def contract_refusal(method: Method, family: str) -> None:
    """A family that the method doesn't serve is refused in one sentence, and left as it was."""
    model = _toy(family)
    modules, weights = dict(model.named_modules()), _weights(model)
    use: Callable[..., Any] = convert if isinstance(method, Conversion) else apply
    try:
        use(model, method)
    except InputError as error:
        text = str(error)
    else:
        raise AssertionError(f"{method.info.slug} took a {family} model without complaint")
    assert "\n" not in text and method.info.slug in text, f"not a clear refusal: {text!r}"
    assert dict(model.named_modules()) == modules, "the refused model was changed"
    _assert_same_weights(model, weights)
    assert not stack_of(model), "the refused model says that it carries the method"


CONVERSIONS: tuple[Function, ...] = (
    contract_weights,
    contract_twice,
    contract_saving,
    contract_batch,
    contract_gradients,
    contract_copy,
    contract_bfloat16,
    contract_autocast,
    contract_compile,
)
RUNTIME_METHODS: tuple[Function, ...] = (
    contract_removal,
    contract_fresh_start,
    contract_next_run,
    contract_turns,
    contract_attached_copy,
    contract_compiled_blocks,
    contract_batch,
    contract_bfloat16,
    contract_autocast,
)


# Toys and how they're called ------------------------------------------------------------------


def apply(model: nn.Module, *methods: RuntimeMethod) -> Handle:
    """`pared.apply`, with the number of steps told to methods that must know: no toy tells it."""
    told = (
        m.model_copy(update={"steps": STEPS}) if getattr(m, "steps", STEPS) is None else m
        for m in methods
    )
    return _apply(model, *told)


def _toy(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    # One draw for all types, cast by torch's own `to`: that of diffusers warns of nothing.
    return nn.Module.to(presets.build(f"toy:{family}", device="cpu"), dtype)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _converted(method: Conversion, family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A converted toy, its weights stirred: branches that start at zero would hide mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = convert(_toy(family, dtype), method)
    _perturb(model)
    return model.eval()


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    generator = _generator()
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))


def _prepared(
    method: Method, family: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, tuple[RuntimeMethod, ...]]:
    """A toy for a method of any kind, and the run-time methods to attach to it."""
    if isinstance(method, Conversion):
        return _converted(method, family, dtype), ()
    return _toy(family, dtype), (cast(RuntimeMethod, method),)


def _prepared_output(method: Method, family: str, dtype: torch.dtype) -> Tensor:
    model, attached = _prepared(method, family, dtype)
    return _attached_output(model, attached, *_example(model))


@torch.no_grad()
def _attached_output(
    model: nn.Module, attached: tuple[RuntimeMethod, ...], *example: Any
) -> Tensor:
    with apply(model, *attached):
        return anatomy.of(model).run(model, *example)


def _example(model: nn.Module, **size: int) -> tuple[Any, ...]:
    family = anatomy.of(model)
    return family.example(**(family.sizes[0] | size), generator=_generator())


def _output(model: nn.Module, **size: int) -> Tensor:
    """The output of one call on fixed inputs; with its graph where weights want gradients."""
    return anatomy.of(model).run(model, *_example(model, **size))


def _times(steps: int) -> list[int]:
    return [round(950 - number * 900 / steps) for number in range(steps)]


@torch.no_grad()
def _sampled(model: nn.Module, steps: int = STEPS, **size: int) -> Tensor:
    """A few denoising steps on fixed inputs, so that what is kept between steps comes to bear."""
    family = anatomy.of(model)
    latents, timestep, condition = _example(model, **size)
    for time in _times(steps):
        latents = latents - 0.1 * family.denoise(
            model, latents, torch.full_like(timestep, time), condition
        )
    return latents


@torch.no_grad()
def _guided(model: nn.Module, joint: bool) -> Tensor:
    """The same with guidance, on a joint batch or by calls in turn."""
    family = anatomy.of(model)
    latents, timestep, condition = _example(model, batch=2)
    condition = {name: entry.clone() for name, entry in condition.items()}
    latents = latents[:1]
    for time in _times(STEPS):
        now = torch.full_like(timestep, time)
        if joint:
            pair = family.denoise(model, torch.cat([latents, latents]), now, condition)
        else:
            parts = [{k: v[i : i + 1] for k, v in condition.items()} for i in range(2)]
            pair = torch.cat([family.denoise(model, latents, now[:1], part) for part in parts])
        latents = latents - 0.1 * (pair[:1] + 2 * (pair[1:] - pair[:1]))
    return latents


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def _assert_same_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == weights.keys(), "weights came or went"
    changed = [name for name, weight in weights.items() if not torch.equal(now[name], weight)]
    assert not changed, f"{changed[0]} was changed"

"""What every method must do on every model family that it serves, shown on toy models.

One table for all methods, run by `pared check` and by the tests. Each function takes a method and
the name of a family and raises an AssertionError that says what is wrong. Those for run-time
methods stand in `contract_runtime`.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pared import anatomy, checkpoint
from pared.bench.contract_runtime import RUNTIME_METHODS
from pared.bench.contract_toys import (
    ROUNDING,
    apply,
    example,
    generator,
    output,
    require_close,
    toy,
    toy_families,
)
from pared.errors import InputError
from pared.info import Info
from pared.method import Conversion, Method, convert, stack_of

Function = Callable[[Any, str], None]  # of a method of the fitting kind, and a family's name


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


# Conversions ----------------------------------------------------------------------------------


def contract_weights(method: Conversion, family: str) -> None:
    """Converting keeps the weights, adds names only where the method says, and is strict."""
    before, model = toy(family), toy(family)
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
        assert torch.equal(output(again), output(model)), "the outputs differ"


def contract_gradients(method: Conversion, family: str) -> None:
    """After one optimiser step gradients reach every new parameter that healing trains."""
    old = dict(toy(family).named_parameters())
    model = convert(toy(family), method).requires_grad_(True)
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
        found = output(model)
        (found * torch.randn(found.shape, generator=generator())).sum().backward()
        optimizer.step()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} isn't finite"
        assert parameter.grad.any(), f"the gradient of {name} is zero"


def contract_copy(method: Conversion, family: str) -> None:
    """A deep copy of a converted model works, and shares nothing with it."""
    model = _converted(method, family)
    wanted = output(model)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin), wanted), "the copy's output differs"
    # Another size in between: what a copy shared would still be set to that size.
    output(twin, **anatomy.of(twin).sizes[1])
    assert torch.equal(output(model), wanted), "a call of the copy changed the original"
    _perturb(twin)
    assert torch.equal(output(model), wanted), "the original shares weights with its copy"


def contract_compile(method: Conversion, family: str) -> None:
    """torch.compile takes the model in one graph, or each block in one, with the same output."""
    model = _converted(method, family)
    wanted = output(model)
    torch._dynamo.reset()
    try:
        if anatomy.of(model).compiles_whole:
            model.compile(backend="eager", fullgraph=True)
        else:
            for block in anatomy.of(model).blocks:
                block.module.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(output(model), wanted, rtol=1e-6, atol=1e-6)
    finally:
        torch._dynamo.reset()


def contract_batch(method: Conversion, family: str) -> None:
    """A batch of two gives the same as its samples one by one."""
    model = _converted(method, family)
    both = example(model, batch=2)
    whole = _run(model, *both)
    for i in range(2):
        one = tree_map_only(Tensor, itemgetter(slice(i, i + 1)), both)
        torch.testing.assert_close(whole[i : i + 1], _run(model, *one), **ROUNDING)


def contract_bfloat16(method: Conversion, family: str) -> None:
    """It runs in bfloat16, all finite, and close to float32."""
    with torch.no_grad():
        wanted = output(_converted(method, family))
        found = output(_converted(method, family, torch.bfloat16))
    assert found.dtype == torch.bfloat16, f"the output is {found.dtype}"
    require_close(found, wanted)


def contract_autocast(method: Conversion, family: str) -> None:
    """It runs under autocast to bfloat16, with gradients and without, close to float32."""
    model = _converted(method, family)
    with torch.no_grad():
        wanted = output(model)
    for gradients in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
            require_close(output(model), wanted)


def contract_refusal(method: Method, family: str) -> None:
    """A family that the method doesn't serve is refused in one sentence, and left as it was."""
    model = toy(family)
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

# Converted toys -------------------------------------------------------------------------------


def _converted(method: Conversion, family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A converted toy, its weights stirred: branches that start at zero would hide mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = convert(toy(family, dtype), method)
    _perturb(model)
    return model.eval()


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    seeded = generator()
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=seeded).to(parameter))


@torch.no_grad()
def _run(model: nn.Module, *inputs: Any) -> Tensor:
    return anatomy.of(model).run(model, *inputs)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def _assert_same_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == weights.keys(), "weights came or went"
    changed = [name for name, weight in weights.items() if not torch.equal(now[name], weight)]
    assert not changed, f"{changed[0]} was changed"

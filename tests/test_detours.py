"""Detours around modules, and what else gets at a forward: hooks, adapters, compilers, threads."""

import copy
import threading
from contextlib import ExitStack
from itertools import permutations
from types import MethodType

import accelerate
import accelerate.hooks
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from pared import anatomy
from pared.anatomy import presets
from pared.bench.contract_runtime import OFFLOADS
from pared.errors import InputError
from pared.runtime import Clock, Detour, detour

CPU = torch.device("cpu")


class Digit:
    """Goes around a module and writes a digit behind what it gives."""

    def __init__(self, digit):
        self.digit = digit

    def __call__(self, own, x):
        return 10 * own(x) + self.digit


class Alternate:
    """A run-time method: every branch computes at even steps, and gives the same at odd ones."""

    def __init__(self, target, whole=False):
        self.undo = ExitStack()
        self.clock = Clock(target, self.undo)
        self.clock.on_call = self.decide
        model = anatomy.unwrap(getattr(target, "transformer", target))
        branches = anatomy.of(model).branches
        self.paths = ["model"] if whole else [branch.path for branch in branches]
        for path, module in [("model", model)] if whole else [(b.path, b.module) for b in branches]:
            detour(module, Site(self.clock, path), self.undo)

    def decide(self):
        reuse = self.clock.step % 2 and "kept" in self.clock.kept
        self.clock.kept["kept"] = True
        self.clock.done.update(dict.fromkeys(self.paths, "reused" if reuse else "computed"))
        return "reuse" if reuse else "compute"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo.close()


class Site:
    def __init__(self, clock, path):
        self.clock, self.path = clock, path

    def __call__(self, own, *args, **kwargs):
        kept = self.clock.kept
        if self.clock.plan == "compute":
            kept[self.path] = own(*args, **kwargs)
        return kept[self.path]


@pytest.fixture
def model():
    return presets.build("toy:pixart", device="cpu")


@torch.no_grad()
def sample(model, steps=4, seed=0, before=lambda step: None):
    family = anatomy.of(model)
    # The twin's weights are never moved anywhere.
    twin = presets.build(f"toy:{family.name}", device="cpu")
    latents, timestep, condition = anatomy.of(twin).example(
        1, 8, 8, text_tokens=4, generator=torch.Generator().manual_seed(seed)
    )
    for step in range(steps):
        before(step)
        now = torch.full_like(timestep, 900 - 800 * step // steps)
        latents = latents - 0.1 * family.denoise(model, latents, now, condition)
    return latents


def reused(model, **run):
    """A sample with the method attached to a model of its own."""
    with Alternate(model) as method:
        found = sample(model, **run)
    assert method.clock.stats["reused"] > 0
    return found


def is_plain(module):
    return module.forward == MethodType(type(module).forward, module)


def written(digits):
    """What detours that write these digits make of 0, the innermost first."""
    return float("".join(map(str, digits)) or 0)


# Order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", permutations((1, 2, 3)), ids=str)
def test_detours_come_off_in_any_order(order):
    module, left = nn.Identity(), [1, 2, 3]
    undo = {digit: ExitStack() for digit in left}
    for digit in left:
        detour(module, Digit(digit), undo[digit])
    for digit in order:
        assert module(torch.zeros(())) == written(left)
        undo[digit].close()
        left.remove(digit)
    assert module(torch.zeros(())) == 0
    assert "forward" not in vars(module)


class Accelerate:
    def put(self, module):
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())

    def take(self, module):
        accelerate.hooks.remove_hook_from_module(module)


class Diffusers:
    def put(self, module):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(self.hook(), "hook")

    def take(self, module):
        module._diffusers_hook.remove_hook("hook")

    def hook(self):
        return ModelHook()


class DiffusersInPlace(Diffusers):
    """A hook that calls the forward itself."""

    def hook(self):
        class InPlace(ModelHook):
            def new_forward(self, module, x):
                return self.fn_ref.original_forward(x)

        return InPlace()


@pytest.mark.parametrize("library", [Accelerate(), Diffusers(), DiffusersInPlace()])
@pytest.mark.parametrize("order", permutations(("hook", 1, 2)), ids=str)
@pytest.mark.parametrize("back", permutations(("hook", 1, 2)), ids=str)
def test_detours_and_hooks_of_others_come_and_go_in_any_order(library, order, back):
    module, digits = nn.Identity(), []
    undo = {1: ExitStack(), 2: ExitStack()}
    for each in order:
        if each == "hook":
            library.put(module)
        else:
            detour(module, Digit(each), undo[each])
            digits.append(each)
    assert module(torch.zeros(())) == written(digits)
    for each in back:
        if each == "hook":
            library.take(module)
        else:
            undo[each].close()
            digits.remove(each)
        assert module(torch.zeros(())) == written(digits)
    assert is_plain(module)


def test_under_a_wrapper_of_any_kind_a_detour_ends():
    module = nn.Identity()
    with ExitStack() as undo:
        detour(module, Digit(1), undo)
        own = module.forward
        module.forward = lambda x: own(x) + 5
        assert module(torch.zeros(())) == 6
    assert module(torch.zeros(())) == 5
    module.forward = own  # as a wrapper does that is taken off
    assert module(torch.zeros(())) == 0


@pytest.mark.parametrize("hook", [False, True])
def test_a_copy_goes_around_its_own_forward(hook):
    module, undo = nn.Linear(1, 1), ExitStack()
    if hook:
        Accelerate().put(module)
    detour(module, Digit(1), undo)
    twin = copy.deepcopy(module)
    nn.init.ones_(twin.weight), nn.init.zeros_(twin.bias)
    undo.close()
    assert twin(torch.full((1,), 3.0)) == 31
    assert isinstance(vars(twin)["_old_forward" if hook else "forward"], Detour)
    assert not torch.equal(module(torch.full((1,), 3.0)), twin(torch.full((1,), 3.0)))


# Offloading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["offload", "method"])
def test_weights_that_are_moved_layer_by_layer(model, first):
    wanted, plain = reused(model), sample(model)
    undo = ExitStack()
    steps = [
        lambda: accelerate.cpu_offload(model, CPU),
        lambda: undo.enter_context(Alternate(model)),
    ]
    for step in steps if first == "offload" else reversed(steps):
        step()
    assert next(model.parameters()).device.type == "meta"
    assert torch.equal(sample(model), wanted)
    undo.close()
    assert torch.equal(sample(model), plain)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert all(is_plain(module) for module in model.modules())


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_whose_hook_is_put_on_anew_after_every_run(model, whole):
    """What `enable_model_cpu_offload` of diffusers does behind a call of the pipeline."""
    with Alternate(model, whole):
        wanted = sample(model)
    plain = sample(model)
    _, hook = accelerate.cpu_offload_with_hook(model, CPU)
    with Alternate(model, whole) as method:
        for run in range(3):
            assert torch.equal(sample(model), wanted)
            assert method.clock.stats["reused"] == 2 * (run + 1) * len(method.paths)
            hook.remove()
            _, hook = accelerate.cpu_offload_with_hook(model, CPU)
    assert torch.equal(sample(model), plain)
    hook.remove()
    assert all(is_plain(module) for module in model.modules())


@pytest.mark.parametrize("first", ["offload", "method"])
def test_groups_of_layers_that_are_moved_together(model, first):
    wanted, plain = reused(model), sample(model)
    undo = ExitStack()
    steps = [lambda: OFFLOADS["group"](model), lambda: undo.enter_context(Alternate(model))]
    for step in steps if first == "offload" else reversed(steps):
        step()
    assert torch.equal(sample(model), wanted)
    undo.close()
    assert torch.equal(sample(model), plain)


# Runs that end early, copies, threads -------------------------------------------------------------


def test_a_run_after_one_that_failed_in_mid_step_equals_the_first(model):
    wanted = reused(model)
    with Alternate(model):
        for failing in range(4):
            model.transformer_blocks[1].ff.register_forward_pre_hook(Bomb(failing))
            with pytest.raises(ZeroDivisionError):
                sample(model)
            model.transformer_blocks[1].ff._forward_pre_hooks.clear()
            assert torch.equal(sample(model), wanted)


class Bomb:
    """A hook that raises at one of its calls."""

    def __init__(self, call):
        self.left = call

    def __call__(self, module, args):
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError


def test_a_copy_reuses_what_it_kept_itself(model):
    wanted, plain = reused(model), sample(model)
    with Alternate(model) as method:
        sample(model, steps=3)
        twin = copy.deepcopy(model)
        assert torch.equal(sample(twin), wanted)
        assert method.clock.stats["runs"] == 1
        nn.init.zeros_(twin.proj_out.weight)
        assert torch.equal(sample(model), wanted)
    assert torch.equal(sample(model), plain)
    assert not torch.equal(sample(twin), wanted)


def test_threads_that_share_a_denoiser_keep_apart(model):
    """Two runs of different lengths, whose calls begin together."""
    runs = ({"steps": 4, "seed": 1}, {"steps": 6, "seed": 2})
    wanted = [reused(model, **run) for run in runs]
    found, together = {}, threading.Barrier(2, timeout=30)

    def work(index):
        found[index] = sample(
            model, **runs[index], before=lambda step: together.wait() if step < 4 else None
        )

    with Alternate(model) as method:
        threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    stats = method.clock.stats
    assert (stats["runs"], stats["calls"]) == (2, 10)
    assert stats["computed"] == stats["reused"] == 5 * len(method.paths)


# Adapters -----------------------------------------------------------------------------------------


def adapt(model, *layers):
    """Put a LoRA into layers of a model, which adds something from the start."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(target_modules=list(layers), init_lora_weights=False), "lora")
    return model.eval()


def unscaled(model):
    model.set_adapters("lora", 0.25)


def disabled(model):
    model.disable_adapters()


def fused(model):
    model.fuse_lora(adapter_names=["lora"])


# Of diffusers' class for PixArt adapters can't be asked.
@pytest.fixture
def adaptable():
    return presets.build("toy:sd3", device="cpu")


@pytest.mark.parametrize("change", [unscaled, disabled, fused])
def test_what_was_kept_under_other_adapters_is_dropped(adaptable, change):
    model = adapt(adaptable, "to_q", "to_v", "ff.net.0.proj")
    with Alternate(model) as method:
        sample(model, before=lambda step: change(model) if step == 1 else None)
    stats, paths = method.clock.stats, len(method.paths)
    assert (stats["computed"], stats["reused"]) == (3 * paths, paths)
    with Alternate(model) as method:
        sample(model)
    assert method.clock.stats["reused"] == 2 * paths


def test_adapters_that_come_and_go_between_runs(adaptable):
    wanted = reused(adaptable)
    with Alternate(adaptable):
        assert torch.equal(sample(adaptable), wanted)
        adapt(adaptable, "to_q", "to_v", "ff.net.0.proj")
        found = sample(adaptable)
        adaptable.delete_adapters("lora")
        assert torch.equal(sample(adaptable), wanted)
    assert not torch.equal(found, wanted)
    assert torch.equal(found, reused(adapt(adaptable, "to_q", "to_v", "ff.net.0.proj")))


def test_an_adapter_in_the_very_layer_that_is_gone_around():
    """FLUX adds what a linear layer gives in its one-stream blocks, and adapters replace such."""
    model = presets.build("toy:flux", device="cpu")
    adapted = adapt(presets.build("toy:flux", device="cpu"), "proj_out", "proj_mlp")
    with Alternate(model):
        sample(model)
        adapt(model, "proj_out", "proj_mlp")
        with pytest.raises(InputError, match=r"was replaced since .* attach it again"):
            sample(model)
    with Alternate(model):
        assert torch.equal(sample(model), reused(adapted))
        model.unload_lora()
        with pytest.raises(InputError, match="was replaced since"):
            sample(model)
    assert all(is_plain(module) for module in model.modules())


# Compilers ----------------------------------------------------------------------------------------


class Counting:
    """A backend for torch.compile that runs what it gets, and counts."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield Counting()
    torch._dynamo.reset()


# Tracing takes seconds: by default two of the six.
WAYS = [("blocks", "compiler"), ("model", "method")]
WAYS += [
    pytest.param(part, first, marks=pytest.mark.slow)
    for part in ("blocks", "model", "wrapper")
    for first in ("compiler", "method")
    if (part, first) not in WAYS
]


@pytest.mark.parametrize(("part", "first"), WAYS)
def test_compiled_models_reuse_the_same(model, backend, part, first):
    wanted, longer, plain = reused(model), reused(model, steps=8), sample(model)
    called, undo = model, ExitStack()

    def compile():
        nonlocal called
        if part == "blocks":
            for block in anatomy.of(model).blocks:
                block.module.compile(backend=backend)
        elif part == "model":
            model.compile(backend=backend)
        else:
            called = torch.compile(model, backend=backend)
        torch.testing.assert_close(sample(called), wanted if first == "method" else plain)

    steps = [compile, lambda: undo.enter_context(Alternate(model))]
    for step in steps if first == "compiler" else reversed(steps):
        step()
    torch.testing.assert_close(sample(called), wanted)
    graphs = backend.graphs
    torch.testing.assert_close(sample(called, steps=8), longer)
    assert backend.graphs == graphs, "more steps made more graphs"
    undo.close()
    torch.testing.assert_close(sample(called), plain)


def test_many_blocks_compiled_one_by_one_have_graphs_for_each_plan_and_block(backend):
    model = presets.build("toy:pixart", device="cpu", layers=5)
    with Alternate(model) as method, torch._dynamo.config.patch(recompile_limit=15):
        wanted = sample(model)
        for block in anatomy.of(model).blocks:
            block.module.compile(backend=backend)
        for _ in range(2):
            torch.testing.assert_close(sample(model), wanted)
            # Where the branches keep something for the first time is a plan of its own.
            assert backend.graphs <= 5 * 3
    assert method.clock.stats["reused"] > 0

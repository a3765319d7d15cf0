"""What a method is: its settings, the sites it claims, its spec, and how methods combine."""

from __future__ import annotations

import difflib
import importlib.metadata
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from pared import anatomy, info
from pared.errors import InputError
from pared.info import Info

if TYPE_CHECKING:
    from torch import nn

    from pared.anatomy import Family

__all__ = [
    "Claim", "Conversion", "Handle", "Method", "Model", "RuntimeMethod",
    "apply", "convert", "denoiser", "parse", "stack_of",
]  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """What a method does to one site.

    Attributes:
        site: dotted path of the site in the model; or "guidance", "step_loop", or "denoiser" for
            the denoiser as a whole.
        how: "replaces" what computes there; "reuses" earlier results of it; "reads" them only.
        aspect: what of the site is meant: its "output", or the softmax "map" inside an attention.
    """

    site: str
    how: Literal["replaces", "reuses", "reads"]
    aspect: Literal["output", "map"] = "output"

    def clashes(self, earlier: Claim) -> bool:
        """Whether this claim can't be honoured once `earlier` is in force."""
        if self.site != earlier.site:
            return False
        hows = {self.how, earlier.how}
        if "map" in (self.aspect, earlier.aspect):
            # A replaced attention has no softmax map left to reuse or read.
            return "replaces" in hows or (hows == {"reuses"} and self.aspect == earlier.aspect)
        return hows in ({"replaces"}, {"reuses"})


class Method(BaseModel, ABC):
    """Settings of one published method: frozen, validated, JSON-serialisable.

    Fields carry the paper's names, defaults and units. Subclasses set `info`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    info: ClassVar[Info]

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise InputError(_sentence(type(self), error)) from None

    @abstractmethod
    def claims(self, family: Family) -> list[Claim]:
        """The sites that this method works on in a model, and how.

        Raises:
            InputError: the method can't serve this model; the message says why and what it serves.
        """

    def spec(self) -> str:
        """The method as it is written on the command line, with what differs from the defaults."""
        changed = self.model_dump(mode="json", exclude_defaults=True)
        if not changed:
            return self.info.slug
        settings = ",".join(f"{k}={_spec_value(v)}" for k, v in changed.items())
        return f"{self.info.slug}:{settings}"


class Conversion(Method):
    """Changes what a model is made of. Saved with the model.

    Attributes:
        passes: calls of the denoiser per step that a converted model needs, guidance included,
            where the method settles that.
        learning_rate: of AdamW, by which healing trains unless it is given another.
    """

    passes: ClassVar[int | None] = None
    learning_rate: ClassVar[float] = 1e-4

    @property
    def serves(self) -> int:
        """Tasks that one converted model does."""
        return 1

    @abstractmethod
    def convert(self, model: nn.Module) -> None:
        """Change `model` in place, weights carried over.

        Called once, after the claims were found free of clashes.
        """

    def trainable(self, family: Family) -> tuple[str, ...]:
        """What healing trains, as glob patterns of parameter names: all that was replaced."""
        return tuple(f"{c.site}.*" for c in self.claims(family) if c.how == "replaces")

    def healing(self, task: Any) -> Any:
        """How the paper trains the changed model: an objective, to be bound to its teacher.

        Args:
            task: a `pared.objectives.denoising.Denoising`, what the denoiser predicts.
        """
        raise InputError(f"{self.info.slug} changes no outputs and needs no healing.")


class RuntimeMethod(Method):
    """Changes how a pipeline runs. No weights, fully reversible."""

    @abstractmethod
    def attach(self, pipeline: Any) -> Handle:
        """Attach to a pipeline or denoiser; the handle's `remove` undoes it, bit for bit."""


class Model(Method):
    """Is a model of its own, cheap by construction. It works on no other model."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model, with random weights."""

    def claims(self, family: Family) -> list[Claim]:
        raise family.refuse(self.info.slug, "it is a model of its own and changes no other one.")


@dataclass
class Handle:
    """One or more attached run-time methods. Use as a context, or keep it and call `remove`."""

    undo: ExitStack
    methods: tuple[Method, ...] = ()
    stats: dict[str, Any] = field(default_factory=dict)

    def remove(self) -> None:
        """Take the methods off again."""
        self.undo.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


# Combining
# --------------------------------------------------------------------------------------------------


def convert(target: Any, *methods: Conversion) -> Any:
    """Convert a denoiser, or the denoiser of a pipeline, in place.

    Converting again with what the model already carries does nothing.

    Args:
        target: a model that `pared.anatomy` reads, or a diffusers pipeline that holds one.
        methods: conversions, applied in this order.

    Returns:
        `target`.

    Raises:
        InputError: a method doesn't fit the model, or two methods want the same site; nothing is
            changed then.
    """
    model = anatomy.unwrap(denoiser(target))
    family = anatomy.of(model)
    fresh = [m for m in methods if m not in stack_of(model)]
    for method in fresh:
        if isinstance(method, RuntimeMethod):
            raise InputError(
                f"{method.info.slug} is a run-time method: use pared.apply, not pared.convert."
            )
    before = [*stack_of(model), *attached_to(model)]
    check_claims(family, [*before, *fresh], len(before))
    known = model.state_dict(keep_vars=True)
    for method in fresh:
        method.convert(model)
        cast(Any, model).pared_stack = [*stack_of(model), method]
    # What was only moved, into a wrapper say, is the same tensor under a new name.
    old = {id(weight) for weight in known.values()}
    now = model.state_dict(keep_vars=True)
    new = {name for name in now.keys() - known.keys() if id(now[name]) not in old}
    note_drawn(model, drawn_in(model) | new)
    return target


def apply(
    pipeline: Any,
    *methods: RuntimeMethod,
    offload: Literal["cpu"] | None = None,
    budget: int | str | None = None,
    dtype: str | None = None,
) -> Handle:
    """Attach run-time methods to a pipeline or a denoiser.

    Args:
        pipeline: of diffusers, or a denoiser; a method goes on both denoisers where there are two.
        methods: to attach.
        offload: "cpu" keeps what the methods reuse in main memory, or as much of it as the budget
            leaves no room for; it's back on the device while it's needed.
        budget: bytes that all of them may keep on the device, as a number or a text such as "2GB".
            A run that needs more, and may not offload, is ended by an error and not slowed down.
        dtype: to keep in what has a finer type: "float16", "bfloat16" or "float32".

    Returns:
        A handle; used as a context it takes the methods off at the end.

    Raises:
        InputError: a method matches nothing, or two methods (those included that the model was
            converted with or has attached) want the same site, or one keeps what it reuses in a
            way of its own, which nothing here reaches; nothing is attached then.
    """
    from pared.keeping import keeping  # imports torch, which a list of methods needn't wait for

    how, models = keeping(offload, budget, dtype), denoisers(pipeline)
    for method in methods:
        if isinstance(method, Conversion):
            raise InputError(
                f"{method.info.slug} changes weights: use pared.convert, not pared.apply."
            )
    for model in models:
        before = [*stack_of(model), *attached_to(model)]
        check_claims(anatomy.of(model), [*before, *methods], len(before))
    stats: dict[str, Any] = {}
    with ExitStack() as stack, how.at_work() if how else nullcontext():
        for method in methods:
            clocks: list[Any] = []
            asked = how.clocks if how else 0
            for model in models:
                target = pipeline if len(models) == 1 else Stage(pipeline, model, clocks)
                handle = stack.enter_context(method.attach(target))
                stats.setdefault(method.info.slug, handle.stats)
                bare: Any = anatomy.unwrap(model)
                bare.pared_attached = [*attached_to(bare), method]
                stack.callback(_detach, bare, method)
            if how and how.clocks == asked:
                raise InputError(
                    f"{method.info.slug} keeps what it reuses in a way of its own, which offload, "
                    "budget and dtype don't reach; leave them out."
                )
        return Handle(stack.pop_all(), tuple(methods), stats)


def check_claims(family: Family, methods: Sequence[Method], already: int = 0) -> None:
    """Refuse the first clash between methods in order; the first `already` are in force already."""
    held: list[tuple[Claim, Method]] = []
    for number, method in enumerate(methods):
        if number >= already:
            _require_kind(family, method)
        claims = method.claims(family)
        if number >= already and not (claims and family.name in method.info.families):
            served = ", ".join(method.info.families)
            found = "" if claims else "it finds no site there; "
            raise family.refuse(method.info.slug, f"{found}it serves the families {served}.")
        for claim in claims if number >= already else ():
            for earlier, owner in held:
                if claim.clashes(earlier):
                    raise InputError(
                        f"{method.info.slug} {claim.how} {claim.site}, which {owner.info.slug} "
                        f"already {earlier.how}; use one of them there, or give them different "
                        "layers."
                    )
        held += [(claim, method) for claim in claims]


def _require_kind(family: Family, method: Method) -> None:
    """Refuse a method made for models of another kind, before it looks for sites.

    Blocks and attentions are found in a speech encoder as in a denoiser, and a method for one of
    the two would take the other for its own.
    """
    known = anatomy.families().values()
    kinds = {other.kind for other in known if other.name in method.info.families}
    if kinds and family.kind not in kinds:
        served = ", ".join(method.info.families)
        raise family.refuse(
            method.info.slug, f"it is a {family.kind}, and the method serves {served}."
        )


def stack_of(model: nn.Module) -> list[Conversion]:
    """The conversions that a model carries, in order."""
    return list(getattr(anatomy.unwrap(model), "pared_stack", []))


def drawn_in(model: nn.Module) -> frozenset[str]:
    """Names of weights and buffers that a model's conversions made, and nothing has set since.

    Their values may be any: training begins from them, or a file fills them.
    """
    return getattr(anatomy.unwrap(model), "pared_drawn", frozenset())


def note_drawn(model: nn.Module, names: Iterable[str]) -> None:
    """Say what `drawn_in` of a model is from here on."""
    cast(Any, anatomy.unwrap(model)).pared_drawn = frozenset(names)


def attached_to(model: nn.Module) -> list[RuntimeMethod]:
    """The run-time methods that `apply` attached to a model, and that are on it still."""
    return list(getattr(anatomy.unwrap(model), "pared_attached", []))


def _detach(model: nn.Module, method: RuntimeMethod) -> None:
    left = [other for other in attached_to(model) if other is not method]
    cast(Any, model).pared_attached = left


class Stage:
    """A pipeline that has two denoisers, as a method sees it that knows of one.

    Wan 2.2 begins a run with its `transformer` and ends it with its `transformer_2`.

    Args:
        pipeline: of diffusers.
        model: one of its denoisers.
        clocks: of one method, in the order of the denoisers that they are on.
    """

    def __init__(self, pipeline: Any, model: nn.Module, clocks: list[Any]) -> None:
        self.pipeline, self.transformer, self.clocks = pipeline, model, clocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)


def denoisers(target: Any) -> list[nn.Module]:
    """All denoisers of a pipeline, in the order in which a run goes through them."""
    first = denoiser(target)
    if target is first or isinstance(target, Stage):
        return [first]
    second = getattr(target, "transformer_2", None)
    return [first] if second is None or second is first else [first, second]


def denoiser(target: Any) -> nn.Module:
    """The denoiser of a pipeline (`transformer` or `unet`), or the model itself.

    Of two, the one that begins.
    """
    for name in ("transformer", "transformer_2", "unet"):
        if (model := getattr(target, name, None)) is not None and hasattr(target, "components"):
            return cast("nn.Module", model)
    if hasattr(target, "components"):
        raise InputError(
            f"{type(target).__name__} has neither a transformer nor a unet; give the denoiser "
            "itself."
        )
    return cast("nn.Module", target)


def replace_denoiser(pipeline: Any, model: nn.Module) -> None:
    """Put `model` in the place of a pipeline's denoiser."""
    old = denoiser(pipeline)
    name = next(name for name, part in pipeline.components.items() if part is old)
    setattr(pipeline, name, model)


# Specs
# --------------------------------------------------------------------------------------------------


def parse(spec: str) -> Method:
    """A method from its spec, e.g. `edit` or `edit:r=8,key=none`.

    Values are JSON where they look like it (numbers, true, lists), otherwise text. Commas inside
    brackets don't split.

    Raises:
        InputError: unknown method or setting, or a value out of range.
    """
    slug, _, rest = spec.partition(":")
    cls = info.get(slug.strip()).load()
    settings = {}
    for part in _split(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(
                f"{spec!r}: {part!r} has no value; write settings as name=value, separated by "
                "commas."
            )
        settings[key.strip()] = _value(value.strip())
    method: Method = cls(**settings)
    return method


def _split(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for index, char in enumerate(text + ","):
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            if part := text[start:index].strip():
                yield part
            start = index + 1


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _spec_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _sentence(cls: type[Method], error: ValidationError) -> str:
    """One sentence from a pydantic error: what was given, what is allowed, what the default is."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    slug = cls.info.slug
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, cls.model_fields, n=1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"it has {', '.join(cls.model_fields) or 'none'}."
        )
        return f"{slug} has no setting {name!r}; {hint}"
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if name not in cls.model_fields:
        return f"{slug}: {message}."
    known = cls.model_fields[name]
    default = "" if known.is_required() else f" (the default is {known.default!r})"
    message = message[0].lower() + message[1:]
    return f"{slug}: {name}={first['input']!r} doesn't work: {message}{default}."


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a saved model means."""
    names = ("pared", "torch", "diffusers", "transformers")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

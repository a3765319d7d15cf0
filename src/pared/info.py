"""Records that describe methods, readable without importing torch.

Each method's file has one module-level `INFO = Info(...)` written in literals. `registry()` finds
these by parsing the files, so listing sixty methods costs milliseconds and a new method registers
itself by existing.
"""

import ast
import difflib
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pared.errors import InputError

# The rooms that hold methods: one per factor of the bill.
FOLDERS = (
    "attention",
    "caching",
    "guidance",
    "few_step",
    "experts",
    "compression",
    "tuning",
    "objectives",
    "models",
    "tasks",
    "speech",
    "parallel",
)


@dataclass(frozen=True)
class Headline:
    """One claim of a paper, as a number that can be measured again.

    Attributes:
        key: short name, unique within the method; results are stored under it.
        text: the claim in words, with its conditions.
        paper: the paper's value.
        direction: what must hold here for the claim to hold: our value at least ("higher") or at
            most ("lower") `bound`.
        bound: the value that decides at our scale; a claim's sense, not always the paper's own
            number.
    """

    key: str
    text: str
    paper: float
    direction: Literal["higher", "lower"]
    bound: float


@dataclass(frozen=True)
class Info:
    """What a method is, in facts.

    Attributes:
        slug: name in specs, files and results.
        title: title of the paper.
        arxiv: arXiv id, or "" where there is none.
        venue: where and when it appeared.
        kind: "conversion", "runtime", "objective" or "model".
        families: anatomy families that it serves; none where it's a model of its own.
        training: whether something must train for the method to be of use.
        trained_by: what trains it: "heal" (`pared heal`), "recipe" (`pared train`) or "route"
            (`pared route`, which leaves the model as it is).
        exact: whether outputs stay the same (up to rounding).
        maturity: "faithful", "partial" or "experimental".
        summary: one line.
        cls: name of the class in the same file.
        headlines: the paper's claims.
        grid: settings that span what a run-time method trades, as specs; "" is the defaults. A
            frontier measures them all, and a fit chooses among them.
        folder: the room it lives in (filled in by the registry).
        module: dotted path of its file (filled in by the registry).
    """

    slug: str
    title: str
    arxiv: str
    venue: str
    kind: Literal["conversion", "runtime", "objective", "model"]
    families: tuple[str, ...]
    training: bool
    exact: bool
    maturity: Literal["faithful", "partial", "experimental"]
    summary: str
    cls: str
    headlines: tuple[Headline, ...] = ()
    grid: tuple[str, ...] = ()
    trained_by: Literal["heal", "recipe", "route"] = "heal"
    folder: str = ""
    module: str = ""

    @property
    def effect(self) -> str:
        """What it does to outputs, and what it asks of the model, in words."""
        if self.kind == "model":
            return "a model of its own, to be trained"
        if self.kind == "objective":
            return "a way of training; the model stays what it is made of"
        outputs = "outputs stay the same" if self.exact else "outputs change"
        if not self.training:
            return f"{outputs}; the model needs no training"
        if self.trained_by == "route":
            return f"{outputs}; the model stays as it is, and a small table is learnt (pared route)"
        by = {"heal": "pared heal", "recipe": "by a recipe, pared train"}[self.trained_by]
        return f"{outputs}; the model has to be trained after it ({by})"

    def load(self) -> type:
        """The method's class. Imports torch."""
        cls: type = getattr(importlib.import_module(self.module), self.cls)
        return cls


@cache
def registry() -> dict[str, Info]:
    """Every method's record by slug, in the order of the rooms."""
    found: dict[str, Info] = {}
    root = Path(__file__).parent
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            source = path.read_text()
            if "\nINFO = Info(" not in source:
                continue
            module = ".".join(("pared", *path.relative_to(root).with_suffix("").parts))
            info = _record(ast.parse(source), folder, module)
            if info.slug in found:
                raise RuntimeError(
                    f"{module} and {found[info.slug].module} share the slug {info.slug!r}"
                )
            found[info.slug] = info
    return found


def get(slug: str) -> Info:
    """The record of a method.

    Raises:
        InputError: unknown slug; the message names the nearest ones.
    """
    if slug in registry():
        return registry()[slug]
    near = difflib.get_close_matches(slug, registry(), n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(registry())}."
    raise InputError(f"there is no method {slug!r}; {hint}")


def _record(tree: ast.Module, folder: str, module: str) -> Info:
    """Evaluate the literal `INFO = Info(...)` of a parsed file."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INFO":
            info: Info = _evaluate(node.value, {"folder": folder, "module": module})
            return info
    raise RuntimeError(f"{module} has no module-level INFO")


def _evaluate(node: ast.expr, extra: dict[str, str]) -> Any:
    """Literals, and calls of the two record classes with keyword arguments."""
    if isinstance(node, ast.Call):
        cls = {"Info": Info, "Headline": Headline}[ast.unparse(node.func)]
        return cls(**{str(k.arg): _evaluate(k.value, {}) for k in node.keywords}, **extra)
    if isinstance(node, ast.Tuple):
        return tuple(_evaluate(item, {}) for item in node.elts)
    return ast.literal_eval(node)

"""What came out when a paper's claims were measured again: the files `results/<slug>.json`.

Results come with the package; those in a folder `results` of the working directory, being newer, go
before them. Needs no torch; only `read`, which checks a file to the last field, imports pydantic.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pared import info
from pared.errors import InputError
from pared.info import Info

State = Literal["holds", "differs", "not measured"]

HERE = Path(__file__).parent
# In a checkout the folder at its root; in an installed package a copy of that folder.
PACKAGED = next(
    (folder for folder in (HERE.parents[1] / "results", HERE / "measured") if folder.is_dir()),
    HERE / "measured",
)


@dataclass(frozen=True)
class Measured:
    """One claim as it was measured, with all conditions.

    Attributes:
        key: short name of the claim within its method, as in the headline of its record.
        text: the claim in words.
        paper: the paper's value; None for a claim of this project's own.
        ours: the value measured here, the mean over the seeds.
        spread: standard deviation of ours over the seeds; None where there was one seed.
        direction: whether ours must be at least ("higher") or at most ("lower") the bound.
        bound: the value that decides.
        holds: whether it does.
        command: what makes the number again, from the root of a checkout.
        machine: processor or accelerator, in words.
        seeds: of the runs.
        commit: of the code that ran.
        date: of the measurement, year-month-day.
        note: what a reader should know to judge the number.
    """

    key: str
    text: str
    paper: float | None
    ours: float
    spread: float | None
    direction: Literal["higher", "lower"]
    bound: float
    holds: bool
    command: str
    machine: str
    seeds: tuple[int, ...]
    commit: str
    date: str
    note: str = ""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (pydantic's own form)

    def __post_init__(self) -> None:
        beyond = self.ours >= self.bound if self.direction == "higher" else self.ours <= self.bound
        if self.holds != beyond:
            raise ValueError(
                f"claim {self.key!r} says holds={self.holds}, but {self.ours:g} "
                f"{'is' if beyond else 'is not'} on the {self.direction} side of {self.bound:g}"
            )


@dataclass(frozen=True)
class Curves:
    """Lines over common axes.

    Attributes:
        x: label of the horizontal axis, with the unit.
        y: of the vertical axis.
        log: whether both axes are logarithmic.
        series: points (x, y) by the name of their line.
    """

    x: str
    y: str
    log: bool
    series: dict[str, list[tuple[float, float]]]

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (pydantic's own form)


@dataclass(frozen=True)
class Bars:
    """A bar for each of several values.

    Attributes:
        x: what the bars measure, with the unit.
        bars: values, none below 0, by the name of their bar.
    """

    x: str
    bars: dict[str, float]

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (pydantic's own form)


@dataclass(frozen=True)
class Points:
    """Points of a cost and an error, both the better the lower.

    Attributes:
        x: label of the cost, with the unit.
        y: of the error.
        log: whether both axes are logarithmic.
        points: (label, x, y) by the name of the kind that they belong to; a label may be "".
    """

    x: str
    y: str
    log: bool
    points: dict[str, list[tuple[str, float, float]]]

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (pydantic's own form)


# The kinds of figures, by the key that tells them.
FIGURES: dict[str, type] = {"series": Curves, "bars": Bars, "points": Points}


@dataclass(frozen=True)
class Results:
    """One file of results.

    Attributes:
        method: slug of the method.
        claims: what was measured.
        tables: rows by the name of their table; every row maps columns to values.
        figures: what the pages draw, by name: the fields of `Curves`, `Bars` or `Points`.
    """

    method: str
    claims: tuple[Measured, ...]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (pydantic's own form)


@dataclass(frozen=True)
class Outcome:
    """One claim of a paper and what was found, as far as it is known.

    Attributes:
        key: short name of the claim within its method.
        text: the claim in words.
        paper: the paper's value.
        direction: whether ours must be "higher" or "lower" than a bound.
        ours: the value measured here; None if it wasn't.
        spread: of ours over seeds; None where there was one.
        state: "holds", "differs" or "not measured".
    """

    key: str
    text: str
    paper: float | None
    direction: str
    ours: float | None
    spread: float | None
    state: State

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def read(slug: str, folder: Path | None = None) -> Results | None:
    """The results of a method with every condition, or None where nothing was measured.

    Args:
        slug: of the method.
        folder: where the files are; by default those that come with the package.

    Raises:
        InputError: the file is not a file of results; the message names the first field that is
            wrong.
    """
    from pydantic import TypeAdapter, ValidationError

    path = (folder or PACKAGED) / f"{slug}.json"
    if not path.exists():
        return None
    within: tuple[str, ...] = ()
    try:
        found = TypeAdapter(Results).validate_json(path.read_bytes())
        for name, figure in found.figures.items():
            within = ("figures", name)
            TypeAdapter(_kind(figure)).validate_python(figure)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (*within, *first["loc"]))) or "the file"
        raise InputError(f"{path}: {where}: {first['msg']}.") from None
    if found.method != slug:
        raise InputError(f"{path} holds results of {found.method!r}; name it {found.method}.json.")
    return found


def _kind(figure: dict[str, Any]) -> type:
    """What a figure is; one that has the key of no kind is held against curves."""
    return next((kind for key, kind in FIGURES.items() if key in figure), Curves)


def outcomes(record: Info) -> list[Outcome]:
    """Every claim of a method: those that its record lists, then others that were measured."""
    measured = {claim["key"]: claim for claim in _claims(record.slug)}
    found = []
    for headline in record.headlines:
        claim = measured.pop(headline.key, {})
        listed = {"text": headline.text, "paper": headline.paper, "direction": headline.direction}
        found.append(_outcome(headline.key, claim | listed))
    return found + [_outcome(key, claim) for key, claim in measured.items()]


def state(slug: str) -> State:
    """The worst of a method's claims: one that differs, else one not measured, else all hold."""
    return worst(outcomes(info.get(slug)))


def worst(claims: Sequence[Outcome]) -> State:
    """The same of claims already at hand."""
    states = {claim.state for claim in claims}
    if "differs" in states:
        return "differs"
    return "holds" if states == {"holds"} else "not measured"


def summary(claims: Sequence[Outcome]) -> str:
    """How many claims hold, in words."""
    counts = Counter(claim.state for claim in claims)
    if set(counts) <= {"not measured"}:
        return "not measured"
    parts = [f"{counts['holds']} of {len(claims)} hold"]
    if differ := counts["differs"]:
        parts.append(f"{differ} differ{'s' if differ == 1 else ''}")
    if missing := counts["not measured"]:
        parts.append(f"{missing} not measured")
    return ", ".join(parts)


def _outcome(key: str, claim: dict[str, Any]) -> Outcome:
    held: dict[Any, State] = {True: "holds", False: "differs"}
    return Outcome(
        key=key,
        text=claim.get("text", key),
        paper=claim.get("paper"),
        direction=claim.get("direction", ""),
        ours=claim.get("ours"),
        spread=claim.get("spread"),
        state=held.get(claim.get("holds"), "not measured"),
    )


def _claims(slug: str) -> list[dict[str, Any]]:
    """The measured claims in the newest result file; a foreign file of that name is left aside."""
    for folder in (Path("results"), PACKAGED):
        try:
            table = json.loads((folder / f"{slug}.json").read_text())
            return [claim | {"key": str(claim["key"])} for claim in table["claims"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return []

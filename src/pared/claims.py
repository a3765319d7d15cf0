"""What came out when a paper's claims were measured again: the files `results/<slug>.json`.

Results come with the package; those in a folder `results` of the working directory, being newer, go
before them. Needs no torch.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pared.info import Info

State = Literal["holds", "differs", "not measured"]

PACKAGED = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Outcome:
    """One claim of a paper and what was found.

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


def outcomes(record: Info) -> list[Outcome]:
    """Every claim of a method: those that its record lists, then others that were measured."""
    measured = {claim["key"]: claim for claim in _read(record.slug)}
    found = []
    for headline in record.headlines:
        claim = measured.pop(headline.key, {})
        listed = {"text": headline.text, "paper": headline.paper, "direction": headline.direction}
        found.append(_outcome(headline.key, claim | listed))
    return found + [_outcome(key, claim) for key, claim in measured.items()]


def state(claims: Sequence[Outcome]) -> State:
    """The worst of a method's claims: one that differs, else one not measured, else all hold."""
    states = {claim.state for claim in claims}
    if "differs" in states:
        return "differs"
    return "holds" if states == {"holds"} else "not measured"


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


def _read(slug: str) -> list[dict[str, Any]]:
    """The measured claims in the newest result file; a foreign file of that name is left aside."""
    for folder in (Path("results"), PACKAGED):
        try:
            table = json.loads((folder / f"{slug}.json").read_text())
            return [claim | {"key": str(claim["key"])} for claim in table["claims"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return []

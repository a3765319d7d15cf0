"""What a row of figures means, in a sentence. Written so that nobody is flattered."""

from collections.abc import Sequence
from dataclasses import dataclass

from pared.bench.figures import Figure, times
from pared.bench.timing import Timing


@dataclass(frozen=True)
class Rival:
    """The base with fewer steps, beside an arm that takes about as long.

    Attributes:
        name: of the row.
        speed: over the base's.
        psnr: of its pictures to the base's.
        nearer: which of the two paints closer to the base: 1 the arm, -1 the rival, 0 undecided,
            None unknown.
    """

    name: str
    speed: float
    psnr: float
    nearer: int | None


@dataclass(frozen=True)
class Finding:
    """What the verdict on one arm rests on.

    Attributes:
        timing: of its whole calls; None if it was not timed.
        sound: reasons to distrust all timings, empty if none.
        failures: of its methods' own checks.
        unhealed: whether it was converted by a method that needs training, and not trained.
        identical: whether its outputs equal the base's bit for bit; None if there are none.
        psnr: to the base's pictures, if known.
        rival: the base with the steps that are nearest in time, if there is one.
        paints: whether pictures were to be had at all.
    """

    timing: Timing | None
    sound: Sequence[str] = ()
    failures: Sequence[str] = ()
    unhealed: bool = False
    identical: bool | None = None
    psnr: Figure | None = None
    rival: Rival | None = None
    paints: bool = True


def verdict(finding: Finding) -> str:
    """The verdict on one arm, in one to three sentences."""
    if finding.failures:
        return f"No speed-up is stated: {' '.join(finding.failures)}"
    if finding.timing is None:
        return "Not timed."
    said = [_speed(finding, finding.timing), _pictures(finding), _against_rival(finding)]
    return " ".join(sentence for sentence in said if sentence)


def _speed(finding: Finding, timing: Timing) -> str:
    if finding.sound:
        return "No verdict on time: the run was disturbed (see the notes)."
    between = f"({times(timing.ratio_low)} to {times(timing.ratio_high)})"
    if timing.ratio_low > 1:
        return f"{times(timing.ratio)} as fast as the base {between}."
    if timing.ratio_high < 1:
        return f"Slower than the base: {times(timing.ratio)} {between}."
    return f"As fast as the base, within the spread: {times(timing.ratio)} {between}."


def _pictures(finding: Finding) -> str:
    if finding.identical:
        gains = not finding.sound and finding.timing and finding.timing.ratio_low > 1
        return f"{'Its' if gains else 'No effect: its'} outputs are bit-identical to the base's."
    if not finding.paints:
        return "Speed alone: no pictures were made."
    if finding.unhealed:
        return "Not healed: its speed means something, its pictures don't yet."
    if finding.psnr is not None:
        return f"PSNR to the base's pictures {finding.psnr.value:.1f} dB."
    return ""


def _against_rival(finding: Finding) -> str:
    rival, psnr = finding.rival, finding.psnr
    # Without a sound time nothing is equal in time, and an unhealed arm has nothing to show.
    if rival is None or psnr is None or finding.identical or finding.unhealed or finding.sound:
        return ""
    beside = f"({psnr.value:.1f} against {rival.psnr:.1f} dB)"
    named = f'"{rival.name}", nearest in time at {times(rival.speed)},'
    if rival.nearer == 1:
        return f"It stays closer than {named} does {beside}."
    if rival.nearer == -1:
        return f"Fewer steps do better: {named} stays closer {beside}."
    return f"{named[0].upper()}{named[1:]} is about as close {beside}."


def headline(rows: Sequence[tuple[str, str, Figure | None, str]], sound: Sequence[str]) -> str:
    """The whole report in a sentence or two.

    Args:
        rows: name, kind, speed and verdict of every arm but the base.
        sound: reasons to distrust all timings.
    """
    if sound:
        return f"No verdict on time. {sound[0]}"
    timed = [(s, name, said) for name, kind, s, said in rows if s and kind != "fewer steps"]
    if not timed:
        return "No arm was timed."
    speed, name, said = max(timed)
    if (speed.low or speed.value) > 1:
        return f"{name}: {said}"
    return f"Nothing is faster than the base. Nearest is {name}: {said[0].lower()}{said[1:]}"

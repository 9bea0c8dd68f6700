"""How the time of a round is divided among its stages, and that of a stage among its parts.

    seconds of one = max(minimum, share / sum of shares * what is left)

asked anew before every stage, of what is left then. So the parts never add up to more than the whole, a stage
that hangs takes its own time alone, and what an early one leaves flows to all later ones by their shares.
Where not even the minima fit, the last stages go without: the list is in order of what would be missed most.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Want(NamedTuple):
    share: float  # relative to those of the others
    least_s: float  # below this it is not worth beginning


def divide(seconds: float, wants: Sequence[Want]) -> list[float]:
    """Seconds for each, none of them below its minimum, their sum at most `seconds`; 0.0: left out."""
    served = len(wants)
    while sum(want.least_s for want in wants[:served]) > seconds:
        served -= 1
    at_least: set[int] = set()  # whose share is smaller than their minimum
    while True:
        free = [i for i in range(served) if i not in at_least]
        rest = seconds - sum(wants[i].least_s for i in at_least)
        whole = sum(wants[i].share for i in free)
        parts = {i: rest * wants[i].share / whole for i in free}
        small = {i for i in free if parts[i] < wants[i].least_s}
        if not small:
            return [parts.get(i, wants[i].least_s) if i < served else 0.0 for i in range(len(wants))]
        at_least |= small

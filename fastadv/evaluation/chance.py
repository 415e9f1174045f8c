"""What so many samples tell of all that might have been drawn."""

from __future__ import annotations

import math


def wilson(share: float, samples: int) -> tuple[float, float]:
    """The 95% interval of a probability of which ``share`` of so many samples came out (Wilson, 1927).

    Unlike share +- 2 sigma it stays inside [0, 1] and has a width at 0 and at 1 too.
    """
    z2 = 1.959964**2
    centre = (share * samples + z2 / 2) / (samples + z2)
    half = math.sqrt(z2 * (share * (1 - share) * samples + z2 / 4)) / (samples + z2)
    return max(0.0, centre - half), min(1.0, centre + half)

"""How much float arithmetic may add to the change that one unit makes: a bound, derived in docs/decisions/0022.

A unit's contribution is the same bits whoever shares its step, at most C long; what other units can move is the
rounding of the sum of contributions, which is float64.
"""

from __future__ import annotations

import math

from fl_client.dp.layers.segments import ROUNDING

_UNIT = 2.0**-53
_OWN = 2.0**-26
"""Of one contribution: the rounding of its norm and of its factor, 2**-27, twice."""
_MARGIN = 1.01
"""Of terms of second order in the unit of rounding."""


def slack(*, units: int, rows: int, ranks: int = 1) -> float:
    """Bound on `|S(D + u) - S(D)|` beyond C, relative to C, for computed sums S.

    Within a micro-batch at most `rows` products are added to one coordinate, of rows that amount to at most
    `ROUNDING ** -0.5` C a unit; then at most one sum for each unit, and one for each rank, is added to another.

    Args:
        units: units that a step may sample.
        rows: rows of the experts' products in the largest micro-batch.
        ranks: processes whose sums are added.
    """
    within = math.sqrt(1 / ROUNDING) * (rows + 4)
    return _OWN + 2 * _MARGIN * _UNIT * units * (within + units + ranks)

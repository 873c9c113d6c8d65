"""Turn recorded mechanisms into epsilon: what was spent, what is left, how much noise fits.

Three floors, none of which imports torch:

- `renyi`: Rényi divergences of one mechanism, and epsilon from their sum;
- `pld`: the tighter figure by privacy loss distributions, for reports;
- `gate`: the privacy filter that decides whether a mechanism may run;
- `calibrate`: the noise multiplier that fits a target.

Epsilon is never stored as a truth: mechanisms are, and these functions derive the rest.
"""

from __future__ import annotations

from fl_shared.privacy.accounting.calibrate import find_noise_multiplier, steps_that_fit
from fl_shared.privacy.accounting.gate import Filter, default_order
from fl_shared.privacy.accounting.merge import merged
from fl_shared.privacy.accounting.pld import pld_curve, pld_epsilon
from fl_shared.privacy.accounting.renyi import ORDERS, rdp_curve, rdp_epsilon, renyi_cost

__all__ = [
    "ORDERS",
    "Filter",
    "default_order",
    "find_noise_multiplier",
    "merged",
    "pld_curve",
    "pld_epsilon",
    "rdp_curve",
    "rdp_epsilon",
    "renyi_cost",
    "steps_that_fit",
]

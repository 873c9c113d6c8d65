"""How often one caller may ask, and how much one caller may have open at once."""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Callable

MAX_KEYS = 10_000


def network(address: str) -> str:
    """Whose address this is: itself for IPv4, its /64 for IPv6, of which one customer has billions."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))
    return address


class Rates:
    """A bucket of `burst` requests for each key, refilled at `per_second`."""

    def __init__(self, per_second: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> bool:
        """Whether one more request of `key` may pass now."""
        now = self._clock()
        left, since = self._left.get(key, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._per_second)
        allowed = left >= 1.0
        self._left[key] = (left - 1.0 if allowed else left, now)
        if len(self._left) > MAX_KEYS:
            self._forget(now)
        return allowed

    def _forget(self, now: float) -> None:
        """Drop the keys whose buckets are full again: they are as good as new."""
        full = self._burst / self._per_second
        self._left = {key: value for key, value in self._left.items() if now - value[1] < full}


class Places:
    """At most `most` places for each key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: Counter[str] = Counter()

    def take(self, key: str) -> bool:
        """Take a place; False when `key` has all of its places taken."""
        if self._taken[key] >= self._most:
            return False
        self._taken[key] += 1
        return True

    def give_back(self, key: str) -> None:
        """Give a place back."""
        self._taken[key] -= 1
        if self._taken[key] <= 0:
            del self._taken[key]

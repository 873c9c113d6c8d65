"""Prometheus metrics of a site's agent, on the loopback port that `[metrics] listen` names.

For the site's own operators: the duration of a round or a step may depend on the data, so nothing here is
offered to the coordinator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fl_client.metrics.gpu import Gpus
from fl_shared.ledger.records import Position

ROUND_BUCKETS_S = (1, 5, 15, 60, 300, 900, 3600, 14400)
STEP_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class SiteState(Collector):
    """What is asked for only when somebody looks: the budget, the helpers, whether a round is trained."""

    def __init__(self) -> None:
        """Know nothing yet; the agent fills this in as it starts."""
        self.position: tuple[str, Callable[[], Position]] | None = None
        self.training: Callable[[], bool] = lambda: False
        self.helpers: Callable[[], dict[str, bool]] = dict
        self.certificate_ends: Callable[[], float | None] = lambda: None

    def describe(self) -> list[Metric]:
        """The families without values, in the order of `collect`."""
        return [
            GaugeMetricFamily(
                "concordat_epsilon", "The budget: spent, reserved, left, ceiling.", labels=["dataset", "part"]
            ),
            GaugeMetricFamily("concordat_delta", "The delta at which epsilon is stated.", labels=["dataset"]),
            GaugeMetricFamily("concordat_training", "1 while a round is being trained.", labels=[]),
            GaugeMetricFamily("concordat_helper_up", "1 while tunnel or SuperNode runs.", labels=["helper"]),
            GaugeMetricFamily(
                "concordat_certificate_expiry_timestamp_seconds", "When the client certificate ends.", labels=[]
            ),
        ]

    def collect(self) -> Iterator[Metric]:
        """The values of now. Raises LedgerError when the ledger cannot be read."""
        epsilon, delta, training, helpers, certificate = (_gauge(family) for family in self.describe())
        if self.position is not None:
            dataset, ask = self.position
            now = ask()
            for part in ("spent", "reserved", "left"):
                epsilon.add_metric([dataset, part], getattr(now, part))
            epsilon.add_metric([dataset, "ceiling"], now.epsilon)
            delta.add_metric([dataset], now.delta)
        training.add_metric([], float(self.training()))
        for name, up in self.helpers().items():
            helpers.add_metric([name], float(up))
        ends = self.certificate_ends()
        if ends is not None:
            certificate.add_metric([], ends)
        yield from (epsilon, delta, training, helpers, certificate)


def _gauge(metric: Metric) -> GaugeMetricFamily:
    if not isinstance(metric, GaugeMetricFamily):
        raise TypeError(f"{metric.name} is no gauge")
    return metric


class Metrics:
    """The counters of one agent and the registry that shows them."""

    def __init__(self) -> None:
        """Start with nothing counted."""
        self.registry = CollectorRegistry()
        self.state = SiteState()
        self.registry.register(self.state)
        self.registry.register(Gpus())
        ProcessCollector(registry=self.registry)
        self._rounds = Counter(
            "concordat_rounds", "Rounds answered, by outcome (ok, or the refusal's code).", ["outcome"],
            registry=self.registry,
        )  # fmt: skip
        self._round_seconds = Histogram(
            "concordat_round_seconds", "Seconds from an order to its answer.", buckets=ROUND_BUCKETS_S,
            registry=self.registry,
        )  # fmt: skip
        self._step_seconds = Histogram(
            "concordat_step_seconds", "Seconds for one DP-SGD step.", buckets=STEP_BUCKETS_S, registry=self.registry
        )
        self._bytes = Counter(
            "concordat_bytes", "Adapter bytes received (in) and released (out).", ["direction"], registry=self.registry
        )

    def round(self, outcome: str, seconds: float, received: int, released: int) -> None:
        """Count one answered round."""
        self._rounds.labels(outcome).inc()
        self._round_seconds.observe(seconds)
        self._bytes.labels("in").inc(received)
        self._bytes.labels("out").inc(released)

    def timed(self, progress: Callable[..., None]) -> Callable[..., None]:
        """`progress`, called after every step, and the time between two calls observed; made before the first step."""
        last = time.monotonic()

        def after_step(*arguments: Any, **named: Any) -> None:
            nonlocal last
            now = time.monotonic()
            self._step_seconds.observe(now - last)
            last = now
            progress(*arguments, **named)

        return after_step

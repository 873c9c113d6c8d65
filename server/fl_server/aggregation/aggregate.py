"""One round's aggregation as the run spec asks for it: updates in, the next adapter and optimizer state out.

Before the first committed round the coordinator, which has no model, cannot know names and shapes. If the first
reply decided, one hostile site could shut every other out; so the form of most sites wins.
"""

from __future__ import annotations

from pathlib import Path

from fl_server.aggregation.mean import StreamingMean
from fl_server.aggregation.robust import MultiKrum, median, trimmed_mean
from fl_server.aggregation.server_step import ServerStep, adam, momentum, plain
from fl_server.aggregation.spool import Spool
from fl_server.aggregation.updates import Form, Rule, Shapes, form, require_moderate
from fl_shared.adapters.safetensors import SERVER_STATE, Tensors, digest, pack, shapes, unpack
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import DataError

MAX_FORMS = 4  # each form costs the memory, or the disk space, of a round


def rule_of(spec: RunSpec, expected: Shapes | None, scratch: Path) -> Rule:
    """The rule that `[run] aggregation` names. `ffa` and `fed-sb` differ from `fedavg` only in what sites train."""
    parameters = dict(spec.aggregation)
    match spec.run.aggregation:
        case "median":
            return median(Spool(scratch, expected))
        case "trimmed-mean":
            return trimmed_mean(Spool(scratch, expected), parameters["cut"])
        case "multi-krum":
            return MultiKrum(Spool(scratch, expected), int(parameters["malicious"]), int(parameters["select"]))
        case _:
            return StreamingMean(expected)


def step_of(spec: RunSpec) -> ServerStep:
    """How the global adapter moves under `[run] aggregation`."""
    parameters = dict(spec.aggregation)
    match spec.run.aggregation:
        case "fedavgm":
            return momentum(parameters["server_learning_rate"], parameters["server_momentum"])
        case "fedadam":
            return adam(
                parameters["server_learning_rate"], parameters["beta_1"], parameters["beta_2"], parameters["tau"]
            )
        case _:
            return plain()


class RoundAggregate:
    """The updates of one round.

    Args:
        spec: names the aggregator and its parameters.
        base: the bytes of the global adapter that the sites started from; none in the first round.
        state: the bytes of the server optimizer's state as the last round committed it; none without one.
        scratch: folder for rules that keep updates on disk.
    """

    def __init__(self, spec: RunSpec, base: bytes, state: bytes, scratch: Path) -> None:
        self._spec, self._scratch = spec, scratch
        self._base, self._state = unpack(base), unpack(state)
        self._rules: dict[Form, Rule] = {}
        if self._base:
            self._rules[form(self._base)] = rule_of(spec, shapes(self._base), scratch)

    def add(self, update: Tensors) -> Form:
        """Take one update in; its form.

        Raises:
            DataError: as `Rule.add`, or one form too many. Nothing has changed then.
        """
        if self._base:
            key, rule = next(iter(self._rules.items()))
            rule.add(update)
            return key
        key = form(update)
        known = self._rules.get(key)
        if known is None and len(self._rules) >= MAX_FORMS:
            raise DataError(
                "its tensors are of yet another form than the other sites'",
                fix="sender and receiver must use the same run spec",
            )
        rule = known or rule_of(self._spec, None, self._scratch)
        rule.add(update)
        self._rules[key] = rule
        return key

    @property
    def most(self) -> int:
        """How many updates the most frequent form has."""
        return max((rule.count for rule in self._rules.values()), default=0)

    def winner(self) -> Form:
        """The form of most updates.

        Raises:
            DataError: no update, or no form has more than every other.
        """
        ranked = sorted(self._rules.items(), key=lambda pair: -pair[1].count)
        if not ranked or ranked[0][1].count == 0:
            raise DataError("there is no update to average", fix="wait for the sites")
        if len(ranked) > 1 and ranked[0][1].count == ranked[1][1].count:
            raise DataError(
                "the sites disagree on the adapter's tensors, and no form has a majority",
                fix="compare the sites' versions and base models",
            )
        return ranked[0][0]

    def finish(self) -> tuple[bytes, bytes]:
        """The next global adapter and the server optimizer's next state (none without one), packed.

        The adapter's metadata name the state's digest, so that whoever holds the one can tell that the other is
        its own. The updates are used up.

        Raises:
            DataError: as `winner`, or the result holds what no adapter can.
        """
        update = self._rules[self.winner()].result()
        self._rules.clear()
        adapter, state = step_of(self._spec).apply(self._base, update, self._state)
        try:
            require_moderate(adapter)
        except DataError as error:
            raise DataError(error.message, fix="lower the learning rates, the server's included") from error
        state_bytes = pack(state)
        return pack(adapter, {SERVER_STATE: digest(state_bytes)} if state_bytes else None), state_bytes

"""Who may ask this coordinator for what: one table of actions, and one way to do an action that keeps to it.

Every interface (the gRPC control API, a web console) names an action of `ACTIONS` for each thing that can be asked of
it, and does it inside `Access.acting`. The check knows nothing of the interface: it takes an identity that TLS has
verified, and raises a `ConcordatError` that the interface translates.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fl_server.access.log import AdminLog
from fl_server.db.store import Store
from fl_server.home.layout import ServerHome
from fl_server.identity.authority import Identity
from fl_server.identity.operators import AuditorLimit, Operators
from fl_shared.canonical import sha256_hex
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConcordatError

log = logging.getLogger("fl_server.access.check")

MAX_ARGUMENT = 1000
SPEC = "spec_toml"
"""The argument that holds a run spec: recorded by the run's name and the text's hash."""


@dataclass(frozen=True)
class Action:
    """Who may do something, and whether it is recorded in the admin log.

    Attributes:
        roles: the roles of certificates that may; the first is named to whoever may not.
        recorded: written to the admin log before it takes effect, and its outcome afterwards.
        arguments: what of the request is recorded; nothing else of it gets into the log.
    """

    roles: tuple[str, ...]
    recorded: bool = False
    arguments: tuple[str, ...] = ()


def _change(*arguments: str) -> Action:
    return Action(("admin",), recorded=True, arguments=arguments)


_READ = Action(("admin", "auditor"))

ACTIONS: Mapping[str, Action] = {
    "status": _READ,
    "sites list": _READ,
    "sites show": _READ,
    "sites invite": _change("site", "ttl_s"),
    "sites revoke": _change("site", "reason"),
    "runs list": _READ,
    "runs show": _READ,
    "runs watch": _READ,
    "runs plan": _change(SPEC, "wait_s"),
    "runs launch": _change(SPEC, "force"),
    "runs stop": _change("run"),
    "runs pause": _change("run"),
    "runs resume": _change("run"),
    "receipts list": _READ,
    "adapters list": _READ,
    "adapters export": _change("run", "round", "released_as"),
    "adapters promote": _change("run", "round", "name"),
    "promotions list": _READ,
    "audit list": _READ,
}
"""Everything that can be asked of a coordinator from outside; the names of recorded actions are in admin logs."""


class Access:
    """The check before every action, and the record of it."""

    def __init__(self, operators: Operators, log: AdminLog) -> None:
        self._operators = operators
        self._log = log
        self._auditors = AuditorLimit()

    @classmethod
    def of(cls, home: ServerHome, store: Store) -> Access:
        """The check of the coordinator at `home`."""
        return cls(Operators.of(home, store), AdminLog.of(home, store))

    @contextlib.contextmanager
    def acting(self, who: Identity, action: str, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Do the action in the block: only if `who` may, and with its entry in the admin log before and after.

        The certificate's row is read every time, so that a revocation takes effect on the next action. An action that
        is refused here is in the process's own log only: a stranger's certificate cannot make the admin log grow.

        Raises:
            ConcordatError: an action that no table names, or a role that may not do it (`wrong-role`); too many calls
                of auditors (`too-many`). Whatever the block raises is recorded as the outcome and raised again.
            EnrolmentError: a certificate that was not issued here, was revoked or has expired.
        """
        log.info("%s by %s %s", action or "an unknown call", who.role, who.name)
        allowed = ACTIONS.get(action)
        if allowed is None:
            raise ConcordatError("nobody may do this", fix="use another call", code="wrong-role")
        if who.role not in allowed.roles:
            raise ConcordatError(
                f"the role {who.role} may not do this",
                fix=f"use a certificate of role {allowed.roles[0]}",
                code="wrong-role",
            )
        self._operators.authorise(who)
        with self._auditors.held(who):
            if not allowed.recorded:
                yield
                return
            with self._log.recorded(who, action, recorded_arguments(allowed, arguments)):
                yield


def recorded_arguments(action: Action, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What of a request is recorded: the fields as they came, a spec by its name and hash, long texts cut."""
    recorded = {name: _cut(value) for name, value in arguments.items() if name in action.arguments and name != SPEC}
    text = arguments.get(SPEC) if SPEC in action.arguments else None
    if text is not None:
        recorded["spec_sha256"] = sha256_hex(text.encode("utf-8"))
        with contextlib.suppress(ConcordatError):  # a spec that cannot be read is refused later, with its reason
            recorded["run"] = RunSpec.from_text(text, where="the run spec").run.name
    return recorded


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_ARGUMENT:
        return f"{value[:MAX_ARGUMENT]}… ({len(value)} characters)"
    return value

"""The agent's store of rounds, orders and updates: `releases/<run>-<round>.{json,safetensors}`.

The order is written before the mechanism is reserved, the update before the ledger settles. So after a
crash the files say what an open reservation was for, and what was paid for cannot be lost. An order that the
ledger refuses is deleted again. Whether an update may leave is not decided here but by the ledger
(`agent.outgoing`).

Files of different name spaces cannot meet: a run's name has neither colon nor underscore, so `alone:NAME` and
`evaluation:...` are stored under names that no coordinator's run can have.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fl_shared.adapters.safetensors import digest
from fl_shared.canonical import parse_json
from fl_shared.declaration import Document
from fl_shared.documents.round import Round
from fl_shared.errors import ConcordatError, DataError
from fl_shared.fields import RunId, Text, Time
from fl_shared.files import write_durably
from fl_shared.names import ALONE
from fl_shared.privacy.mechanism import Mechanism

KEPT_ROUNDS = 2


@dataclass(frozen=True)
class Order(Document):
    """What one round was asked to do, and what came of it so far.

    `update_digest` and `executed` are None until the update was computed.
    """

    run: RunId
    round: Round
    nonce: Text
    spec_digest: Text
    adapter_digest: Text
    model_digest: Text
    ordered_at: Time
    update_digest: Text | None = None
    executed: Mechanism | None = None


class ReleaseStore:
    """The files below `releases/`."""

    def __init__(self, directory: Path) -> None:
        """Use `directory`, which must exist."""
        self._directory = directory

    def put(self, order: Order, update: bytes | None = None) -> None:
        """Write the update, if there is one, and then the order, and flush; OSError when the disk refuses."""
        if update is not None:
            write_durably(self._path(order.run, order.round, "safetensors"), update)
        text = json.dumps(order.to_dict(), indent=2, sort_keys=True) + "\n"
        write_durably(self._path(order.run, order.round, "json"), text.encode("utf-8"))

    def find(self, run: str, round_: int) -> Order | None:
        """Return the order of a round, None when there is none; DataError when damaged."""
        return self._read(self._path(run, round_, "json"))

    def update(self, order: Order) -> bytes | None:
        """Return the stored bytes, None when there are none (any more); DataError when they were altered."""
        path = self._path(order.run, order.round, "safetensors")
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        if digest(content) != order.update_digest:
            raise DataError(f"{path} was altered", fix="restore it from a backup; it will not be sent as it is")
        return content

    def all(self) -> list[Order]:
        """Return every stored order, oldest round first within a run."""
        orders = [self._read(path) for path in self._directory.glob("*.json")]
        return sorted((order for order in orders if order), key=lambda order: (order.run, order.round))

    def drop(self, order: Order) -> None:
        """Delete an order that was not granted."""
        self._path(order.run, order.round, "json").unlink(missing_ok=True)

    def prune(self, run: str, round_: int) -> None:
        """Delete what belongs to rounds of `run` that no repeat can ask for any more."""
        if run.startswith(ALONE):
            return  # its rounds follow from one another: a repeat asks for all of them
        for ending in ("safetensors", "json"):
            for path in self._directory.glob(f"{self._stem(run)}-*.{ending}"):
                number = path.stem.removeprefix(f"{self._stem(run)}-")
                if number.isdigit() and int(number) <= round_ - KEPT_ROUNDS:
                    path.unlink(missing_ok=True)

    def figures_path(self, run: str) -> Path:
        """Where the figures of an evaluation are kept."""
        return self._directory / f"{self._stem(run)}.figures"

    def figures(self) -> list[tuple[str, bytes, Mechanism]]:
        """Run, stored figures and mechanism of every evaluation; DataError when they are damaged."""
        evaluations = []
        for path in sorted(self._directory.glob("*.figures")):
            try:
                content = path.read_bytes()
                figures = parse_json(content, str(path))
                mechanism = Mechanism.from_dict(figures.get("mechanism") if isinstance(figures, dict) else figures)
            except (ConcordatError, OSError) as error:
                raise _damaged(path) from error
            evaluations.append((path.stem.replace("_", ":"), content, mechanism))
        return evaluations

    @staticmethod
    def _stem(run: str) -> str:
        return run.replace(":", "_")

    def _path(self, run: str, round_: int, ending: str) -> Path:
        return self._directory / f"{self._stem(run)}-{round_}.{ending}"

    def _read(self, path: Path) -> Order | None:
        """The order in a file, None when there is no file; DataError unless it is whole and its own place."""
        try:
            order = Order.from_dict(parse_json(path.read_bytes(), str(path)), where=str(path))
        except FileNotFoundError:
            return None
        except (ConcordatError, OSError) as error:
            raise _damaged(path) from error
        if self._path(order.run, order.round, "json") != path:
            raise _damaged(path)
        return order


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is damaged", fix="restore it from a backup, or move it away")

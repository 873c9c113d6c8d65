"""Where Flower's SuperLink keeps what it keeps, whatever the home's path holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.supercore.object_store import ObjectStoreFactory

from fl_server.flower.superlink import Flower
from fl_server.home.layout import ServerHome
from fl_server.operations.setup import initialise


@pytest.mark.parametrize("name", ["plain", "a b", "50%25 off?", "what?mode=memory", "#1;x:y", "ü\n'\"$(x)"])
def test_the_superlinks_database_lies_in_the_home(name: str, tmp_path: Path) -> None:
    """Flower reads the path as an address: a question mark ended it, and two homes shared one database outside both."""
    initialise(tmp_path / name, host="127.0.0.1", gateway_port=9443, control_port=9444, admin="admin")
    (tmp_path / name / "flower").mkdir(exist_ok=True)
    command = Flower(ServerHome.open(tmp_path / name)).superlink_command(1)
    database = command[command.index("--database") + 1]
    store = ObjectStoreFactory(database).store()
    assert "nothing" not in store
    assert (tmp_path / name / "flower" / "superlink.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]

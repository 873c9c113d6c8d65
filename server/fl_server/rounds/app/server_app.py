"""The ServerApp: hands Flower's Grid to the driver of `fl_server.rounds.driver`."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_server.home.layout import ServerHome
from fl_server.rounds.driver import drive
from fl_shared.runtime.logs import set_up

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry one run on from its last committed round."""
    home = ServerHome.open(Path(str(context.run_config["home"])))
    set_up("serverapp", file=home.logs / "serverapp.log", terminal=None)
    drive(home, str(context.run_config["run"]), str(context.run_config["attempt"]), grid)

"""The command `fl-server`: make a coordinator, run it, look at it, issue certificates, change its key, back it up."""

from __future__ import annotations

from collections.abc import Sequence

from fl_shared.cli.verbs import Command
from fl_shared.runtime.offline import stay_offline
from fl_shared.runtime.private_files import create_privately

VERBS = {
    "fl_server.cli.server.init": "make keys, certificates, database and server.toml",
    "fl_server.cli.server.up": "run the coordinator until SIGTERM",
    "fl_server.cli.server.status": "exit code 0 when everything is ready, 1 otherwise",
    "fl_server.cli.server.issue": "make the certificate of an admin or auditor",
    "fl_server.cli.server.issued": "list the certificates of admins and auditors",
    "fl_server.cli.server.revoke": "shut an admin or auditor out from the next call on",
    "fl_server.cli.server.rotate_key": "change the key that signs orders",
    "fl_server.cli.server.backup": "write the whole coordinator into one file, also while it runs",
    "fl_server.cli.server.restore": "make a new home from a backup",
}

COMMAND = Command(
    name="fl-server",
    package="fl_server",
    description="Make a coordinator, run it, look at it, issue certificates, change its key, back it up.",
    verbs=[VERBS],
    examples="""
        fl-server init --home ~/coordinator --host coordinator.example.org
        fl-server up --home ~/coordinator
        fl-server status --home ~/coordinator --wait 60
        fl-server status --home ~/coordinator --json
        fl-server issue --role auditor --name anna-smith --out anna/
        fl-server rotate-key --grace-days 14
        fl-server backup --out /backup/coordinator.tar
        fl-server restore /backup/coordinator.tar --home ~/coordinator2
    """,
    exit_codes={
        1: "not everything is ready (status)",
        12: "a signature or key does not fit",
        13: "the admin log cannot be written",
        16: "the database does not answer",
        18: "a run cannot go on",
    },
    notes="environment: FL_SERVER_HOME is used where --home is not given; without both it is ~/.concordat/server;\n"
    "  FL_LOG_FORMAT=json makes the output of `fl-server up` JSON lines",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fl-server`."""
    stay_offline()
    create_privately()
    return COMMAND.main(argv)

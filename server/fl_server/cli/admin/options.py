"""What the verbs of `fl-admin` have in common: `--profile` and `--json`, the connection, a file that is new."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from pathlib import Path

from fl_server.cli.connection import Profile, control
from fl_shared.cli.verbs import add_json, path
from fl_shared.errors import ConfigError
from fl_shared.files import write_durably
from fl_shared.wire.control_pb2_grpc import ControlStub


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add `--profile` and `--json`."""
    parser.add_argument(
        "--profile", type=path, default=None, metavar="FILE", help="the admin profile, admin.toml [FL_ADMIN_PROFILE]"
    )
    add_json(parser)


def connected(arguments: argparse.Namespace) -> AbstractContextManager[ControlStub]:
    """The control API of the coordinator that the profile names; see `cli.connection.control` for what it raises."""
    return control(Profile.find(arguments.profile))


def require_new(out: Path, *, force: bool) -> None:
    """ConfigError when the file is there and `--force` is not given."""
    if out.exists() and not force:
        raise ConfigError(f"{out} exists", fix="choose another --out, or add --force")


def write_file(out: Path, content: bytes) -> None:
    """Write a file that others may read; ConfigError when the disk refuses."""
    try:
        write_durably(out, content, mode=0o644)
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror}", fix="choose another --out") from error

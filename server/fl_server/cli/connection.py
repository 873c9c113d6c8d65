"""An admin's connection to the control API, from a profile file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import grpc

from fl_server.home.layout import ServerHome, default_home
from fl_shared.cli.output import command
from fl_shared.declaration import Document
from fl_shared.errors import ConcordatError, ConfigError, TransportError
from fl_shared.fields import PathField, Text
from fl_shared.files import write_durably
from fl_shared.toml import load_toml
from fl_shared.wire.control_pb2_grpc import ControlStub
from fl_shared.wire.hosts import by_proxy


@dataclass(frozen=True)
class Profile(Document):
    """[admin]: where the coordinator is and who we are. Paths start at the profile's folder."""

    control: Text
    """The address of the control API."""
    ca: PathField
    """The coordinator's certificate authority."""
    certificate: PathField
    """Our certificate."""
    key: PathField
    """Our private key."""

    @classmethod
    def find(cls, option: Path | None) -> Profile:
        """Read `--profile`, `$FL_ADMIN_PROFILE`, the profile in the coordinator's home, or `default_profile()`."""
        named = option or (Path(value) if (value := os.environ.get("FL_ADMIN_PROFILE")) else None)
        path = (named or default_home() / "admin" / "admin.toml").expanduser()
        if named is None and not path.exists() and default_profile().exists():
            path = default_profile()
        if not path.exists():
            raise ConfigError(
                f"there is no admin profile at {path}",
                fix="give --profile FILE or set FL_ADMIN_PROFILE; `fl-server init` writes HOME/admin/admin.toml",
            )
        _require_private(path, 0o022, "changed")
        return ProfileFile.from_dict(load_toml(path), where=str(path), base=path.resolve().parent).admin


@dataclass(frozen=True)
class ProfileFile(Document):
    """An admin's profile (admin.toml)."""

    SECTIONS: ClassVar = True

    admin: Profile


def _require_private(path: Path, others: int, use: str) -> None:
    """ConfigError unless `path` is ours or root's and others have none of the rights in `others`, as ssh demands it."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", fix="correct the admin profile") from error
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{path} belongs to another user", fix="use a profile and a key of your own")
    if status.st_mode & others:
        mode = "go=" if use == "read" else "go-w"
        raise ConfigError(f"{path} can be {use} by others", fix=command("chmod", mode, path))


def default_profile() -> Path:
    """`~/.concordat/admin.toml`: where `fl-admin` looks when the coordinator's home is not the default one."""
    return Path.home() / ".concordat" / "admin.toml"


def make_default(home: ServerHome) -> bool:
    """Let `fl-admin` find the first admin's profile of this home by itself; False when there is another one already.

    The file holds paths into the home, no key.
    """
    ours = home.admin / "admin.toml"
    if os.environ.get("FL_ADMIN_PROFILE"):
        return Path(os.environ["FL_ADMIN_PROFILE"]).expanduser().resolve() == ours
    default = default_home() / "admin" / "admin.toml"
    if default.exists():
        return default.resolve() == ours
    if default_profile().exists():
        return False
    profile = Profile.find(ours)
    lines = (f"{name} = {json.dumps(str(getattr(profile, name)))}" for name in ("control", "ca", "certificate", "key"))
    try:
        write_durably(default_profile(), ("[admin]\n" + "\n".join(lines) + "\n").encode("utf-8"))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def control(profile: Profile) -> Iterator[ControlStub]:
    """A stub; what the coordinator answers as an error is raised as the error it was there.

    Raises:
        TransportError: the coordinator cannot be reached or broke off.
    """
    _require_private(profile.key, 0o077, "read")
    try:
        credentials = grpc.ssl_channel_credentials(
            profile.ca.read_bytes(), profile.key.read_bytes(), profile.certificate.read_bytes()
        )
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}", fix="fix the admin profile") from error
    options = [("grpc.enable_http_proxy", int(by_proxy(f"https://{profile.control}")))]
    with grpc.secure_channel(profile.control, credentials, options) as channel:
        try:
            yield ControlStub(channel)
        except grpc.RpcError as error:
            raise _translated(error, profile) from None


def _translated(error: grpc.RpcError, profile: Profile) -> ConcordatError:
    details = error.details() or ""
    try:
        return ConcordatError.from_dict(json.loads(details))
    except ValueError:
        pass
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return TransportError(
            f"no coordinator answers at {profile.control}",
            fix="check that `fl-server up` runs there and that the profile's certificate is from it",
        )
    return TransportError(
        f"the coordinator broke off: {error.code().name}: {details[:300]}", fix="see its logs/control.log"
    )

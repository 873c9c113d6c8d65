"""What TAB offers for names: runs, sites, rounds and promotions, as the coordinator knows them just now.

A shell waits for the answer, so a coordinator that does not answer at once has no names to offer; nothing is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from argcomplete.completers import FilesCompleter

from fl_server.cli.connection import Profile, control
from fl_shared.errors import ConcordatError
from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.control_pb2_grpc import ControlStub

PATIENCE_S = 2.0

specs = FilesCompleter(allowednames=("toml",))
files = FilesCompleter()


def _asked(arguments: argparse.Namespace, names: Callable[[ControlStub], Iterable[str]]) -> list[str]:
    try:
        with control(Profile.find(getattr(arguments, "profile", None))) as stub:
            return sorted(names(stub))
    except (ConcordatError, OSError):
        return []


def runs(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Every run."""
    request = pb.ListRunsRequest()
    return _asked(parsed_args, lambda stub: [run.run for run in stub.ListRuns(request, timeout=PATIENCE_S).runs])


def sites(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Every site."""
    request = pb.ListSitesRequest()
    return _asked(parsed_args, lambda stub: [site.site for site in stub.ListSites(request, timeout=PATIENCE_S).sites])


def promotions(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Every name that an adapter is promoted to."""
    request = pb.ListReleasesRequest()
    return _asked(
        parsed_args,
        lambda stub: [promotion.name for promotion in stub.ListReleases(request, timeout=PATIENCE_S).releases],
    )


def rounds(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """The committed rounds of the run that the line names."""
    request = pb.ListAdaptersRequest(run=str(getattr(parsed_args, "run", "")))
    return _asked(
        parsed_args,
        lambda stub: [str(adapter.round) for adapter in stub.ListAdapters(request, timeout=PATIENCE_S).adapters],
    )

"""What `fl-admin` says about itself: every verb has examples that its own parser accepts, and --json."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest

from fl_server.cli.admin import COMMAND, main
from fl_server.cli.watch import Sites
from fl_shared.wire import control_pb2 as pb


def _verbs(made: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """Every verb's parser by its words."""
    found: dict[tuple[str, ...], argparse.ArgumentParser] = {}
    for action in made._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found |= _verbs(sub, (*path, name))
    return found or {path: made}


VERBS = _verbs(COMMAND.parser())


def test_every_verb_of_an_admins_day_exists() -> None:
    """The verbs that people were promised."""
    runs = {f"runs {verb}" for verb in ["launch", "plan", "list", "show", "watch", "pause", "resume", "stop", "logs"]}
    sites = {f"sites {verb}" for verb in ["invite", "list", "show", "revoke"]}
    adapters = {f"adapters {verb}" for verb in ["list", "show", "export", "promote"]}
    rest = {"receipts export", "audit list", "audit verify", "status", "schema"}
    assert {" ".join(path) for path in VERBS} == runs | sites | adapters | rest


@pytest.mark.parametrize("path", sorted(VERBS), ids=" ".join)
def test_every_verb_has_json_and_examples_that_parse(path: tuple[str, ...]) -> None:
    """The help shows whole commands of this very verb, and each of them is accepted as it stands."""
    text = VERBS[path].format_help()
    assert "--json" in text
    lines = [line.strip() for line in text.partition("examples:\n")[2].splitlines() if line.strip()]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[: len(path) + 1] == ["fl-admin", *path], line
        assert COMMAND.parser().parse_args(words[1:]).handler is VERBS[path].get_default("handler")


def test_the_help_explains_every_exit_code_that_a_verb_names(capsys: pytest.CaptureFixture[str]) -> None:
    """A code in a verb's own help stands in the list of `fl-admin --help`."""
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = set(re.findall(r"\b(\d+) [a-z]", capsys.readouterr().out.partition("exit codes:")[2]))
    for made in VERBS.values():
        told = re.sub(r"\s+", " ", made.description or "")
        assert set(re.findall(r"[Ee]xit code (\d+)", told)) <= listed | {"0", "1"}


@pytest.mark.parametrize(
    "line",
    ["runs plan missing.toml", "sites show x", "audit verify", "status", "runs logs demo --json"],
)
def test_without_a_profile_the_fix_is_told(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """No coordinator, no profile: exit code 2, one message, no traceback."""
    monkeypatch.setenv("FL_SERVER_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FL_ADMIN_PROFILE", raising=False)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert "admin profile" in error
    assert "Traceback" not in error


def test_a_watcher_sees_each_sites_part_in_the_round() -> None:
    """Not asked, at work since, off line, refused with its reason, replied; a new round begins with nobody asked."""
    sites = Sites(["a", "b", "c", "d"])

    def event(kind: str, site: str = "", number: int = 1, message: str = "", at: float = 100.0) -> None:
        sites.take(pb.Event(kind=kind, site=site, round=number, message=message, at=at))

    event("round-started")
    for site in ("a", "b", "c"):
        event("site-asked", site)
    event("reply-refused", "a", message="policy: noise\x1b[2J")
    event("reply-ok", "b")
    assert sites.rows(134.0) == [
        ("a", "refused: policy: noise\\x1b[2J", ""), ("b", "replied", ""), ("c", "at work", "34 s"),
        ("d", "not asked yet", ""),
    ]  # fmt: skip
    event("order-lost", "c", message="it went off line")
    assert sites.rows(135.0)[2] == ("c", "off line", "")
    event("round-committed")
    event("round-started", number=2)
    assert (sites.round, sites.committed) == (2, 1)
    assert {row[1] for row in sites.rows(136.0)} == {"not asked yet"}

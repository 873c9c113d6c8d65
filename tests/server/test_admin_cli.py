"""What `fl-admin` says about itself: every verb has examples that its own parser accepts, and --json."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest

from fl_server.cli.admin import main, parser


def _verbs(made: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """Every verb's parser by its words."""
    found: dict[tuple[str, ...], argparse.ArgumentParser] = {}
    for action in made._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found |= _verbs(sub, (*path, name))
    return found or {path: made}


VERBS = _verbs(parser())


def test_every_verb_of_an_admins_day_exists() -> None:
    """The verbs that people were promised."""
    runs = {f"runs {verb}" for verb in ["launch", "plan", "list", "show", "watch", "pause", "resume", "stop", "logs"]}
    sites = {f"sites {verb}" for verb in ["invite", "list", "show", "revoke"]}
    adapters = {f"adapters {verb}" for verb in ["list", "show", "export", "promote"]}
    rest = {"receipts export", "audit list", "audit verify", "status"}
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
        assert parser().parse_args(words[1:]).handler is VERBS[path].get_default("handler")


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
    monkeypatch.delenv("FL_ADMIN_PROFILE", raising=False)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert "admin profile" in error
    assert "Traceback" not in error

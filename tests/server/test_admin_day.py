"""An admin's day against a real coordinator: plan, logs, receipts, releases, the record of it all, TAB.

One site is a real agent, which answers plans. The rounds of the run `demo` were put into SQL before the coordinator
started, through the service that commits them; how rounds come about is tested elsewhere.
"""

from __future__ import annotations

import contextlib
import csv
import json
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_server.cli.admin import main
from fl_server.db.models import SiteRow
from fl_server.db.store import Store
from fl_server.home.layout import ServerHome
from fl_server.runs.commits import Commits
from fl_server.runs.events import Events
from fl_server.runs.service import Runs
from fl_server.runs.views import CommittedRound, Reply
from fl_shared.adapters.safetensors import digest, pack
from fl_shared.documents.plan import PlanAnswer, PlanQuestion
from fl_shared.documents.round import Receipt
from fl_shared.identity.signing import SigningKey, open_document, sign_document
from fl_shared.ledger import receipts
from fl_shared.privacy.mechanism import Mechanism
from harness import Site, running
from helpers.coordinators import BIN, Coordinator, Keys, environment, in_process, until
from helpers.ports import free_port
from helpers.smallest import smallest_base, smallest_digest
from helpers.specs import run_spec, site_toml, write_spec

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROUNDS = 2
REAL, QUIET, LEAVER = "real", "quiet", "leaver"
MODEL = "sha256:" + "a" * 64


class Day:
    """What the tests share."""

    def __init__(self, one: Coordinator) -> None:
        self.one = one
        self.base: str = smallest_digest()
        self.site = Site(REAL, one.root)

    def enrol(self) -> None:
        """Enrol the real site and configure it."""
        self.site.enroll(self.one.url, self.one.invite(REAL))
        data = self.one.root / "records.csv"
        with data.open("w", newline="", encoding="utf-8") as sink:
            rows = ((f"cough number {number}", ("A", "B")[number % 2]) for number in range(120))
            csv.writer(sink).writerows([("text", "label"), *rows])
        node = {"launch": False, "tunnel_port": free_port()}
        self.site.configure(
            site_toml(
                REAL,
                self.one.url,
                data={"path": data},
                model={"directory": smallest_base()},
                budget={"epsilon": 0.8},
                supernode=node,
            )
        )

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`fl-admin` in this process: a new one for each of a hundred calls would be most of this module's time."""
        profile = () if "--profile" in arguments else ("--profile", self.one.facts["profile"])
        code, out, err = in_process(main, [*arguments, *profile])
        if check and code != 0:
            raise AssertionError(f"fl-admin {' '.join(arguments)}: {code}\n{out}{err}")
        return subprocess.CompletedProcess(arguments, code, out, err)

    def admin(self, *arguments: str) -> Any:
        """What `fl-admin ... --json` prints."""
        return json.loads(self.run(*arguments, "--json").stdout)

    def spec(self, name: str, sites: list[str], **changes: Any) -> Path:
        """A spec file that the real sites understand."""
        usual = {"rounds": 5, "noise_multiplier": 2.0, "base_model": self.base, "sampling_probability": 0.02}
        fields: Any = usual | changes
        return write_spec(self.one.root / f"{name}.toml", name=name, sites=sites, steps_per_round=2, **fields)

    def plan(self, spec: Path, *more: str) -> tuple[int, dict[str, Any]]:
        """Exit code and answer of `runs plan`."""
        done = self.run("runs", "plan", str(spec), "--json", *more, check=False)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    def actions(self) -> list[dict[str, Any]]:
        """The logged actions, each with its outcome."""
        entries = self.admin("audit", "list")["entries"]
        outcomes = {each["body"]["of"]: each["body"] for each in entries if each["kind"] == "outcome"}
        return [each["body"] | {"outcome": outcomes.get(each["seq"])} for each in entries if each["kind"] == "action"]


def _receipt(site: str, number: int) -> Receipt:
    return Receipt(
        run="demo", round=number, site=site, manifest_digest=MODEL, spec_digest=MODEL, update_digest=MODEL,
        model_digest=MODEL, mechanism=Mechanism(1.0, 0.1, 4, 1.0), steps_executed=4, epsilon_spent_total=0.5 * number,
        delta=1e-5, privacy_unit="record", ledger_head="b" * 64, ledger_entries=number, merkle_root="c" * 64,
        entry_id=f"{number}:x", created_at=time.time(),
    )  # fmt: skip


def _commit_rounds(one: Coordinator) -> None:
    """The run `demo` of h-1 and h-2, completed."""
    store = Store(f"sqlite:///{one.home / 'coordinator.sqlite'}")
    one.keys = {site: Keys(site, one.root / site) for site in ("h-1", "h-2")}
    with store.write() as session:
        for site, keys in one.keys.items():
            row = SiteRow(site=site, state="enrolled", invited_at=1.0, signing_key=keys.signing.public_hex)
            session.add(row)
    runs, commits = Runs(store), Commits.of(ServerHome(one.home), store)
    runs.launch(run_spec(sites=("h-1", "h-2"), rounds=ROUNDS, quorum=2))
    runs.begin_attempt("demo", "first")
    for number in range(1, ROUNDS + 1):
        replies = []
        for site, keys in one.keys.items():
            text = json.dumps(sign_document(keys.signing, _receipt(site, number).to_dict()))
            replies.append(Reply(site, "ok", epsilon_spent_total=0.5 * number, delta=1e-5, document_json=text))
            Events(store).note("demo", "reply-ok", "", round=number, site=site)
        adapter = pack({"w": np.full(4, number, np.float32)})
        commits.commit(CommittedRound("demo", "first", number, adapter, replies, received_bytes=100, seconds=1.0))
    store.close()


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Day]:
    """One coordinator for the whole module."""
    with contextlib.ExitStack() as ending:
        one = Coordinator(tmp_path_factory.mktemp("day"))
        ending.callback(one.close)
        _commit_rounds(one)
        one.up()
        made = Day(one)
        made.enrol()
        ending.enter_context(running(made.site.service))
        made.site.start()
        one.enrol(QUIET, LEAVER)
        one.invite("guest")
        until(lambda: "is ready" in made.site.service.log.read_text(), "the agent is ready")
        yield made


def test_a_plan_says_who_affords_what_and_who_would_refuse_and_why(day: Day) -> None:
    """The site's own answer, signed by it; silent, offline and unknown sites by name; nothing is spent."""
    with day.one.client(QUIET) as client:
        assert client.get("/v1/hello").status_code == 200  # it is online, and answers no plans
    spec = day.spec("next", [REAL, "h-1", QUIET, "guest"], quorum=2, noise_multiplier=0.6, rounds=20)
    code, found = day.plan(spec, "--wait", "10")
    sites = {each["site"]: each for each in found["sites"]}
    assert code == 11
    assert {name: each["status"] for name, each in sites.items()} == {
        REAL: "refused", "h-1": "not-online", QUIET: "silent", "guest": "not-enrolled",
    }  # fmt: skip
    assert (found["affordable"], found["rounds_everywhere"], found["rounds_with_quorum"]) == (False, 0, 0)
    told = sites[REAL]["objections"]
    assert told[0] == "policy: noise_multiplier 0.6 < 0.8"
    assert told[1].startswith("budget-exhausted: ")
    assert sites[REAL]["noise_that_fits"] >= 0.8  # what the policy wants at the least
    key = day.admin("sites", "show", REAL)["signing_key"]
    answer = PlanAnswer.from_dict(open_document(sites[REAL]["answer"], key))
    assert (answer.site, [str(each) for each in answer.objections]) == (REAL, told)
    assert day.site.audit("spends")["spends"] == []


def test_the_exit_code_of_a_plan_says_whether_all_is_affordable(day: Day) -> None:
    """0 with everybody's consent; 16 when nobody refuses but one is silent; 11 with another base model."""
    code, found = day.plan(day.spec("fits", [REAL]))
    assert (code, found["affordable"], found["rounds_everywhere"]) == (0, True, 5)
    code, found = day.plan(day.spec("half", [REAL, "h-2"]), "--wait", "8")
    assert (code, found["affordable"], found["rounds_everywhere"], found["rounds_with_quorum"]) == (16, False, 0, 5)
    other = day.spec("other", [REAL], base_model="sha256:" + "9" * 64)
    done = day.run("runs", "plan", str(other), check=False)
    assert done.returncode == 11
    assert "unknown-base-model: " in done.stdout
    assert "0 with every site" in done.stdout


def test_a_budget_that_holds_some_rounds_says_how_many_and_which_noise_would_do(day: Day) -> None:
    """Fewer rounds than asked fit, and the noise multiplier that is told makes all of them fit."""
    code, found = day.plan(day.spec("tight", [REAL], rounds=400))
    only = found["sites"][0]
    assert code == 11
    assert 0 < only["rounds_affordable"] < 400
    assert found["rounds_everywhere"] == found["rounds_with_quorum"] == only["rounds_affordable"]
    assert day.plan(day.spec("wider", [REAL], rounds=400, noise_multiplier=only["noise_that_fits"]))[0] == 0


def test_an_answer_of_another_site_or_signer_is_not_taken(day: Day) -> None:
    """A site cannot answer for another one, nor with another key, nor what was not asked; nor can a stranger look."""
    spec = day.spec("forged", [QUIET])
    asking = subprocess.Popen(
        [str(BIN / "fl-admin"), "runs", "plan", str(spec), "--wait", "20", "--json"],
        env=environment(FL_SERVER_HOME=str(day.one.home)), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with day.one.client(QUIET) as client, day.one.client(LEAVER) as other, day.one.client() as stranger:
        until(lambda: bool(client.get("/v1/questions").json()["questions"]), "the question is there")
        document = client.get("/v1/questions").json()["questions"][0]
        assert other.get("/v1/questions").json()["questions"] == []
        assert stranger.get("/v1/questions").status_code == 403
        question = PlanQuestion.from_dict(open_document(document, day.one.facts["coordinator_key"]))
        honest = PlanAnswer(question.question, question.digest, QUIET, 5, 7, 0.0, (), question.issued_at)
        body = honest.to_dict()
        own, foreign = day.one.keys[QUIET].signing, SigningKey.generate()
        for sender, wrong in (
            (other, sign_document(day.one.keys[LEAVER].signing, body)),
            (client, sign_document(foreign, body)),
            (client, sign_document(own, body | {"site": LEAVER})),
            (client, sign_document(own, body | {"question_digest": "sha256:" + "0" * 64})),
            (client, sign_document(own, body | {"rounds_asked": 6})),
            (client, sign_document(own, body | {"objections": ["because: no"]})),
            (client, {"body": body}),
            (client, None),
        ):
            assert sender.post("/v1/answers", json={"answer": wrong}).status_code == 400, wrong
        assert client.post("/v1/answers", content=b"[" * 5000).status_code == 400
        assert client.post("/v1/answers", json={"answer": sign_document(own, body)}).status_code == 200
        assert client.get("/v1/questions").json()["questions"] == []
    found = json.loads(asking.communicate(timeout=60)[0])
    assert asking.returncode == 0
    assert (found["sites"][0]["status"], found["sites"][0]["rounds_affordable"]) == ("affordable", 7)


def test_logs_show_what_happened_in_order(day: Day) -> None:
    """Every event as text and as JSON lines; only a site's; `--follow` ends with the run."""
    lines = [json.loads(line) for line in day.run("runs", "logs", "demo", "--json").stdout.splitlines()]
    kinds = [each["kind"] for each in lines]
    assert [each["number"] for each in lines] == sorted(each["number"] for each in lines)
    assert kinds[0] == "launched"
    assert kinds[-1] == "completed"
    assert kinds.count("round-committed") == ROUNDS
    own = day.run("runs", "logs", "demo", "--site", "h-1", "--json").stdout.splitlines()
    assert {json.loads(line)["site"] for line in own} == {"h-1"}
    text = day.run("runs", "logs", "demo", "--follow").stdout.splitlines()
    assert len(text) == len(lines)
    assert "round-committed" in text[kinds.index("round-committed")]
    wrong = day.run("runs", "logs", "nonsense", check=False)
    assert (wrong.returncode, "nonsense" in wrong.stderr) == (18, True)


def test_exported_receipts_are_what_the_auditor_reads(day: Day, tmp_path: Path) -> None:
    """The file loads as `fl-audit --receipts` loads it; every receipt opens with its site's key."""
    out = tmp_path / "receipts.json"
    assert day.admin("receipts", "export", "--site", "h-1", "--out", str(out))["receipts"] == ROUNDS
    kept = receipts.load(str(out), "h-1")
    keys = [day.one.keys["h-1"].signing.public_hex]
    assert [(each.opened(keys).run, each.opened(keys).round) for each in kept] == [("demo", 1), ("demo", 2)]
    assert day.run("receipts", "export", "--out", str(out), check=False).returncode == 2
    made = day.admin("receipts", "export", "--run", "demo", "--out", str(out), "--force")
    assert (made["receipts"], made["sites"]) == (2 * ROUNDS, ["h-1", "h-2"])
    assert day.run("receipts", "export", "--site", "no", "--out", "x", check=False).returncode == 2


def test_a_promoted_adapter_is_exported_by_its_name(day: Day, tmp_path: Path) -> None:
    """The newest promotion counts, the earlier ones stay known, and only a committed round can be promoted."""
    first = day.admin("adapters", "promote", "demo", "--round", "1", "--as", "production")
    assert (first["name"], first["adapter"]["round"], first["promoted_by"]) == ("production", 1, "admin")
    day.admin("adapters", "promote", "demo", "--as", "candidate")
    second = day.admin("adapters", "promote", "demo", "--as", "production")
    assert second["adapter"]["round"] == ROUNDS
    again = day.admin("adapters", "promote", "demo", "--as", "production")
    assert again["promoted_at"] == second["promoted_at"]
    listed = {each["name"]: each["adapter"]["round"] for each in day.admin("adapters", "list")["releases"]}
    assert listed == {"production": ROUNDS, "candidate": ROUNDS}
    history = day.admin("adapters", "list", "--history")["releases"]
    assert [(e["name"], e["adapter"]["round"], e["current"]) for e in history] == [
        ("production", 2, True), ("candidate", 2, True), ("production", 1, False),
    ]  # fmt: skip
    of_run = {each["round"]: each["released_as"] for each in day.admin("adapters", "list", "demo")["adapters"]}
    assert of_run == {1: [], 2: ["candidate", "production"]}
    out = tmp_path / "production.safetensors"
    made = day.admin("adapters", "export", "--released", "production", "--out", str(out))
    assert (made["round"], digest(out.read_bytes())) == (ROUNDS, second["adapter"]["digest"])
    shown = day.admin("adapters", "show", "--released", "production")
    assert (shown["run"], shown["round"]) == ("demo", ROUNDS)
    assert {each["site"] for each in shown["replies"]} == {"h-1", "h-2"}
    for wrong in (
        ("promote", "demo", "--round", "9", "--as", "production"),
        ("promote", "demo", "--as", "Not A Name"),
        ("promote", "nonsense", "--as", "production"),
        ("export", "--released", "nothing", "--out", str(tmp_path / "x")),
        ("export", "--out", str(tmp_path / "x")),
        ("show", "demo", "--released", "production"),
        ("show", "demo", "--round", "7"),
    ):
        done = day.run("adapters", *wrong, check=False)
        assert done.returncode in (2, 18), wrong
        assert "fix: " in done.stderr


def test_a_site_is_shown_whole_and_revoked_with_a_reason(day: Day) -> None:
    """Fingerprints, epsilon of its newest receipt; after the revocation its next request is refused."""
    shown = day.admin("sites", "show", "h-1")
    assert shown["state"] == "enrolled"
    assert shown["epsilon_spent_total"] > 0
    assert shown["delta"] > 0
    with day.one.client(LEAVER) as client:
        assert client.get("/v1/questions").status_code == 200
        gone = day.admin("sites", "revoke", LEAVER, "--reason", "contract ended")
        assert gone["state"] == "revoked"
        assert gone["revoked_at"] > 0
        assert client.get("/v1/questions").status_code == 403
    assert day.actions()[-1]["arguments"] == {"site": LEAVER, "reason": "contract ended"}


def _complete(day: Day, line: str, where: Path, home: Path | None = None) -> list[str]:
    """What bash offers after TAB, through the very function that argcomplete registers."""
    script = (
        'eval "$(register-python-argcomplete fl-admin)"\n'
        f"COMP_LINE={line!r} COMP_POINT={len(line)} COMP_TYPE=9\nCOMPREPLY=()\n"
        '_python_argcomplete fl-admin\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=where, capture_output=True, text=True, timeout=60, check=False,
        env=environment(FL_SERVER_HOME=str(home or day.one.home)),
    )  # fmt: skip
    assert "Traceback" not in done.stderr + done.stdout
    return [each.strip() for each in done.stdout.splitlines() if each.strip()]


def test_tab_completes_verbs_and_names(day: Day, tmp_path: Path) -> None:
    """Groups, verbs, options, runs, sites, rounds, releases, spec files; without a coordinator no names, no error."""
    (tmp_path / "hospital.toml").write_text("")
    (tmp_path / "notes.txt").write_text("")
    assert _complete(day, "fl-admin ru", tmp_path) == ["runs"]
    assert "plan" in _complete(day, "fl-admin runs p", tmp_path)
    assert _complete(day, "fl-admin runs plan --wa", tmp_path) == ["--wait"]
    assert _complete(day, "fl-admin runs plan ho", tmp_path) == ["hospital.toml"]
    assert "notes.txt" not in _complete(day, "fl-admin runs launch ", tmp_path)
    assert _complete(day, "fl-admin runs logs de", tmp_path) == ["demo"]
    assert _complete(day, "fl-admin sites revoke re", tmp_path) == [REAL]
    assert {"h-1", "h-2"} <= set(_complete(day, "fl-admin runs logs demo --site h-", tmp_path))
    assert {"1", "2"} <= set(_complete(day, "fl-admin adapters promote demo --round ", tmp_path))
    assert "production" in _complete(day, "fl-admin adapters export --released pro", tmp_path)
    assert _complete(day, "fl-admin runs logs de", tmp_path, home=tmp_path) == []


def test_every_action_is_logged_with_its_outcome_and_auditors_may_check(day: Day, tmp_path: Path) -> None:
    """Who, what, how it ended; an auditor reads and verifies but can do nothing, and the key's change is followed."""
    one, home = day.one, str(day.one.home)
    one.run("fl-server", "issue", "--home", home, "--role", "auditor", "--name", "ada", "--out", str(tmp_path / "a"))
    profile = ("--profile", str(tmp_path / "a" / "auditor.toml"))
    assert day.run("runs", "launch", str(day.spec("demo", ["h-1"])), check=False).returncode == 18
    assert day.run("runs", "stop", "demo", check=False).returncode == 18
    assert day.run("runs", "stop", "demo", *profile, check=False).returncode == 1
    found = day.actions()
    told = {(each["action"], each["arguments"].get("run") or each["arguments"].get("site", "")) for each in found}
    assert {("runs plan", "fits"), ("runs launch", "demo"), ("sites invite", REAL)} <= told
    assert ("adapters promote", "demo") in told
    issued = next(each for each in found if each["action"] == "certificates issue")
    assert (issued["role"], issued["arguments"]["name"], issued["outcome"]["result"]) == ("host", "ada", "done")
    stopped = [(e["name"], e["role"], e["outcome"]["result"]) for e in found if e["action"] == "runs stop"]
    assert stopped == [("admin", "admin", "refused")]
    text = json.dumps(found)
    assert "ct1." not in text  # a token is a secret
    pin = one.facts["coordinator_key"]
    report = day.admin("audit", "verify", "--public-key", pin, *profile)
    assert (report["intact"], report["problems"], report["open"]) == (True, [], [])
    other = SigningKey.generate().public_hex
    assert day.run("audit", "verify", "--public-key", other, *profile, check=False).returncode == 13
    one.run("fl-server", "rotate-key", "--home", home, "--grace-days", "1")
    day.admin("sites", "invite", "another")
    after = day.admin("audit", "verify", "--public-key", pin, "--checkpoint", f"{report['entries']}:{report['head']}")
    assert after["intact"]
    assert len(after["keys"]) == 2
    assert "promote" in day.run("audit", "list", *profile).stdout


def test_a_log_changed_in_the_database_is_found_from_outside(day: Day) -> None:
    """Last, because it spoils the log: whoever owns the database rewrites a name, and `audit verify` says which."""
    with contextlib.closing(sqlite3.connect(day.one.home / "coordinator.sqlite", timeout=30)) as database:
        with pytest.raises(sqlite3.DatabaseError, match="append-only"):
            database.execute("UPDATE admin_log SET body = '{}' WHERE seq = 2")
        database.rollback()
        database.execute("DROP TRIGGER admin_log_refuse_update")
        database.execute("UPDATE admin_log SET body = replace(body, 'real', 'fake') WHERE seq = 2")
        database.commit()
    done = day.run("audit", "verify", check=False)
    assert done.returncode == 13
    assert "PROBLEM  entry 2: its content was changed" in done.stdout

"""A launch against the bases that sites have: a real coordinator, a real agent on a base without shared experts."""

from __future__ import annotations

import contextlib
import csv
import json
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fl_client.model.layout import directory_digest
from fl_client.model.quantise import quantise_directory
from fl_client.model.recipe.pretrain import train_tokenizer
from fl_shared.documents.order import BY_DIGEST, ORDERS_HEADER
from harness import Site, running
from helpers.coordinators import Coordinator, until
from helpers.ports import free_port
from helpers.random_models import float_model, small_config
from helpers.specs import site_toml, write_spec

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

REAL, QUIET = "real", "quiet"


class Federation:
    """One coordinator, one real agent whose OLMoE has no shared experts, one site that announces nothing."""

    def __init__(self, one: Coordinator, folder: Path) -> None:
        self.one = one
        self.site = Site(REAL, one.root)
        tokenizer = train_tokenizer(["cholera due to vibrio cholerae", "a room where patients are seen"] * 3)
        config = small_config("olmoe")
        config.vocab_size = 320
        model: Any = float_model(config)
        model.save_pretrained(folder / "float")
        tokenizer.save_pretrained(folder / "float")
        self.model = folder / "base"
        quantise_directory(folder / "float", self.model)
        self.base = directory_digest(self.model)

    def enrol(self) -> None:
        """Enrol both sites; configure the real one."""
        self.site.enroll(self.one.url, self.one.invite(REAL))
        data = self.one.root / "records.csv"
        with data.open("w", newline="", encoding="utf-8") as sink:
            rows = ((f"cough number {number}", ("A", "B")[number % 2]) for number in range(120))
            csv.writer(sink).writerows([("text", "label"), *rows])
        node = {"launch": False, "tunnel_port": free_port()}
        self.site.configure(
            site_toml(REAL, self.one.url, data={"path": data}, model={"directory": self.model}, supernode=node)
        )
        self.one.enrol(QUIET)

    def spec(self, name: str, *targets: str, base: str = "", sites: tuple[str, ...] = (REAL,)) -> Path:
        """A spec file that the site's policy allows."""
        return write_spec(
            self.one.root / f"{name}.toml",
            name=name,
            base_model=base or self.base,
            sites=sites,
            rounds=2,
            targets=targets,
            steps_per_round=2,
        )

    def launch(self, spec: Path, *more: str) -> subprocess.CompletedProcess[str]:
        """`fl-admin runs launch`."""
        return self.one.run("fl-admin", "runs", "launch", str(spec), *more, check=False)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """It runs, and the real site has announced its base."""
    with contextlib.ExitStack() as ending:
        one = Coordinator(tmp_path_factory.mktemp("launch"))
        ending.callback(one.close)
        made = Federation(one, tmp_path_factory.mktemp("model"))
        one.up()
        made.enrol()
        ending.enter_context(running(made.site.service))
        made.site.start()
        until(lambda: bool(one.admin("sites", "show", REAL)["base_model"]), "the base model is announced")
        yield made


def test_the_coordinator_knows_the_base_that_the_agent_has_loaded(federation: Federation) -> None:
    """As JSON in list and show, and for people; a site that has announced nothing says so."""
    rows = {row["site"]: row for row in federation.one.admin("sites", "list")["sites"]}
    assert rows[REAL]["base_model"] == federation.base
    assert rows[REAL]["base_targets"] == ["attention", "routed_experts"]
    assert rows[REAL]["base_announced_at"] > 0
    assert (rows[QUIET]["base_model"], rows[QUIET]["base_targets"]) == ("", [])
    shown = federation.one.run("fl-admin", "sites", "show", REAL).stdout
    assert federation.base in shown
    assert "attention, routed_experts, told 2" in shown
    assert "not announced yet" in federation.one.run("fl-admin", "sites", "show", QUIET).stdout


def test_the_documented_spec_is_refused_before_anything_runs(federation: Federation) -> None:
    """`shared_experts` on a base without them: launch and plan name the site and the fix; nothing is charged."""
    before = federation.site.audit("budgets")["budgets"]
    spec = federation.spec("documented", "attention", "shared_experts", "routed_experts")
    done = federation.launch(spec)
    assert done.returncode == 18, done
    assert f"{REAL}: the base model has no shared_experts" in done.stderr
    assert "fix: set [lora] targets to attention, routed_experts; --force" in done.stderr
    planned = federation.one.run("fl-admin", "runs", "plan", str(spec), "--json", check=False)
    (told,) = json.loads(planned.stdout)["sites"]
    assert (planned.returncode, told["status"], told["answer"]) == (11, "refused", None)
    assert told["objections"][0].startswith("unsupported-spec: the base model has no shared_experts")
    assert federation.one.admin("runs", "list")["runs"] == []
    assert federation.site.audit("spends")["spends"] == []
    assert federation.site.audit("budgets")["budgets"] == before


def test_another_base_is_refused_with_both_digests(federation: Federation) -> None:
    """The fix names the base that the site has."""
    other = "sha256:" + "9" * 64
    done = federation.launch(federation.spec("other", "attention", base=other))
    assert done.returncode == 18, done
    assert other in done.stderr
    assert f"fix: set [run] base_model to {federation.base}, which these sites have; --force" in done.stderr
    assert federation.one.admin("runs", "list")["runs"] == []


def test_an_announcement_of_another_form_changes_nothing(federation: Federation) -> None:
    """Wrong fields, no JSON, a key twice, too much: refused, and the row stays as it was; a right one is taken."""
    good = {"kind": "base-model", "digest": federation.base, "targets": ["attention"]}
    raw = json.dumps(good)
    with federation.one.client(QUIET) as client:
        for wrong in (
            b"", b"[" * 4000, b"\xff\xfe", b"[]", b"NaN", json.dumps(good | {"site": REAL}).encode(),
            json.dumps(good | {"targets": ["head"]}).encode(), json.dumps(good | {"digest": "x"}).encode(),
            raw.replace("{", '{"digest": "x", ', 1).encode(),
        ):  # fmt: skip
            answer = client.post("/v1/base", content=wrong)
            assert (answer.status_code, answer.json()["fix"] != "") == (400, True), (wrong[:80], answer.text)
        assert client.post("/v1/base", content=raw + " " * 5000).status_code == 413
        assert client.get("/v1/base").status_code == 404
        assert federation.one.admin("sites", "show", QUIET)["base_model"] == ""
        assert client.post("/v1/base", content=raw).json() == {"taken": True}
    assert federation.one.admin("sites", "show", QUIET)["base_targets"] == ["attention"]
    assert federation.one.admin("sites", "show", REAL)["base_targets"] == ["attention", "routed_experts"]


def orders_read(federation: Federation, site: str) -> int:
    """Which orders the coordinator holds a site to read."""
    with closing(sqlite3.connect(federation.one.home / "coordinator.sqlite", timeout=30)) as database:
        ((orders,),) = database.execute("SELECT orders FROM sites WHERE site = ?", (site,)).fetchall()
    return int(orders)


def test_an_announcement_says_which_orders_the_site_reads(federation: Federation) -> None:
    """A real agent of this version says 2. One that says nothing, or nonsense, sets it back: it gets whole orders."""
    assert orders_read(federation, REAL) == BY_DIGEST
    good = {"kind": "base-model", "digest": federation.base, "targets": ["attention"]}
    with federation.one.client(QUIET) as client:
        for said, expected in (("2", 2), (None, 0), ("3", 3), ("x", 0), ("2", 2), ("-2", 0), ("2.0", 0), ("99999", 0)):
            headers = {} if said is None else {ORDERS_HEADER: said}
            assert client.post("/v1/base", json=good, headers=headers).status_code == 200
            assert orders_read(federation, QUIET) == expected, said
        client.post("/v1/base", json=good, headers={ORDERS_HEADER: "2"})
        twice = [(ORDERS_HEADER, "0"), (ORDERS_HEADER, "2")]
        assert client.post("/v1/base", json=good, headers=twice).status_code == 400
        assert client.post("/v1/base", content=b"{}").status_code == 400
    assert orders_read(federation, QUIET) == 2


def test_a_site_that_enrols_again_has_announced_nothing(federation: Federation) -> None:
    """Its new home may hold another base; a launch names it in a warning, and what fits is launched."""
    with federation.one.client(QUIET) as client:
        announced = {"kind": "base-model", "digest": federation.base, "targets": ["attention"]}
        assert client.post("/v1/base", json=announced, headers={ORDERS_HEADER: "2"}).status_code == 200
    (federation.one.keys[QUIET].folder / "signing.pem").unlink()
    federation.one.enrol(QUIET)
    assert federation.one.admin("sites", "show", QUIET)["base_model"] == ""
    assert orders_read(federation, QUIET) == 0
    done = federation.launch(federation.spec("fits", "attention", "routed_experts", sites=(REAL, QUIET)), "--json")
    assert done.returncode == 0, done
    assert done.stderr == f"warning: not compared, since no base model was announced yet: {QUIET}\n"
    assert json.loads(done.stdout)["warnings"] == [done.stderr.removeprefix("warning: ").strip()]
    federation.one.run("fl-admin", "runs", "stop", "fits")


def test_force_launches_what_does_not_fit(federation: Federation) -> None:
    """The refusal becomes a warning, and the admin log holds that it was forced."""
    done = federation.launch(federation.spec("forced", "shared_experts"), "--force")
    assert done.returncode == 0, done
    assert f"{REAL}: the base model has no shared_experts" in done.stderr
    federation.one.run("fl-admin", "runs", "stop", "forced")
    entries = [each["body"] for each in federation.one.admin("audit", "list")["entries"] if each["kind"] == "action"]
    launches = [each["arguments"] for each in entries if each["action"] == "runs launch"]
    assert launches[-1]["force"] is True
    assert federation.site.audit("spends")["spends"] == []

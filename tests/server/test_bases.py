"""Announced base models in SQL, on SQLite and on PostgreSQL: what a launch and a plan make of them."""

from __future__ import annotations

import dataclasses
from importlib import resources
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from fl_server.db.models import EventRow, QuestionRow, RunRow, SiteRow
from fl_server.db.store import Store
from fl_server.identity.sites import Sites
from fl_server.runs.bases import MAX_EXPLANATION, Fit, announced
from fl_server.runs.plans import Plans
from fl_server.runs.service import Runs
from fl_shared.documents.base_model import BaseModel
from fl_shared.documents.spec import LORA_TARGETS, RunSpec
from fl_shared.errors import ConfigError, RunError
from fl_shared.identity.signing import SigningKey
from helpers.specs import run_spec

ASKED, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
WHOLE = BaseModel(ASKED, LORA_TARGETS)
NO_SHARED = BaseModel(ASKED, ("attention", "routed_experts"))
SITES = ("h-1", "h-2", "h-3")
FITTING = "set [lora] targets to attention, routed_experts"


@pytest.fixture
def sites(store: Store) -> Sites:
    """Three enrolled sites that have announced nothing."""
    with store.write() as session:
        for site in SITES:
            session.add(SiteRow(site=site, state="enrolled", invited_at=1.0))
    return Sites(store)


def _spec(*targets: str) -> RunSpec:
    return run_spec(sites=SITES, targets=targets or LORA_TARGETS)


def test_the_newest_announcement_is_stored(sites: Sites) -> None:
    """It reads back equal, replaces the one before, and says nothing of other sites."""
    assert announced(sites.get("h-1")) is None
    for base in (WHOLE, BaseModel(OTHER, ("attention",))):
        sites.announce("h-1", base)
        row = sites.get("h-1")
        assert announced(row) == base
        assert row.base_announced_at > 0
    assert announced(sites.get("h-2")) is None


def test_a_launch_that_names_what_a_base_lacks_stores_nothing(store: Store, sites: Sites) -> None:
    """The error names the sites, the group and the fix; what the fix says is launched."""
    runs = Runs(store)
    for site, base in zip(SITES, (NO_SHARED, WHOLE, NO_SHARED), strict=True):
        sites.announce(site, base)
    with pytest.raises(RunError) as caught:
        runs.launch(_spec())
    error = caught.value
    assert (error.code, error.exit_code) == ("unfit-spec", 18)
    assert "h-1, h-3: the base model has no shared_experts" in error.message
    assert "h-2" not in error.message
    assert error.fix.startswith(f"{FITTING}; --force ")
    with store.read() as session:
        assert (session.query(RunRow).count(), session.query(EventRow).count()) == (0, 0)
    assert runs.launch(_spec("attention", "routed_experts")).warnings == ()


@pytest.mark.parametrize(
    ("bases", "fix"),
    [
        ((OTHER, OTHER, OTHER), f"set [run] base_model to {OTHER}, which these sites have; {FITTING}; --force"),
        ((OTHER, ASKED, OTHER), "give these sites the run's base model, or take them out of [run] sites; --force"),
    ],
)  # fmt: skip
def test_a_launch_for_another_base_is_refused(store: Store, sites: Sites, bases: tuple[str, ...], fix: str) -> None:
    """Both digests are told; when all sites have one and the same other base, the fix is a spec that runs on it."""
    for site, digest in zip(SITES, bases, strict=True):
        sites.announce(site, WHOLE if digest == ASKED else BaseModel(digest, NO_SHARED.targets))
    with pytest.raises(RunError) as caught:
        Runs(store).launch(_spec())
    wrong = ", ".join(site for site, digest in zip(SITES, bases, strict=True) if digest == OTHER)
    assert f"{wrong}: the run is for base model {ASKED}, this site has {OTHER}" in caught.value.message
    assert caught.value.fix.startswith(fix)


def test_a_group_that_no_two_bases_share_has_a_fix_too(store: Store, sites: Sites) -> None:
    """Where no target is left, the fix does not propose an empty list."""
    sites.announce("h-1", BaseModel(ASKED, ("attention",)))
    with pytest.raises(RunError) as caught:
        Runs(store).launch(_spec("shared_experts"))
    assert caught.value.fix.startswith("name [lora] targets that every base model has")


def test_who_has_announced_nothing_does_not_block_and_is_named(store: Store, sites: Sites) -> None:
    """Neither an enrolled nor an invited site; the warning is the launch's alone."""
    runs = Runs(store)
    sites.announce("h-1", WHOLE)
    with store.write() as session:
        session.get_one(SiteRow, "h-3").state = "invited"
    view = runs.launch(_spec())
    assert view.warnings == ("not compared, since no base model was announced yet: h-2, h-3",)
    assert (view.row.state, runs.show("demo").warnings) == ("pending", ())


def test_force_launches_and_says_what_does_not_fit(store: Store, sites: Sites) -> None:
    """The same words as the refusal, as a warning."""
    sites.announce("h-2", NO_SHARED)
    view = Runs(store).launch(_spec(), force=True)
    assert view.row.state == "pending"
    assert "h-2: the base model has no shared_experts" in view.warnings[0]
    assert view.warnings[1].endswith("h-1, h-3")


def test_a_thousand_sites_fit_into_one_answer() -> None:
    """gRPC carries 8 KiB of details: the message is cut, and says where the rest is."""
    names = [f"hospital-{number:04}-{'x' * 40}" for number in range(1000)]
    rows = [
        SiteRow(site=name, base_model=f"sha256:{number:064x}", base_targets="attention")
        for number, name in enumerate(names)
    ]
    spec = dataclasses.replace(_spec(), run=dataclasses.replace(_spec().run, sites=tuple(names)))
    with pytest.raises(RunError) as caught:
        Fit.of(spec, rows).require()
    assert len(caught.value.message) < MAX_EXPLANATION + 200
    assert "fl-admin runs plan" in caught.value.message
    silent = Fit.of(spec, [SiteRow(site=name, base_model="") for name in names])
    assert silent.warnings()[0].endswith("and 980 more")


def test_a_plan_knows_at_once_who_would_refuse(store: Store, sites: Sites) -> None:
    """A site whose base the spec does not fit is not asked; the objection is the one that it would give itself."""
    sites.announce("h-1", NO_SHARED)
    sites.announce("h-2", WHOLE)
    plan = Plans(store).ask(_spec(), SigningKey.generate(), 30.0)
    assert plan.asked == ("h-2", "h-3")
    (view,) = plan.not_asked
    assert (view.site, view.status, view.answer) == ("h-1", "refused", None)
    assert [str(each) for each in view.objections] == [
        f"unsupported-spec: the base model has no shared_experts; {FITTING}, or fewer"
    ]
    with store.read() as session:
        assert {row.site for row in session.query(QuestionRow)} == {"h-2", "h-3"}


def test_a_database_of_the_version_before_keeps_its_sites(store: Store, sites: Sites) -> None:
    """Down to 0004 and up again: the rows stay, and nobody has announced anything."""
    sites.announce("h-1", WHOLE)
    config = Config()
    config.set_main_option("script_location", str(resources.files("fl_server.db") / "migrations"))
    config.attributes["configure_logger"] = False
    with store._engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0004")
        columns = {each["name"] for each in sa.inspect(connection).get_columns("sites")}
    assert not columns & {"base_model", "base_targets", "base_announced_at"}
    store.migrate()
    assert [(row.site, announced(row)) for row in sites.all()] == [(site, None) for site in SITES]


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "sha256:1"}, {"digest": None}, {"targets": []}, {"targets": "attention"}, {"targets": ["head"]},
        {"targets": ["attention", "attention"]}, {"targets": ["attention,routed_experts"]}, {"kind": "base"},
        {"more": 1},
    ],
)  # fmt: skip
def test_an_announcement_of_another_form_is_refused(change: dict[str, Any]) -> None:
    """Every field is checked, and none may be added."""
    assert BaseModel.from_dict(WHOLE.to_dict()) == WHOLE
    with pytest.raises(ConfigError):
        BaseModel.from_dict(WHOLE.to_dict() | change)

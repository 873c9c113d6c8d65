"""Open everything that a site's trusted half holds: keys, ledger, data set, budget, model, rounds."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fl_client.agent.head import LedgerHead, require_newest
from fl_client.agent.outgoing import Outgoing
from fl_client.agent.progress import Progress
from fl_client.agent.releases import ReleaseStore
from fl_client.agent.rounds import Rounds, SiteFacts
from fl_client.data.load import load_unit_data, most_units, row_report, split_holdout
from fl_client.data.units import UnitData
from fl_client.identity.keys import finish as finish_key
from fl_client.identity.keys import publish
from fl_client.site.config import SiteConfig
from fl_client.site.home import SiteHome
from fl_client.training.ranks.group import RankGroup
from fl_shared.documents.spec import RunSpec
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger.records import Dataset
from fl_shared.ledger.service import Ledger
from fl_shared.privacy.mechanism import Mechanism
from fl_shared.runtime.logs import adopt_libraries

if TYPE_CHECKING:
    from fl_client.model.load import LoadedModel
    from fl_client.training.round import TrainingResult

log = logging.getLogger("fl_client.agent")

PUBLIC_UNIT = "public"
"""Stands in ledger and receipts in place of a privacy unit when data declared public is trained without noise."""


def open_ledger(home: SiteHome, config: SiteConfig) -> tuple[Ledger, SigningKey]:
    """Open the site's ledger for writing with the site's signing key; `keys/signing.pub` is written where it is not."""
    finish_key(home, config.ledger_url, config.site)
    publish(home)
    key = SigningKey.load(home.signing_key)
    return Ledger.open(config.ledger_url, key, config.site), key


def register(ledger: Ledger, config: SiteConfig, data: UnitData) -> Dataset:
    """Enter the data set and its budget into the ledger; nothing happens when both are recorded there already."""
    dataset = ledger.register_dataset(
        config.data.name,
        data.fingerprint,
        PUBLIC_UNIT if config.policy.allow_non_private else config.data.privacy_unit,
        data.units,
        config.data.max_records_per_unit,
        shares_with=config.data.shares_units_with,
    )
    budget = config.budget
    ledger.set_budget(
        dataset,
        budget.epsilon,
        budget.delta,
        budget.approver,
        valid_from=_moment(budget.valid_from),
        valid_to=_moment(budget.valid_to),
    )
    return dataset


def _moment(text: str | None) -> dt.datetime | None:
    return dt.datetime.fromisoformat(text) if text else None


def load_base(config: SiteConfig) -> LoadedModel:
    """Load the base model once, with the configured number of threads.

    Imported here: torch takes seconds to import, and enrolling or looking at the status needs none of it.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(config.model.threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from fl_client.model.load import load_model

    torch.set_num_threads(config.model.threads)
    model = load_model(config.model.directory, device=config.model.device)
    if config.model.engine == "hooks":
        model = dataclasses.replace(model, engine="hooks")
    adopt_libraries()
    return model


def load_and_try_base(config: SiteConfig) -> LoadedModel:
    """The base model, after one forward and one backward on its device; raises as `try_device`."""
    model = load_base(config)
    from fl_client.training.device import try_device  # torch

    log.info("device: %s", try_device(model))
    return model


def base_digest(config: SiteConfig) -> str:
    """The base model's digest, from its files alone."""
    from fl_client.model.layout import directory_digest  # torch
    from fl_client.model.load import resolve

    return directory_digest(resolve(config.model.directory))


def base_targets(config: SiteConfig) -> tuple[str, ...]:
    """The groups of layers that the base model has, from its configuration alone."""
    from fl_client.model.layout import skeleton, target_groups  # torch
    from fl_client.model.load import resolve

    return target_groups(skeleton(resolve(config.model.directory)))


@dataclass
class OpenSite:
    """The trusted half, ready for rounds. `data` is trained on; `holdout` is for evaluation alone; `rows` tells what is
    used of the table, for whoever sits at the site.

    With more than one process `ranks` holds the model for training, and this process only when something asks for it.
    """

    config: SiteConfig
    ledger: Ledger
    outgoing: Outgoing
    data: UnitData
    holdout: UnitData | None
    dataset: Dataset
    rounds: Rounds
    base: Callable[[], LoadedModel]
    ranks: RankGroup | None
    facts: SiteFacts
    store: ReleaseStore
    rows: str

    @property
    def model(self) -> LoadedModel:
        """The base model in this process."""
        return self.base()

    def close(self) -> None:
        """End the ranks, and give the ledger's connections back."""
        if self.ranks is not None:
            self.ranks.stop()
        self.ledger.close()


def open_site(
    home: SiteHome,
    config: SiteConfig,
    accepts_key: Callable[[str], bool],
    timed: Callable[[Callable[..., None]], Callable[..., None]] = lambda progress: progress,
    *,
    namespace: str = "",
) -> OpenSite:
    """Open all of it, in the order in which mistakes are cheapest to find; `accepts_key`, `namespace`: see `SiteFacts`.

    `timed` wraps the training's progress callback, for whoever measures the steps.
    """
    from fl_client.tasks.cache import RecordCache  # torch
    from fl_client.tasks.registry import task_of
    from fl_client.tasks.task import usable

    ledger, key = open_ledger(home, config)
    store, head = ReleaseStore(home.releases), LedgerHead(home.ledger_head)
    try:
        require_newest(ledger, head, store)
        everything = load_unit_data(config.data, home.fingerprint_key)
        dataset = register(ledger, config, everything)
        data, holdout = split_holdout(everything, config.data.holdout, home.fingerprint_key)
        cache = RecordCache()
        log.info("loading the model from %s", config.model.directory.name)
        base = functools.cache(lambda: load_and_try_base(config))
        ranks: RankGroup | None = None
        if config.model.processes > 1:
            model_digest = base_digest(config)
            ranks = RankGroup(config.model, digest=model_digest, directory=home.ranks, log_file=home.logs / "ranks.log")
        else:
            model_digest = base().digest

        def train(
            spec: RunSpec, mechanism: Mechanism, offset: dict[str, Any], round_: int, progress: Any
        ) -> TrainingResult:
            from fl_client.training.round import train_round

            on = functools.partial(train_round, base(), cache=cache) if ranks is None else ranks.train
            chosen = usable(task_of(spec), data)
            if not chosen.units:
                log.warning("no record has a label of this run: the update is noise alone")
            return on(
                chosen,
                spec,
                mechanism,
                offset,
                round=round_,
                progress=timed(progress),
                # Of all units, not of those with these labels: the coordinator chooses the labels.
                expected_batch=mechanism.sampling_probability * (config.data.expected_units or data.units),
                most_units=most_units(config.data, data.units),
                records_per_unit=config.data.max_records_per_unit,
                private=not config.policy.allow_non_private,
            )

        def prepare(spec: RunSpec, offset: dict[str, Any]) -> None:
            from fl_client.training.round import prepare_round

            on = functools.partial(prepare_round, base()) if ranks is None else ranks.prepare
            private = not config.policy.allow_non_private
            on(
                spec, offset, private=private, max_adapter_norm=config.policy.max_adapter_norm,
                records_per_unit=config.data.max_records_per_unit,
            )  # fmt: skip

        facts = SiteFacts(
            site=config.site,
            accepts_key=accepts_key,
            model_digest=model_digest,
            policy=config.policy,
            dataset=dataset,
            namespace=namespace,
            targets=base_targets(config),
        )
        outgoing = Outgoing(key, ledger, namespace)
        rounds = Rounds(
            facts,
            ledger=ledger,
            store=store,
            outgoing=outgoing,
            train=train,
            prepare=prepare,
            written=lambda: head.write(ledger),
            progress=Progress(home.progress),
        )
        rounds.recover()
    except BaseException:
        ledger.close()
        raise
    rows = row_report(everything, config.data)
    return OpenSite(config, ledger, outgoing, data, holdout, dataset, rounds, base, ranks, facts, store, rows)

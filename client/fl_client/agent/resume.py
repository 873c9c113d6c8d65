"""`fl-client resume --ledger`: an operator's word that a ledger which was rolled back is the newest there is."""

from __future__ import annotations

from fl_client.agent.head import LedgerHead, accept, forgotten
from fl_client.agent.releases import ReleaseStore
from fl_client.agent.site import open_ledger
from fl_client.site.config import SiteConfig
from fl_client.site.home import SiteHome
from fl_client.site.locks import exclusive
from fl_shared.errors import ConfigError
from fl_shared.ledger.suspension import require_words


def accept_ledger(home: SiteHome, config: SiteConfig, operator: str, reason: str) -> int:
    """Record who accepts the ledger, and enter again what this home's releases know of; how many entries.

    Raises:
        ConfigError: nobody or no reason is named, nothing is wrong with the ledger, or the agent runs.
        BudgetExhausted: what was spent no longer fits.
    """
    require_words(operator, reason)
    home.make()
    with exclusive(home.run / "agent.lock", "resume"):
        ledger, _ = open_ledger(home, config)
        try:
            store, head = ReleaseStore(home.releases), LedgerHead(home.ledger_head)
            if not head.objection(ledger) and not forgotten(ledger, store):
                raise ConfigError("the ledger is as new as this home knows", fix="start the agent")
            return accept(ledger, config.data.name, head, store, operator, reason)
        finally:
            ledger.close()

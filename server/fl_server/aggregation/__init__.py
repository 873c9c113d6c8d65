"""How replies become the next global adapter: one small module per rule, chosen by the run spec.

A *rule* makes one update out of the sites' updates (`mean`, `robust`); a *server step* moves the global adapter by
it (`server_step`). `aggregate.RoundAggregate` puts both together for one round.
"""

from fl_server.aggregation.aggregate import RoundAggregate
from fl_server.aggregation.updates import Form

__all__ = ["Form", "RoundAggregate"]

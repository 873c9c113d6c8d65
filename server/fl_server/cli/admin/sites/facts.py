"""One site as `fl-admin` prints it."""

from __future__ import annotations

from fl_server.cli.show import moment, plain
from fl_shared.cli.output import print_json
from fl_shared.identity.fingerprints import grouped, grouped_key
from fl_shared.wire import control_pb2 as pb


def print_site(site: pb.Site, *, as_json: bool) -> None:
    """Print all that the coordinator knows of a site."""
    if as_json:
        print_json(plain(site))
        return
    rows = [
        ("site", site.site),
        ("state", f"{site.state}, {'online' if site.online else 'not online'}"),
        ("last seen", moment(site.last_seen_at)),
        ("invited", moment(site.invited_at)),
        ("enrolled", moment(site.enrolled_at)),
        ("revoked", moment(site.revoked_at)),
        ("site's certificate", grouped(site.certificate_fingerprint) if site.certificate_fingerprint else "-"),
        ("  valid until", moment(site.certificate_expires_at)),
        ("site's key", grouped_key(site.signing_key) if site.signing_key else "-"),
        ("Flower's node", f"{site.node_id or '-'}  {site.node_key_fingerprint}"),
        ("base model", site.base_model or "not announced yet"),
        ("  its layers", f"{', '.join(site.base_targets) or '-'}, told {moment(site.base_announced_at)}"),
        ("runs", ", ".join(site.runs) or "-"),
    ]
    if site.delta:
        rows.append(("epsilon", f"{site.epsilon_spent_total:.3f} spent at delta {site.delta:g}, by its newest receipt"))
    print_lines(*rows)


def print_lines(*rows: tuple[str, str]) -> None:
    """Print names and values below one another."""
    for name, value in rows:
        print(f"{name:<19} {value}")

"""The verbs that a site's packages bring to `fl-audit` (the entry points `concordat.audit_verbs`)."""

VERBS = {
    "fl_client.cli.audit.canaries": "audit the training engine itself with canaries (needs the client's parts)",
}

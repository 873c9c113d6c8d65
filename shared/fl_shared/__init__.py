"""What coordinator, site and auditor share: documents, signatures, the ledger and the accounting. No torch."""

__version__ = "0.1.0"

"""`fl-admin audit`: who asked the coordinator for what, and whether that record is intact.

The whole log travels and is checked here: an auditor need not take the coordinator's word for it.
"""

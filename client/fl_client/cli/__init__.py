"""The commands `fl-client` and `fl-model`, and a site's verbs of `fl-audit`: one folder a command, one file a verb."""

"""The commands `fl-server` and `fl-admin`: one folder a command and a group, one file a verb."""

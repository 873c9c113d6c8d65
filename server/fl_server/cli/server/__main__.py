"""`python -m fl_server.cli.server` is `fl-server`."""

import sys

from fl_server.cli.server import main

sys.exit(main())

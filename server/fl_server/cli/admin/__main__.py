"""`python -m fl_server.cli.admin` is `fl-admin`."""

import sys

from fl_server.cli.admin import main

sys.exit(main())

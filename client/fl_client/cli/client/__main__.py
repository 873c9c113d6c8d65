"""`python -m fl_client.cli.client` is `fl-client`."""

import sys

from fl_client.cli.client import main

sys.exit(main())

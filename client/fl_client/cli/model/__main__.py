"""`python -m fl_client.cli.model` is `fl-model`."""

import sys

from fl_client.cli.model import main

sys.exit(main())

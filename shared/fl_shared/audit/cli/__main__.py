"""`python -m fl_shared.audit.cli` is `fl-audit`."""

import sys

from fl_shared.audit.cli import main

sys.exit(main())

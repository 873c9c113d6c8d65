"""`python -m fl_server.control`: the control API's process, as the supervisor starts it."""

import os
import sys

# gRPC has no switch for TLS 1.3 alone, and reads this when it is imported: a list for TLS 1.2 alone, in which nothing
# fits our EC certificate.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"

from fl_server.control.server import main

sys.exit(main())

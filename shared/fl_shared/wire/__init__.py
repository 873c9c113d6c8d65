"""The two gRPC surfaces: `agent.proto` (a site's Unix socket) and `control.proto` (admins and auditors).

The `*_pb2*` files are generated from the `.proto` files by `make proto`; nobody edits them.
"""

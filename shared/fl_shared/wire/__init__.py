"""The two gRPC surfaces: `agent.proto` (a site's Unix socket) and `control.proto` (admins and auditors).

The `*_pb2*` files are generated from the `.proto` files; nobody edits them. `make proto` runs, in `shared/`,

    python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. fl_shared/wire/*.proto

(from there, so that the generated modules import each other as `fl_shared.wire.…`).
"""

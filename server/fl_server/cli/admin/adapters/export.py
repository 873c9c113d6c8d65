"""`fl-admin adapters export`: write a committed adapter to a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from fl_server.cli.admin import complete
from fl_server.cli.admin.adapters.which import add_which, require_one
from fl_server.cli.admin.options import add_common, connected, require_new, write_file
from fl_server.cli.show import plain
from fl_shared.adapters.safetensors import digest
from fl_shared.cli.output import print_json, working
from fl_shared.cli.verbs import add_quiet, argument, path
from fl_shared.errors import TransportError
from fl_shared.wire import control_pb2 as pb

EXAMPLES = """
fl-admin adapters export demo --out demo.safetensors
fl-admin adapters export --released production --out production.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    add_which(parser)
    argument(
        parser, "--out", type=path, required=True, metavar="FILE", completer=complete.files,
        help="the file to write (safetensors)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace the file")
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> int:
    """Fetch it, check its digest, write it."""
    out: Path = arguments.out
    described = pb.Adapter()
    data = bytearray()
    with connected(arguments) as stub:
        require_one(arguments)
        require_new(out, force=arguments.force)
        request = pb.GetAdapterRequest(run=arguments.run, round=arguments.round, released_as=arguments.released)
        with working("fetching the adapter", quiet=arguments.quiet, json=arguments.json) as say:
            for chunk in stub.GetAdapter(request):
                if chunk.HasField("adapter"):
                    described.CopyFrom(chunk.adapter)
                data += chunk.data
                say("fetching the adapter", len(data), described.bytes)
    if digest(bytes(data)) != described.digest:
        raise TransportError("the adapter did not arrive whole", fix="export it again")
    write_file(out, bytes(data))
    if arguments.json:
        print_json(plain(described) | {"file": str(out)})
    else:
        print(f"wrote {out}: round {described.round} of {described.run}, {described.bytes} bytes")
        print(described.digest)
    return 0

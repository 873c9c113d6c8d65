"""An error crosses to another process by each of the four ways, and is the same error there."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import grpc
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from fl_client.identity.gateway import GatewayClient
from fl_client.training.ranks.frames import receive, send
from fl_client.training.ranks.group import _typed
from fl_server.cli.connection import Profile, _translated
from fl_server.control.calls import _abort
from fl_server.gateway.limits import refusal
from fl_shared import errors
from fl_shared.errors import MAX_CODE, MAX_TEXT, ConcordatError, EnrolmentError, TransportError

KINDS = sorted(
    (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ConcordatError)),
    key=lambda kind: kind.exit_code,
)
ERRORS = [kind('the value "7" is wrong: é\n', fix=f"write 8, {kind.__name__}", code=code)
          for kind in KINDS for code in (None, "its-own-code")]  # fmt: skip
PROFILE = Profile("127.0.0.1:1", Path("ca"), Path("certificate"), Path("key"))


def whole(error: ConcordatError) -> tuple[Any, ...]:
    """All that an error is."""
    return type(error), error.message, error.fix, error.code, error.exit_code


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}-{error.code}")
def test_an_error_survives_its_own_form(error: ConcordatError) -> None:
    """Through JSON text, with the names that scripts read."""
    table = json.loads(json.dumps(error.to_dict()))
    assert list(table) == ["error", "fix", "code", "exit_code"]
    assert whole(ConcordatError.from_dict(table)) == whole(error)


def test_every_class_is_told_apart_by_its_exit_code() -> None:
    """What the codec rests on."""
    assert len({kind.exit_code for kind in KINDS}) == len(KINDS) == 12


def test_an_error_survives_a_command() -> None:
    """`--json` on standard error: the class by its exit code."""
    code = (
        "import sys; from fl_shared import errors; from fl_shared.cli.entry import cli_main\n"
        "def run(argv): raise getattr(errors, argv[0])(argv[1], fix=argv[2], code=argv[3])\n"
        "sys.exit(cli_main(run, sys.argv[1:]))"
    )
    for error in ERRORS:
        words = [type(error).__name__, error.message, error.fix, error.code, "--json"]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, timeout=60, check=False)
        assert done.returncode == error.exit_code
        assert whole(ConcordatError.from_dict(json.loads(done.stderr))) == whole(error)


class _Failing(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs alone
    """A call that fails with the error whose number the request is."""

    def service(self, call_details: Any) -> grpc.RpcMethodHandler[bytes, bytes]:  # gRPC's signature
        def call(request: bytes, context: grpc.ServicerContext) -> NoReturn:
            _abort(context, ERRORS[int(request)])

        return grpc.unary_unary_rpc_method_handler(call)


def test_an_error_survives_the_control_api() -> None:
    """From a server's `_abort`, over a socket, to what `fl-admin` raises; also when gRPC's details are nearly full."""
    server = grpc.server(ThreadPoolExecutor(2), handlers=[_Failing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/x/y", bytes, bytes)
            for number, error in enumerate(ERRORS):
                with pytest.raises(grpc.RpcError) as caught:
                    call(str(number).encode())
                assert whole(_translated(caught.value, PROFILE)) == whole(error)
    finally:
        server.stop(None)


def test_an_error_survives_the_gateway() -> None:
    """From the gateway's answer, over HTTP, to what the site reads of it."""

    async def app(scope: Any, take: Any, give: Any) -> None:
        assert scope["type"] == "http"
        await refusal(ERRORS[int(scope["path"][1:])], 403)(scope, take, give)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            until = time.monotonic() + 30
            while not server.started and time.monotonic() < until:
                time.sleep(0.01)
            for number, error in enumerate(ERRORS):
                client = GatewayClient(f"http://127.0.0.1:{listener.getsockname()[1]}", ssl.create_default_context)
                with pytest.raises(EnrolmentError) as caught:
                    client.call("GET", f"/{number}")
                told = caught.value
                assert (told.message, told.fix, told.code) == (
                    f"the coordinator refused: {error.message}", error.fix, error.code,
                )  # fmt: skip
        finally:
            server.should_exit = True
            thread.join(30)


def test_an_error_survives_the_frames_of_the_ranks() -> None:
    """From a rank to the agent; the message says which rank it was."""
    here, there = socket.socketpair()
    with here, there:
        for error in ERRORS:
            send(there, error.to_dict())
            found = _typed(3, receive(here)[0])
            assert found.message == f"rank 3: {error.message}"
            found.message = error.message
            assert whole(found) == whole(error)


def test_an_error_of_an_older_gateway_is_read() -> None:
    """Without an exit code, as the gateway answered before: the words and the code."""
    client = GatewayClient("u", ssl.create_default_context)
    found = client._refusal("u", 403, b'{"error": "no", "code": "used", "fix": "ask"}')
    assert (type(found), found.message) == (EnrolmentError, "the coordinator refused: no")
    assert (found.fix, found.code) == ("ask", "used")
    assert client._refusal("u", 403, b'["?"]').fix == "ask the coordinator's administrator for a new token"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(("error", "message", "fix", "code", "exit_code"), JSON)))
def test_no_answer_is_more_than_an_error(table: Any) -> None:
    """Whatever another party sends: an error of bounded size, or ValueError."""
    try:
        found = ConcordatError.from_dict(table)
    except ValueError:
        return
    assert len(found.message) <= MAX_TEXT
    assert len(found.fix) <= MAX_TEXT
    assert len(found.code) <= MAX_CODE
    assert type(found) in KINDS


def test_what_is_no_error_of_ours_is_told_as_a_broken_connection() -> None:
    """An answer of a proxy, for example."""

    class Broken(grpc.RpcError):
        def details(self) -> str:
            return "<html>"

        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.INTERNAL

    assert isinstance(_translated(Broken(), PROFILE), TransportError)

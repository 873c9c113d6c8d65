"""What people write for a host: names and addresses pass, everything else is refused with what to write instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fl_client.site.address import server_url
from fl_server.cli.server import main
from fl_server.home.layout import ServerSettings
from fl_shared.errors import ConfigError, EnrolmentError
from fl_shared.wire.hosts import by_proxy, host_and_port, host_name, is_loopback, is_proxy_variable

GOOD = {
    "coordinator.example": "coordinator.example", "Coordinator.Example": "coordinator.example",
    "localhost": "localhost",
    "10.0.0.1": "10.0.0.1", "2001:db8::1": "2001:db8::1", "[2001:DB8::1]": "2001:db8::1", "::1": "::1",
    "xn--kln-rna.example": "xn--kln-rna.example", "a-b.c3": "a-b.c3",
}  # fmt: skip
BAD = {
    "https://x.example:9443/": "without https",
    "https://x.example": "without https",
    "x.example/path": "without https",
    "user@x.example": "without a user",
    "x.example:9443": "port",
    "10.0.0.1:9443": "port",
    "[::1]:9443": "port",
    "[::1": "port",
    "x.example.": "dot at the end: x.example",
    "": "a name such as",
    "  ": "a name such as",
    "my_host.example": "underscore",
    "köln.example": "xn--kln-sna.example",
    "a b": "a name such as",
    "-x.example": "a name such as",
    "x..example": "a name such as",
    "1.2.3": "a name such as",
    "256.1.1.1": "a name such as",
    "fe80::1%eth0": "port",
    "x" * 64 + ".example": "a name such as",
    "a." * 130 + "a": "a name such as",
    "x\n.example": "a name such as",
}


@pytest.mark.parametrize("text", GOOD)
def test_names_and_addresses_are_taken(text: str) -> None:
    """In lower case, and without brackets; TLS and URLs get the brackets back."""
    assert host_name(text) == GOOD[text]
    assert server_url(f"https://{host_and_port(GOOD[text], 9443)}") == f"https://{host_and_port(GOOD[text], 9443)}"


@pytest.mark.parametrize("text", BAD)
def test_anything_else_is_refused_with_what_to_write(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the check, by `fl-server init --host` and `--listen`, which leave nothing behind, and in server.toml."""
    with pytest.raises(ConfigError) as refused:
        host_name(text)
    assert BAD[text] in refused.value.fix
    for option in ("--host", "--listen") if text else ("--host",):
        assert main(["init", "--home", str(tmp_path / "c"), f"{option}={text}"]) == 2
        told = capsys.readouterr().err
        assert "fix: " in told
        assert "Traceback" not in told
        assert not (tmp_path / "c").exists()
    toml = tmp_path / "server.toml"
    for field in ("host", "listen", "control_host"):
        fields = {"host": "x.example", "gateway_port": 1, "control_port": 2} | {field: text}
        toml.write_text("[server]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in fields.items()))
        with pytest.raises(ConfigError, match=field):
            ServerSettings.load(toml)


def test_an_address_to_listen_on_is_no_host(tmp_path: Path) -> None:
    """0.0.0.0 and :: reach nobody; as --listen they are fine."""
    for text in ("0.0.0.0", "::", "[::]"):  # written, not bound
        with pytest.raises(ConfigError, match="listen on"):
            host_name(text)
        assert host_name(text, to_listen=True)
    assert main(["init", "--home", str(tmp_path / "c"), "--host", "0.0.0.0", "--json"]) == 2  # the same


@pytest.mark.parametrize(
    "text",
    [
        "https://user@x:9443", "https://u:p@x:9443", "https://x:9443/?a", "https://x:9443#a", "https://x:9443/a",
        "https://x", "https://x:0", "https://x:99999", "https://[::1:9443", "http://x:9443", "x:9443", "", "https://:9443",
        "https://x_y:9443", "https://x.:9443", "https://köln.example:9443", "https://x:9443@y:1",
    ],
)  # fmt: skip
def test_a_site_refuses_the_same_for_its_server(text: str) -> None:
    """`fl-client enroll --server`: nothing is asked of an address that was not meant."""
    with pytest.raises(EnrolmentError) as refused:
        server_url(text)
    assert refused.value.fix


@given(st.text(max_size=80))
@example("::ffff:127.0.0.1")
@example("１.1.1.1")
def test_any_text_is_a_host_or_refused(text: str) -> None:
    """Never another exception; what is taken is taken again as it stands."""
    try:
        made = host_name(text, to_listen=True)
    except ConfigError:
        return
    assert host_name(made, to_listen=True) == made
    assert made.isascii()


def test_no_proxy_stands_before_this_machine() -> None:
    """Loopback by name or address, whatever the environment says."""
    for host in ("localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "[::1]", "::1", "::ffff:127.0.0.1"):
        assert is_loopback(host)
        assert not by_proxy(f"https://{host_and_port(host.strip('[]'), 9443)}/v1/ca")
    for host in ("coordinator.example", "10.0.0.1", "localhost.example", "2001:db8::1", "127.0.0.1.example"):
        assert by_proxy(f"https://{host_and_port(host, 9443)}")
    assert all(map(is_proxy_variable, ("https_proxy", "HTTP_PROXY", "all_proxy", "No_Proxy", "grpc_proxy")))
    assert not is_proxy_variable("PROXY_PASS")

"""The forms of `fl-client enroll --server`: what is accepted, and what each other form is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fl_client.site.address import server_url
from fl_shared.errors import EnrolmentError

TOKEN = f"ct1.hospital-001.{'x' * 32}.{'0' * 64}"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://c.example:9443", "https://c.example:9443"),
        ("https://C.Example:9443/", "https://c.example:9443"),
        ("HTTPS://10.0.0.5:0443", "https://10.0.0.5:443"),
        ("https://[2001:DB8::1]:9443", "https://[2001:db8::1]:9443"),
        ("https://xn--kln-sna.example:1", "https://xn--kln-sna.example:1"),
    ],
)
def test_an_address_is_host_and_port(text: str, url: str) -> None:
    """One spelling of what was meant; the spelling stays what it is."""
    assert server_url(text) == url
    assert server_url(url) == url


WRONG = [
    ("", "is empty", "https://coordinator.example:9443"),
    ("c.example:9443", "does not begin with https://", "https://c.example:9443"),
    ("c.example", "does not begin with https://", "https://coordinator.example:9443"),
    ("http://c.example:9443", "TLS", "https://c.example:9443"),
    ("ftp://c.example:21", "TLS", "https://c.example:21"),
    ("https://c.example", "names no port", "https://c.example:9443"),
    ("https://c.example:", "names no port", "https://c.example:9443"),
    ("https://c.example:0", "1 to 65535", ""),
    ("https://c.example:65536", "1 to 65535", ""),
    ("https://c.example:٣", "1 to 65535", ""),
    ("https://c.example:9443/v1", "'/v1'", "https://c.example:9443"),
    ("https://c.example:9443?a=1", "goes on after the port", "https://c.example:9443"),
    ("https://c.example:9443#a", "goes on after the port", "https://c.example:9443"),
    ("https://me:geheim@c.example:9443", "names a user", "https://c.example:9443"),
    ("me:geheim@c.example:9443", "does not begin with https://", ""),
    ("http://me:geheim@c.example:9443", "TLS", ""),
    ("https://2001:db8::1:9443", "without brackets", "https://[2001:db8::1]:9443"),
    ("https://[2001:db8::1", "IPv6", ""),
    ("https://[::1]", "names no port", "https://[::1]:9443"),
    ("https://[fe80::1%eth0]:9443", "zone", ""),
    ("https://[1.2.3.4]:9443", "IPv6", ""),
    ("https://köln.example:9443", "taken for others", "xn--"),
    ("https://раура1.example:9443", "taken for others", "xn--"),  # Cyrillic
    ("https://:9443", "names no host", ""),
    ("https://c..example:9443", "neither a name nor an address", ""),
    ("https://-c:9443", "neither a name nor an address", ""),
    ("https://a b:9443", "neither a name nor an address", ""),
    (" https://c.example:9443", "a space", ""),
    ("https://c.example:9443\n", "a control character", ""),
    ("https://" + "a" * 64 + ":9443", "neither a name nor an address", ""),
    ("https://" + "a." * 150 + "x:9443", "neither a name nor an address", ""),
]


@pytest.mark.parametrize(("text", "why", "better"), WRONG, ids=[each[0][:40] for each in WRONG])
def test_any_other_form_is_told_what_is_wrong_with_it(text: str, why: str, better: str) -> None:
    """The message names the fault, the fix an address that is accepted; a password is never repeated."""
    with pytest.raises(EnrolmentError) as caught:
        server_url(text)
    error = caught.value
    assert why in error.message
    assert better in error.fix
    assert "geheim" not in error.message + error.fix
    assert len(error.message) < 400
    if "--server " in error.fix:
        assert server_url(error.fix.rpartition("--server ")[2])


@pytest.mark.parametrize("text", ["http://c.example:9443", "c.example", "https://u@c.example:1", "https://c.example:x"])
def test_enroll_refuses_it_in_one_line_and_makes_nothing(text: str, tmp_path: Path) -> None:
    """The real command: exit code 17, error and fix, no home."""
    home = tmp_path / "a home"
    line = [sys.executable, "-m", "fl_client.cli.client", "enroll", "--site", "hospital-001", "--home", str(home)]
    done = subprocess.run(
        [*line, "--server", text, "--token", TOKEN], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (17, "")
    assert [each.split(":")[0] for each in done.stderr.splitlines()] == ["error", "fix"]
    assert not home.exists()

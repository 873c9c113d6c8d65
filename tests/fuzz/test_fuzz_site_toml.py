"""Any bytes, and any change of a valid file, as site.toml: a configuration or a ConfigError with a fix."""

from __future__ import annotations

from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from fl_client.site.config import SiteConfig, template
from fl_client.site.home import SiteHome
from fl_shared.errors import ConfigError

SITE = "hospital-001"
VALID = template(SITE, "https://coordinator.example:9443").encode()
LINES = VALID.split(b"\n")
VALUES = st.sampled_from([
    b'""', b'"\\u0000"', b"'a'", b"-1", b"0", b"1e400", b"nan", b"inf", b"true", b"[]", b"[[]]", b"{}", b"{a={b=1}}",
    b"9" * 5000, b"2027-01-01", b'"2027-01-31"', b'"~nobody/x"', b'"' + b"x" * 5000 + b'"', b"1_0", b"0x10", b"[1,'a']",
    b'"/"', b'"../.."', b'"https://a:99999"', b'"utf-8"', b'"rot13"', b'"hex"', b'"\\ud800"',
])  # fmt: skip


def load(content: bytes, root: Path) -> None:
    """Read it as a site's configuration."""
    home = SiteHome(root)
    home.config.write_bytes(content)
    refusal: ConfigError | None = None
    try:
        SiteConfig.load(home, SITE)
    except ConfigError as error:
        refusal = error
    assert refusal is None or (refusal.fix and str(home.config) in refusal.message)


@given(st.binary(max_size=300))
@example(b"\xef\xbb\xbf" + VALID)
@example(b"\xff\xfe" + VALID)
@example(b"a." * 2000 + b"a = 1")
@example(b"a = " + b"[" * 20_000)
def test_any_bytes_are_refused_in_words(tmp_path: Path, content: bytes) -> None:
    """No exception but ConfigError, which names the file."""
    load(content, tmp_path)


@given(at=st.integers(0, len(LINES) - 1), value=VALUES, uncomment=st.booleans(), drop=st.booleans())
def test_any_changed_line_is_taken_or_refused_in_words(
    tmp_path: Path, at: int, value: bytes, uncomment: bool, drop: bool
) -> None:
    """Another value for one field, a field that is missing, a comment that is taken in."""
    lines = list(LINES)
    line = lines[at].removeprefix(b"# ") if uncomment else lines[at]
    name, equals, _ = line.partition(b"=")
    lines[at] = b"" if drop else name + equals + value if equals else line
    load(b"\n".join(lines), tmp_path)


def test_the_template_is_valid_with_and_without_a_mark(tmp_path: Path) -> None:
    """What the changes start from."""
    home = SiteHome(tmp_path)
    for content in (VALID, b"\xef\xbb\xbf" + VALID):
        home.config.write_bytes(content)
        assert SiteConfig.load(home, SITE).site == SITE

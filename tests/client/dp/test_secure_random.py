"""The keystream behind sampling and noise."""

from __future__ import annotations

import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from fl_client.dp.mechanism import secure_random
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_shared.errors import EngineError

KEY = bytes(range(32))


def test_stream_is_chacha20() -> None:
    """The words are the ChaCha20 keystream of the key, little-endian, whatever the sizes asked for."""
    expected = Cipher(algorithms.ChaCha20(KEY, bytes(16)), mode=None).encryptor().update(bytes(800))
    stream = SecureStream(KEY)
    halves = np.empty(80, "<u2")
    first = stream.words(30).tobytes()
    stream.fill(halves)
    assert first + halves.tobytes() + stream.words(50).tobytes() == expected


def test_streams_of_the_operating_system_differ() -> None:
    """Two streams without a key share no word (a false alarm: 1e6 / 2**64), whatever numpy's seed is."""
    np.random.seed(0)
    first = SecureStream().words(1000)
    np.random.seed(0)
    assert not set(first.tolist()) & set(SecureStream().words(1000).tolist())


def test_words_are_uniform() -> None:
    """All bytes come equally often (chi-square, one false alarm in a million)."""
    counts = np.bincount(np.frombuffer(SecureStream(KEY).words(200_000).tobytes(), np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-6


def test_stream_rekeys_before_its_counter_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of one nonce's allowance a fresh nonce begins; nothing repeats."""
    monkeypatch.setattr(secure_random, "_REKEY_BYTES", 1 << 10)
    stream = SecureStream(KEY)
    drawn = np.concatenate([stream.words(100) for _ in range(12)])
    assert len(np.unique(drawn)) == len(drawn)


def test_a_short_key_is_refused() -> None:
    """A key that is not 32 bytes is a typed error."""
    with pytest.raises(EngineError, match="32 bytes"):
        SecureStream(b"short")


def test_forks_share_nothing() -> None:
    """Under a known key forks are known and differ; without one the operating system keys each (2**-256)."""
    known, again = SecureStream(KEY), SecureStream(KEY)
    forks = [known.fork().words(4).tolist() for _ in range(2)]
    assert forks == [again.fork().words(4).tolist() for _ in range(2)]
    assert not {*forks[0]} & ({*forks[1]} | {*SecureStream(KEY).words(100).tolist()})
    assert SecureStream().fork().words(4).tolist() != SecureStream().fork().words(4).tolist()


def _words_of_a_child(stream: SecureStream, *, generations: int = 1) -> bytes:
    """What a really forked process (or its child) draws from its copy of an open stream; b"" when it is refused."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if generations > 1:
                drawn = _words_of_a_child(stream, generations=generations - 1)
            else:
                drawn = stream.words(64).tobytes()
            os.write(writer, drawn)
        except EngineError:
            pass
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as source:
        drawn = source.read()
    assert os.waitpid(child, 0)[1] == 0
    return drawn


@pytest.mark.parametrize("used_before", [0, 40])
def test_a_fork_never_shares_words(used_before: int) -> None:
    """Parent, child and grandchild draw from an open stream: no word twice (chance below 2**-50)."""
    stream = SecureStream()
    stream.words(used_before)
    drawn = [_words_of_a_child(stream), _words_of_a_child(stream, generations=2), stream.words(64).tobytes()]
    words = np.frombuffer(b"".join(drawn), np.uint64)
    assert len(words) == 3 * 64 == len(set(words.tolist()))


def test_a_fork_is_seen_when_the_process_id_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are used again: a descendant with its ancestor's id is another process all the same."""
    stream = SecureStream()
    monkeypatch.setattr(os, "getpid", lambda: 4711)
    stream.words(1)
    drawn = _words_of_a_child(stream)
    assert len(drawn) == 8 * 64
    assert drawn != stream.words(64).tobytes()


def test_a_stream_with_a_given_key_is_refused_after_a_fork() -> None:
    """It could only repeat itself."""
    stream = SecureStream(KEY)
    assert _words_of_a_child(stream) == b""
    stream.words(1)

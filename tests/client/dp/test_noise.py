"""The noise's distribution, its grid, and what it must refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fl_client.dp.mechanism import noise
from fl_client.dp.mechanism.noise import (
    BASE_WIDTH,
    BLOCK,
    CELLS,
    SCALE,
    THRESHOLD_BITS,
    Grid,
    _alias_table,
    choose_grid,
    discrete_gaussian,
    discrete_gaussian_mass,
    noisy_sum,
)
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_shared.errors import EngineError

# One in a million: how often a right implementation fails a distribution test under a random key. The keys here are
# fixed, so that a pass stays a pass.
FALSE_ALARM = 1e-6
DRAWS = 200_000


def _stream(seed: int) -> SecureStream:
    return SecureStream(seed.to_bytes(32, "big"))


def _grid(tables: int) -> Grid:
    return Grid(1.0, BASE_WIDTH * math.sqrt(sum(SCALE ** (2 * level) for level in range(tables))), tables, 1.0)


@pytest.mark.parametrize("tables", [2, 3])
def test_noise_is_gaussian(tables: int) -> None:
    """A Kolmogorov-Smirnov test finds no difference between the noise and a Gaussian of the stated width."""
    grid = _grid(tables)
    draws = discrete_gaussian(DRAWS, grid, _stream(tables)) / grid.width
    assert stats.kstest(draws, "norm").pvalue > FALSE_ALARM


@pytest.mark.parametrize("factor", [0.5, 0.96, 1.04])
def test_noise_at_another_scale_is_noticed(factor: float) -> None:
    """The same Kolmogorov-Smirnov test accuses noise that is 4 percent too small or too large, or half."""
    grid = _grid(2)
    draws = factor * discrete_gaussian(DRAWS, grid, _stream(2)) / grid.width
    assert stats.kstest(draws, "norm").pvalue < FALSE_ALARM


@pytest.mark.parametrize("tables", [2, 3])
def test_noise_has_every_remainder_alike(tables: int) -> None:
    """Modulo the coarse table's scale the noise is flat: no remainder tells which coarse value was added."""
    draws = discrete_gaussian(DRAWS, _grid(tables), _stream(10 + tables))
    counts = np.bincount(np.mod(draws, SCALE), minlength=SCALE)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_noise_is_independent_of_its_neighbour() -> None:
    """Successive draws and their sizes are uncorrelated."""
    grid = _grid(2)
    draws = discrete_gaussian(DRAWS, grid, _stream(20)) / grid.width
    bound = stats.norm.isf(FALSE_ALARM / 4) / math.sqrt(DRAWS)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < bound
    assert abs(np.corrcoef(draws[:-1] ** 2, draws[1:] ** 2)[0, 1]) < bound


@settings(max_examples=25, deadline=None)
@given(exponent=st.integers(-12, 12), count=st.sampled_from([1, 5, BLOCK, BLOCK + 3]), tables=st.sampled_from([2, 3]))
def test_noise_is_added_to_the_rounded_sum(exponent: int, count: int, tables: int) -> None:
    """What comes out is the rounded sum plus the stream's integers, computed here in whole numbers, times the step."""
    grid = Grid(2.0**-20, _grid(tables).width, tables, 1.0)
    total = (np.random.default_rng(count).standard_normal(count) * 10.0**exponent).astype(np.float32)
    noise = discrete_gaussian(count, grid, _stream(7))
    wanted = [(round(float(x) * 2**20) + int(n)) / 2**20 for x, n in zip(total, noise, strict=True)]
    np.testing.assert_array_equal(noisy_sum(total, grid, _stream(7)), np.array(wanted).astype(np.float32))


def test_alias_table_holds_the_exact_mass() -> None:
    """Adding up what each cell keeps and gives away returns the discrete Gaussian's probabilities."""
    packed, rest = _alias_table()
    one = 1 << THRESHOLD_BITS
    mass = [0] * CELLS
    for cell, (upper, lower) in enumerate(zip(packed, rest, strict=True)):
        kept = (0xFFFF - (int(upper) >> 16) << 64) + int(lower)
        mass[cell] += kept
        mass[cell ^ int(upper) & 0xFFFF] += one - kept
    half = discrete_gaussian_mass(BASE_WIDTH, CELLS // 2, THRESHOLD_BITS + 16)
    assert mass == [0, *reversed(half[1:]), *half]  # to the last of 96 bits
    x = np.arange(-CELLS // 2, CELLS // 2)
    density = np.exp(-(x.astype(float) ** 2) / (2 * BASE_WIDTH**2))
    density[0] = 0  # the support is symmetric
    found = np.array([float(value) / float(CELLS << THRESHOLD_BITS) for value in mass])
    np.testing.assert_allclose(found, density / density.sum(), rtol=1e-12, atol=2**-70)


def test_the_tables_are_as_close_as_the_proof_needs() -> None:
    """The three figures of docs/decisions/0021, from the tables' own integers against 150 bits more."""
    bits, more = THRESHOLD_BITS + 16, 150
    coarse = discrete_gaussian_mass(BASE_WIDTH, CELLS // 2, bits)
    exact = discrete_gaussian_mass(BASE_WIDTH, CELLS // 2, bits + more)
    one, whole = 1 << more, 1 << (bits + more)
    above = [x for x, (have, want) in enumerate(zip(coarse, exact, strict=True)) if have * one > want]
    assert above == [0]  # only the outcome 0 is more likely than it should be
    assert (coarse[0] * one - exact[0]) / exact[0] < 2**-69
    core = [x for x, want in enumerate(exact) if x and (want - coarse[x] * one) * 2**12 <= want]
    assert 2 * sum(exact[x] for x in set(range(1, len(exact))) - set(core)) / whole < 2**-75
    assert 2 * sum((exact[x] - coarse[x] * one) ** 2 / exact[x] for x in core) / whole < 2**-100


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 60), bits=st.integers(20, 90))
def test_mass_sums_to_one_and_follows_the_density(width: int, bits: int) -> None:
    """Integer probabilities sum to 2**bits with the mirrored side and have the density's ratios."""
    mass = discrete_gaussian_mass(width, 12 * width + 1, bits)
    assert mass[0] + 2 * sum(mass[1:]) == 1 << bits
    expected = math.exp(-1 / (2 * width**2))
    rounding = (12 * width + 4) * 2.0 ** (2 - bits) / (mass[0] / 2**bits)
    assert abs(mass[1] / mass[0] - expected) < rounding + 1e-15  # the second term is this comparison's own


@settings(max_examples=100, deadline=None)
@given(
    sigma=st.floats(0.05, 100),
    clipping=st.floats(1e-3, 1e3),
    dimensions=st.integers(1, 10**8),
    slack=st.floats(0, 0.01),
)
def test_grid_pays_for_its_rounding(sigma: float, clipping: float, dimensions: int, slack: float) -> None:
    """The noise is sigma times a sensitivity that covers the clipping norm, the slack and both roundings."""
    grid = choose_grid(clipping_norm=clipping, noise_multiplier=sigma, dimensions=dimensions, slack=slack)
    real = clipping * (1 + slack) + grid.step * math.sqrt(dimensions)
    assert grid.sensitivity >= real * (1 - 1e-12)
    assert grid.step * grid.width >= sigma * real * (1 - 1e-12)
    assert grid.step * grid.width <= sigma * clipping * 1.012


def test_grid_refuses_what_it_cannot_hold() -> None:
    """So much noise over so many coordinates that rounding would count is refused."""
    with pytest.raises(EngineError, match="too coarse"):
        choose_grid(clipping_norm=1.0, noise_multiplier=1e6, dimensions=10**9, slack=0.0)


class _Scripted(SecureStream):
    """A stream that hands out chosen words: what a tie would need 2**16 draws to meet."""

    def __init__(self, word: int, tiebreak: int) -> None:
        super().__init__()
        self.word, self.tiebreak = word, tiebreak

    def fill(self, out: np.ndarray) -> None:
        out[:] = self.word if out.dtype.itemsize == 4 else self.tiebreak


@pytest.mark.parametrize(("below", "kept"), [(1, True), (0, False)])
def test_ties_are_broken_by_the_lower_64_bits(below: int, kept: bool) -> None:
    """A word that ties keeps its cell exactly when 64 further bits lie below the threshold's lower 64."""
    packed, rest = _alias_table()
    cell = next(c for c in range(CELLS // 2 + 10, CELLS) if rest[c] > 0 and packed[c] & 0xFFFF)
    stream = _Scripted((int(packed[cell]) >> 16 << 16) + cell, int(rest[cell]) - below)
    outcome = (cell if kept else cell ^ int(packed[cell]) & 0xFFFF) - CELLS // 2
    assert discrete_gaussian(3, _grid(2), stream).tolist() == [outcome * (1 + SCALE)] * 3


@pytest.mark.parametrize("threads", [1, 3])
def test_parts_drawn_side_by_side_have_streams_of_their_own(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """A long sum gets the same noise from any number of threads, no two parts the same, and all of it Gaussian."""
    monkeypatch.setattr(noise, "PART", 1 << 14)
    grid, count = _grid(2), (1 << 16) + 100
    total = np.arange(count, dtype=np.float64) * grid.step
    added = noisy_sum(total, grid, _stream(40), threads=threads) / np.float64(grid.step) - np.arange(count)
    alone = noisy_sum(total, grid, _stream(40)) / np.float64(grid.step) - np.arange(count)
    assert np.array_equal(added, alone)
    parts = [added[at : at + 100].tobytes() for at in range(0, count, 1 << 14)]
    assert len(set(parts)) == len(parts) == 5
    assert stats.kstest(added / grid.width, "norm").pvalue > FALSE_ALARM

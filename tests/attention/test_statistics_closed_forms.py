"""Attention with a known closed form, and the cases in unit_fixtures.json."""

import json
import math
from pathlib import Path

import pytest
import torch

from phaselens import attention

FIXTURES = json.loads((Path(__file__).parents[1] / "data" / "unit_fixtures.json").read_text())
ROWS = torch.tensor(FIXTURES["attention"]["A"], dtype=torch.float64)
N = len(ROWS)


def summarise(q, k, **options):
    _, lse = attention.attend(q, k, k, **options)
    statistics = attention.summarise(
        q, k, lse, position=0, entropy=True, received=True, distances=k.shape[2], **options
    )
    return lse, statistics


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def fixture_case(request):
    """q and k whose causal softmax is the fixture's matrix: keys are unit vectors, queries are the logs of its rows."""
    q = ROWS.where(ROWS > 0, torch.ones_like(ROWS)).log()[None, None].to(request.param)
    k = torch.eye(N)[None, None].to(request.param)
    lse, statistics = summarise(q, k, scale=1.0)
    return q, k, lse, statistics, pytest.approx if request.param == torch.float64 else approx_float32


def approx_float32(value):
    return pytest.approx(value, abs=1e-6)


LENGTHS = torch.tensor([N])


def test_sink_scores_equal_the_fixture(fixture_case):
    _, _, _, statistics, approx = fixture_case
    expected = FIXTURES["attention"]
    score = attention.sink_score(statistics.sink, LENGTHS)
    assert score.dtype == torch.float64
    assert score.item() == approx(expected["sink_score_excl_q0"])
    assert attention.sink_score(statistics.sink, LENGTHS, include_query0=True).item() == approx(
        expected["sink_score_incl_q0"]
    )


def test_importance_of_every_key_equals_the_fixture(fixture_case):
    q, k, lse, statistics, approx = fixture_case
    expected = FIXTURES["attention"]["gu_importance_all_k"]
    seen_by = torch.arange(N, 0, -1)
    assert (statistics.received[0, 0].double() / seen_by).tolist() == approx(expected)
    for position in range(N):
        sink = attention.sink_mass(q, k, lse, position, scale=1.0)
        score = attention.sink_score(sink, LENGTHS, include_query0=True, position=position)
        assert score.item() == approx(expected[position])


def test_entropies_equal_the_fixture(fixture_case):
    _, _, _, statistics, approx = fixture_case
    expected = FIXTURES["attention"]
    assert statistics.entropy[0, 0].tolist() == approx(expected["row_entropy_nats"])
    assert attention.query_mean(statistics.entropy, LENGTHS).item() == approx(expected["mixing_score_nats"])
    normalised = attention.normalised_entropy(statistics.entropy)
    assert normalised[0, 0, 0].isnan()
    assert normalised[0, 0, 1:].tolist() == approx(expected["normalised_row_entropy_q_ge_1"])
    mean = attention.query_mean(normalised, LENGTHS, first=1).item()
    assert mean == approx(expected["mean_normalised_q_ge_1"])


def test_concentration_locality_and_profile_equal_the_fixture(fixture_case):
    q, k, lse, statistics, approx = fixture_case
    expected = FIXTURES["attention"]
    assert attention.concentration(statistics.received, LENGTHS).item() == approx(
        expected["colsum_concentration"]
    )
    study = attention.window_mass(q, k, lse, 5, exclude_first=False, scale=1.0)
    assert attention.query_mean(study, LENGTHS, first=1).item() == approx(
        expected["local_window5_as_in_study"]
    )
    itself = attention.window_mass(q, k, lse, 0, include_self=True, exclude_first=False, scale=1.0)
    assert attention.query_mean(itself, LENGTHS).item() == approx(expected["self_attention"])
    pairs = torch.arange(N, 0, -1)
    assert (statistics.distance[0, 0].double() / pairs).tolist() == approx(expected["distance_profile"])


def test_uniform_sinks_equal_the_fixture():
    for key, include in (("uniform_causal_sink_incl_q0", True), ("uniform_causal_sink_excl_q0", False)):
        for length, expected in FIXTURES[key].items():
            assert attention.uniform_sink(int(length), include_query0=include) == pytest.approx(
                expected, rel=1e-12
            )


@pytest.mark.parametrize("n", [1, 2, 9, 64, 300])
@pytest.mark.parametrize("window", [None, 1, 5, 1000])
def test_uniform_attention_equals_the_null(n, window):
    """Zero queries weight all keys equally, so each statistic equals its null."""
    x = torch.zeros(1, 1, n, 8, dtype=torch.float64)
    lse, statistics = summarise(x, x, scale=1.0, window=window)
    lengths = torch.tensor([n])
    for include in (False, True):
        for position in {0, 1, n // 2, n - 1} & set(range(n)):
            sink = attention.sink_mass(x, x, lse, position, scale=1.0, window=window)
            score = attention.sink_score(
                sink, lengths, include_query0=include, position=position, window=window
            ).item()
            null = attention.uniform_sink(n, include, position, window)
            assert (math.isnan(score) and null is None) or score == pytest.approx(null, rel=1e-12)
    assert attention.query_mean(statistics.entropy, lengths).item() == pytest.approx(
        attention.uniform_entropy(n, window), abs=1e-12
    )
    torch.testing.assert_close(statistics.received[0, 0], attention.uniform_received(n, window))
    torch.testing.assert_close(statistics.distance[0, 0], attention.uniform_distance(n, window))
    for options in ({}, {"include_self": True}, {"exclude_first": False}):
        mass = attention.window_mass(x, x, lse, 3, scale=1.0, window=window, **options)
        null = attention.uniform_window(n, 3, window=window, **options)
        torch.testing.assert_close(mass[0, 0], null, rtol=1e-12, atol=1e-14)
    normalised = attention.normalised_entropy(statistics.entropy, window=window)
    several = torch.arange(n) >= (n if window == 1 else 1)
    torch.testing.assert_close(normalised[0, 0, several], torch.ones(int(several.sum()), dtype=torch.float64))


def test_uniform_sinks_follow_from_harmonic_numbers():
    for n in (2, 10, 1000):
        harmonic = math.fsum(1 / i for i in range(1, n + 1))
        assert attention.uniform_sink(n, include_query0=True) == pytest.approx(harmonic / n, rel=1e-14)
        assert attention.uniform_sink(n) == pytest.approx((harmonic - 1) / (n - 1), rel=1e-14)
        assert attention.uniform_entropy(n) == pytest.approx(math.lgamma(n + 1) / n, rel=1e-12)


def test_statistics_of_attention_to_the_first_key():
    q = torch.full((1, 2, 12, 4), 30.0)
    k = torch.zeros(1, 2, 12, 4)
    k[:, :, 0] = 30.0
    _, statistics = summarise(q, k, scale=0.5)
    lengths = torch.tensor([12])
    assert attention.sink_score(statistics.sink, lengths).tolist() == [[1.0, 1.0]]
    assert statistics.entropy.abs().amax() == 0
    assert statistics.received[0, 0].tolist() == [12.0] + [0.0] * 11
    assert attention.concentration(statistics.received, lengths).tolist() == [[1.0, 1.0]]


def test_statistics_of_attention_from_each_query_to_itself():
    """An identity head has a sink score of 1/T with query 0 and of 0 without it."""
    n = 16
    q = 40.0 * torch.eye(n)[None, None]
    _, statistics = summarise(q, q, scale=1.0)
    lengths = torch.tensor([n])
    assert attention.sink_score(statistics.sink, lengths, include_query0=True).item() == 1 / n
    assert attention.sink_score(statistics.sink, lengths).item() == 0.0
    assert statistics.distance[0, 0].tolist() == [n] + [0.0] * (n - 1)
    assert attention.concentration(statistics.received, lengths).item() == pytest.approx(0.0, abs=1e-15)


def test_adding_a_vector_to_all_keys_changes_no_weight():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 30, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    _, statistics = summarise(q, k, scale=1.0)
    _, moved_statistics = summarise(
        q, k + 50 * torch.randn(8, generator=generator, dtype=torch.float64), scale=1.0
    )
    for name in ("sink", "entropy", "received", "distance"):
        torch.testing.assert_close(
            getattr(moved_statistics, name), getattr(statistics, name), rtol=1e-10, atol=1e-11
        )


def test_weights_sum_to_one_by_row_and_by_column():
    generator = torch.Generator().manual_seed(1)
    q, k = (3 * torch.randn(2, 4, 50, 16, generator=generator) for _ in range(2))
    lse, statistics = summarise(q, k[:, ::2], scale=0.25)
    torch.testing.assert_close(statistics.received.sum(-1), torch.full((2, 4), 50.0))
    torch.testing.assert_close(statistics.distance.sum(-1), torch.full((2, 4), 50.0))
    row_mass = attention.window_mass(
        q, k[:, ::2], lse, 50, include_self=True, exclude_first=False, scale=0.25
    )
    torch.testing.assert_close(row_mass, torch.ones(2, 4, 50))


def test_readings_use_only_real_tokens():
    rows = torch.full((2, 1, 6), torch.nan)
    rows[0, 0, :4] = torch.tensor([1.0, 0.5, 0.25, 0.0])
    rows[1, 0, :1] = 1.0
    lengths = torch.tensor([4, 1])
    assert attention.query_mean(rows, lengths).tolist() == [[0.4375], [1.0]]
    assert attention.sink_score(rows, lengths)[0].item() == 0.25
    assert attention.sink_score(rows, lengths)[1].isnan()
    assert attention.sink_score(rows, lengths, position=2)[0].item() == 0.125
    received = torch.tensor([[[2.0, 1.0, torch.nan]], [[1.0, torch.nan, torch.nan]]])
    c = attention.concentration(received, torch.tensor([2, 1]))
    share = torch.tensor([1.0, 0.5], dtype=torch.float64)
    assert c[0].item() == pytest.approx(1 - torch.special.entr(share).sum().item() / math.log(2))
    assert c[1].isnan()
    rows[0, 0, 2] = torch.nan
    assert attention.query_mean(rows, lengths)[0].isnan()

"""The geometry of one key and the largest product, against loops over the dense scores in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from phaselens.attention import _geometry, key_geometry
from phaselens.errors import InputError


def states(n: int, n_heads: int, n_kv: int, d_head: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, heads, d_head, generator=generator) for heads in (n_heads, n_kv))
    return q, k


def dense(q: Tensor, k: Tensor, head: int, position: int, window: int | None, scale: float) -> list[float]:
    """Return the four numbers of one head, query by query."""
    queries = q[:, head].double().numpy()
    keys = k[:, head // (q.shape[1] // k.shape[1])].double().numpy()
    cosines, other_cosines, biases = [], [], []
    for query in range(position + 1, min(len(q), position + (window or len(q)))):
        visible_keys = range(max(0, query + 1 - (window or len(q))), query + 1)
        scores = {key: queries[query] @ keys[key] for key in visible_keys}
        norms = {key: np.linalg.norm(queries[query]) * np.linalg.norm(keys[key]) for key in visible_keys}
        cosines.append(scores[position] / norms[position])
        other_cosines.append(np.mean([scores[key] / norms[key] for key in visible_keys if key != position]))
        biases.append(
            scale * (scores[position] - np.mean([scores[key] for key in visible_keys if key != position]))
        )
    return [np.mean(cosines), np.mean(other_cosines), np.mean(biases), np.std(biases)]


@pytest.mark.parametrize(("n_heads", "n_kv"), [(3, 3), (4, 2), (4, 1)])
@pytest.mark.parametrize(("position", "window"), [(0, None), (0, 5), (3, None), (3, 4), (0, 2)])
def test_key_geometry_equals_the_dense_scores(
    n_heads: int, n_kv: int, position: int, window: int | None
) -> None:
    q, k = states(19, n_heads, n_kv)
    geometry = key_geometry(q, k, scale=0.7, position=position, window=window)
    for head in range(n_heads):
        expected = dense(q, k, head, position, window, 0.7)
        assert [float(values[head]) for values in geometry] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("n_together", [1, 2, 3, 10, 19, 64])
@pytest.mark.parametrize(
    ("position", "window"), [(0, None), (0, 19), (0, 18), (2, 7), (5, 14), (17, 2), (17, None)]
)
def test_sums_in_runs_of_any_length_equal_the_dense_scores(
    monkeypatch: pytest.MonkeyPatch, n_together: int, position: int, window: int | None
) -> None:
    monkeypatch.setattr(_geometry, "_RUN", n_together)
    q, k = states(19, 2, 1)
    geometry = key_geometry(q, k, scale=-0.3, position=position, window=window)
    for head in range(2):
        expected = dense(q, k, head, position, window, -0.3)
        assert [float(values[head]) for values in geometry] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert all(values.dtype == torch.float64 for values in geometry)


def test_a_query_of_norm_zero_has_a_score_and_no_cosine() -> None:
    q, k = states(6, 2, 2)
    q[3, 0] = 0.0
    geometry = key_geometry(q, k, scale=0.7)
    kept = torch.tensor([0, 1, 2, 4, 5])
    cosines = torch.nn.functional.cosine_similarity(q[kept[1:], 0].double(), k[0, 0].double(), dim=-1)
    assert float(geometry.cosine[0]) == pytest.approx(float(cosines.mean()), rel=1e-12)
    assert geometry.cosine_others.isfinite().all()
    expected = dense(q + 1e-30, k, 0, 0, None, 0.7)
    assert [float(geometry.bias[0]), float(geometry.bias_sd[0])] == pytest.approx(expected[2:], rel=1e-6)
    assert geometry.cosine.shape == geometry.bias.shape == (2,)


def test_queries_and_keys_of_norm_one_have_cosines() -> None:
    q = torch.eye(6)[torch.tensor([0, 1, 2, 1, 0, 2])][:, None]
    k = torch.eye(6)[torch.tensor([0, 0, 1, 2, 1, 0])][:, None]
    geometry = key_geometry(q, k, scale=1.0)
    assert [float(values[0]) for values in geometry] == pytest.approx(dense(q, k, 0, 0, None, 1.0), abs=1e-12)


def test_one_query_has_a_spread_of_zero() -> None:
    q, k = states(5, 2, 2)
    for position, window in ((3, None), (1, 2)):
        geometry = key_geometry(q, k, scale=1.0, position=position, window=window)
        assert geometry.bias_sd.tolist() == [0.0, 0.0]
        assert geometry.bias.isfinite().all()


def test_a_key_without_queries_and_states_of_norm_zero_have_no_cosine() -> None:
    q, k = states(5, 2, 2)
    for position, window in ((4, None), (7, None), (2, 1)):
        geometry = key_geometry(q, k, scale=1.0, position=position, window=window)
        assert all(bool(values.isnan().all()) for values in geometry)
        assert all((values.shape, values.dtype) == ((2,), torch.float64) for values in geometry)
    k[0, 1] = 0.0
    k[2, 0] = 0.0
    geometry = key_geometry(q, k, scale=1.0)
    assert geometry.cosine.isnan().tolist() == [False, True]
    assert not geometry.cosine_others.isnan().any()
    assert geometry.bias.isfinite().all()
    nonzero_keys = [1, 3, 4]
    cosines = torch.nn.functional.cosine_similarity(q[:, None, 0], k[None, nonzero_keys, 0], dim=-1).double()
    expected = np.mean(
        [
            float(cosines[query, [key in range(query + 1) for key in nonzero_keys]].mean())
            for query in range(1, 5)
        ]
    )
    assert float(geometry.cosine_others[0]) == pytest.approx(expected, rel=1e-6)
    assert key_geometry(torch.zeros_like(q), k, scale=1.0).cosine_others.isnan().all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k = states(5, 4, 3)
    with pytest.raises(InputError, match="expected k"):
        key_geometry(q, k, scale=1.0)
    with pytest.raises(InputError, match="expected q as a tensor"):
        key_geometry(q[0], k[0], scale=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "x"}, "^expected scale as a number, received 'x'$"),
        ({"scale": 1.0, "position": -1}, "^expected position as a whole number of at least 0, received -1$"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        key_geometry(*states(5, 2, 2), **options)  # type: ignore[arg-type]

"""What is refused, and how; gradients; the dense path."""

import pytest
import torch

from phaselens import attention
from tests.attention.reference import dense, random_qkv, worst


def call(**changed):
    """All streaming functions on a small problem, some argument changed."""
    q, k, v = random_qkv(6, batch=1)
    arguments = {"q": q, "k": k, "v": v, "lse": torch.zeros(1, 2, 6), "options": {"scale": 1.0}} | changed
    q, k, v, lse, options = (arguments[name] for name in ("q", "k", "v", "lse", "options"))
    attention.attend(q, k, v, **options)
    attention.row_entropy(q, k, lse, **options)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"q": torch.zeros(2, 6, 8)}, r"expected q \[batch, head, query, d_head\].*received q \(2, 6, 8\)"),
        ({"k": torch.zeros(1, 2, 6, 4)}, r"received q \(1, 2, 6, 8\) and k \(1, 2, 6, 4\)"),
        ({"k": torch.zeros(1, 3, 6, 8)}, "its heads dividing q's"),
        ({"k": torch.zeros(2, 2, 6, 8)}, "with q's batch"),
        ({"q": torch.zeros(1, 2, 0, 8)}, "at least one query and one key"),
        ({"k": torch.zeros(1, 2, 6, 8).half()}, "one floating dtype.*torch.float32.*torch.float16"),
        ({"q": torch.zeros(1, 2, 6, 8).int(), "k": torch.zeros(1, 2, 6, 8).int()}, "one floating dtype"),
        ({"q": torch.zeros(1, 2, 7, 8)}, "7 queries and 6 keys; pass a mask"),
        ({"v": torch.zeros(1, 2, 5, 8)}, r"expected v .*\(1, 2, 6, d_v\).*received \(1, 2, 5, 8\)"),
        ({"lse": torch.zeros(1, 2, 5)}, r"expected lse .*\(1, 2, 6\), received \(1, 2, 5\)"),
        ({"options": {"scale": 1.0, "window": 0}}, "window of at least 1 key.*received 0"),
        ({"options": {"scale": 1.0, "softcap": 0.0}}, "softcap above 0, received 0.0"),
        ({"options": {"scale": 1.0, "sinks": torch.zeros(3)}}, r"sinks \[head\] = \(2,\), received \(3,\)"),
        (
            {"options": {"scale": 1.0, "mask": torch.ones(1, 1, 6, 5, dtype=torch.bool)}},
            r"mask \[batch | 1, head | 1, query, key\] for \(1, 2, 6, 6\), received \(1, 1, 6, 5\)",
        ),
        ({"options": {"scale": 1.0, "mask": torch.ones(6, 6, dtype=torch.bool)}}, r"received \(6, 6\)"),
        (
            {"options": {"scale": 1.0, "mask": torch.ones(1, 1, 6, 6).int()}},
            "bool mask .* received torch.int32",
        ),
    ],
)
def test_bad_arguments_name_what_was_expected_and_received(changed, said):
    with pytest.raises(ValueError, match=said):
        call(**changed)


def test_positions_widths_and_lengths_out_of_range():
    q, k, v = random_qkv(6, batch=1)
    _, lse = attention.attend(q, k, v, scale=1.0)
    with pytest.raises(ValueError, match="position in 0 … 5, received 6"):
        attention.sink_mass(q, k, lse, 6, scale=1.0)
    with pytest.raises(ValueError, match="position in 0 … 5, received -1"):
        attention.sink_mass(q, k, lse, -1, scale=1.0)
    with pytest.raises(ValueError, match="width of at least 1, or 0 with include_self, received 0"):
        attention.window_mass(q, k, lse, 0, scale=1.0)
    with pytest.raises(ValueError, match=r"lengths \[batch\] = \(1,\), received \(2,\)"):
        attention.received_mass(q, k, lse, lengths=torch.tensor([6, 6]), scale=1.0)
    with pytest.raises(ValueError, match=r"rows \[batch, head, query\].*received \(2, 6\)"):
        attention.query_mean(lse[0], torch.tensor([6, 6]))
    with pytest.raises(ValueError, match=r"received \[batch, head, key\].*received \(1, 2, 6\) and \(2,\)"):
        attention.concentration(lse, torch.tensor([6, 6]))
    with pytest.raises(ValueError, match="at least 1 token, received 0"):
        attention.uniform_sink(0)
    with pytest.raises(ValueError, match=r"at least 1 key .* received 0"):
        attention.uniform_entropy(3, window=0)


def test_the_scale_has_no_default():
    q, k, v = random_qkv(6)
    with pytest.raises(TypeError, match="scale"):
        attention.attend(q, k, v)


def test_no_gradient_is_better_than_a_wrong_one():
    q, k, v = random_qkv(6)
    lse = torch.zeros(q.shape[:3])
    for tensor in (q, k):
        tensor.requires_grad_()
        for run in (
            lambda: attention.attend(q, k, v, scale=1.0),
            lambda: attention.sink_mass(q, k, lse, scale=1.0),
            lambda: attention.row_entropy(q, k, lse, scale=1.0),
            lambda: attention.received_mass(q, k, lse, scale=1.0),
            lambda: attention.window_mass(q, k, lse, 2, scale=1.0),
            lambda: attention.refine_lse(q, k, lse, scale=1.0),
        ):
            with pytest.raises(RuntimeError, match=r"no gradient.*torch.no_grad\(\).*explicit"):
                run()
            with torch.no_grad():
                run()
        tensor.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no gradient"):
        attention.attend(q, k, v, scale=1.0, sinks=torch.zeros(2, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"window": 3}, {"softcap": 1.0}, {"sinks": torch.tensor([0.3, 2.0, 1, 1])}]
)
def test_the_dense_path(dtype, options):
    q, k, v = random_qkv(9, group=2, d_v=5, dtype=dtype)
    want = dense(q, k, v, scale=0.8, **options)
    out, scores, pattern = attention.explicit(q, k, v, scale=0.8, **options)
    exact = dtype == torch.float64
    assert (out.dtype, scores.dtype, pattern.dtype) == (dtype, dtype if exact else torch.float32, dtype)
    limit = 1e-12 if exact else 8 * torch.finfo(dtype).eps
    assert worst(out, want.out) < limit
    assert worst(pattern, want.pattern) < limit
    assert (scores == -torch.inf).equal(want.pattern == 0)


def test_the_dense_path_has_gradients():
    q, k, v = (x.requires_grad_() for x in random_qkv(5, batch=1, group=2, d=3, dtype=torch.float64))
    sinks = torch.tensor([0.3, 1.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    mask[..., 2, :] = False

    def run(q, k, v, sinks):
        out, _, pattern = attention.explicit(q, k, v, scale=0.8, softcap=3.0, sinks=sinks, mask=mask)
        return out, torch.special.entr(pattern + 0.01).sum(-1)

    assert torch.autograd.gradcheck(run, (q, k, v, sinks))


def test_the_dense_path_after_an_edit_of_its_scores():
    q, k, _ = random_qkv(6)
    scores = attention.explicit_scores(q, k, scale=1.0)
    hidden = scores.index_fill(-1, torch.tensor([0]), -torch.inf)
    pattern = attention.explicit_pattern(hidden)
    assert (pattern[..., 0] == 0).all()
    assert (pattern[..., 0, :] == 0).all()  # row 0 saw nothing else
    torch.testing.assert_close(pattern[..., 1:, :].sum(-1), torch.ones(2, 2, 5))


def test_all_names_are_there_and_no_other_is_public():
    assert sorted(attention.__all__) == attention.__all__
    public = {name for name in vars(attention) if name.isidentifier() and not name.startswith("_")}
    assert public == set(attention.__all__)

"""FlexAttention on the CPU, where torch runs it without compiling: which problems it gets, its masks, and its checks.

This shows that masks, caps, shared key heads and the log-sum-exp are those of the definition. It cannot show that torch
compiles the kernels on a card, how they round there, or how fast they are: `test_statistics_cuda.py` and
tools/bench/gpu.py do, on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from phaselens import attention
from phaselens.attention import _flex
from tests.attention.reference import dense, largest_difference, random_qkv

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def available(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the CPU pass for a device that torch compiles kernels for, and leave them uncompiled."""
    monkeypatch.setattr(_flex, "is_available", lambda device: True)
    monkeypatch.setattr(_flex, "_is_right", {})
    use_kernel(monkeypatch, flex_attention)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield


def use_kernel(monkeypatch: pytest.MonkeyPatch, kernel) -> list[int]:
    """Let `kernel` replace the compiled one; return a list with the length of each text that it gets."""
    lengths: list[int] = []

    def counted(q, *args, **kwargs):
        lengths.append(q.shape[2])
        return kernel(q, *args, **kwargs)

    monkeypatch.setattr(_flex, "_compiled", lambda: counted)
    return lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 7},
        {"softcap": 2.0},
        {"window": 150, "softcap": 2.0},
        {"window": 9, "sink_logits": torch.ones(6)},
    ],
    ids=["window", "softcap", "both", "sink logits"],
)
def test_results_equal_float64(monkeypatch: pytest.MonkeyPatch, dtype, options) -> None:
    lengths = use_kernel(monkeypatch, flex_attention)
    for n in (128, 301):
        q, k, v = random_qkv(n, kv_heads=2, group=3, d=24, d_v=16, dtype=dtype)
        out, lse = attention.attend(q, k, v, scale=0.3, **options)
        expected = dense(q, k, v, scale=0.3, **options)
        rounding = 1e-5 if dtype == torch.float32 else 5e-2
        assert largest_difference(lse, expected.lse) < rounding
        assert largest_difference(out, expected.out) < rounding
    assert lengths == [128, 301]


@pytest.mark.parametrize("window", [None, 1, 7, 127, 128, 129, 255, 256, 300, 1000])
@pytest.mark.parametrize("n", [128, 129, 500])
def test_masks_have_the_blocks_that_torch_finds(n, window) -> None:
    def sees(batch, head, query, key):
        return (query >= key) & (query - key < (window or n))

    expected = create_block_mask(sees, None, None, n, n, device="cpu")
    mask = _flex.band_mask(n, window, CPU)
    assert mask.seq_lengths == expected.seq_lengths
    assert torch.equal(mask.to_dense(), expected.to_dense())
    for blocks in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(mask, blocks), getattr(expected, blocks))
        assert getattr(mask, blocks).dtype == torch.int32
    for row, n_full in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        full, expected_full = (of.full_kv_indices[0, 0, row, :n_full].tolist() for of in (mask, expected))
        assert full == expected_full


def test_blocks_far_from_the_diagonal_are_never_computed() -> None:
    mask = _flex.band_mask(4096, 256, CPU)
    computed = mask.kv_num_blocks + mask.full_kv_num_blocks
    assert int(computed.max()) == 3
    assert mask.full_kv_num_blocks[0, 0].tolist()[:4] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 5, "mask": torch.ones(1, 1, 130, 130, dtype=torch.bool).tril()},
        {"window": 5, "hidden_keys": torch.tensor([[0]])},
        {"window": 5, "bias": torch.ones(1, 1, 1, 130)},
    ],
    ids=["causal alone", "mask", "hidden keys", "bias"],
)
def test_other_problems_go_to_other_kernels(monkeypatch: pytest.MonkeyPatch, options) -> None:
    lengths = use_kernel(monkeypatch, flex_attention)
    q, k, v = random_qkv(130)
    attention.attend(q, k, v, scale=1.0, **options)
    assert lengths == []


def test_short_texts_new_tokens_and_float64_go_to_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = use_kernel(monkeypatch, flex_attention)
    for n_queries, n_keys, d, dtype in (
        (127, 127, 32, torch.float32),
        (1, 200, 32, torch.float32),
        (200, 200, 8, torch.float32),
        (200, 200, 32, torch.float64),
    ):
        q, k, v = random_qkv(n_queries, n_keys, d=d, d_v=32, dtype=dtype)
        attention.attend(q, k, v, scale=1.0, window=5)
    assert lengths == []


def test_a_kernel_that_cannot_be_compiled_is_tried_once_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nmany more lines")

    lengths = use_kernel(monkeypatch, broken)
    q, k, v = random_qkv(200, d=32)
    expected = dense(q, k, v, scale=0.3, window=5, softcap=3.0)
    with pytest.warns(
        RuntimeWarning,
        match="heads of 32 in float32 with a window and a softcap: RuntimeError: no compiler. ",
    ):
        out, lse = attention.attend(q, k, v, scale=0.3, window=5, softcap=3.0)
    again, _ = attention.attend(q, k, v, scale=0.3, window=6, softcap=4.0)
    assert largest_difference(out, expected.out) < 1e-5
    assert largest_difference(lse, expected.lse) < 1e-5
    assert torch.isfinite(again).all()
    assert lengths == [200]


@pytest.mark.parametrize("part", ["log-sum-exp", "output"])
def test_a_kernel_with_wrong_results_is_not_believed(monkeypatch: pytest.MonkeyPatch, part) -> None:
    def wrong(*args, **kwargs):
        out, aux = flex_attention(*args, **kwargs)
        if part == "output":
            return out * 1.01, aux
        return out, aux._replace(lse=aux.lse + 0.1)

    use_kernel(monkeypatch, wrong)
    q, k, v = random_qkv(200, d=32)
    expected = dense(q, k, v, scale=0.3, window=5)
    with pytest.warns(RuntimeWarning, match=f"its {part} differs"):
        out, lse = attention.attend(q, k, v, scale=0.3, window=5)
    assert largest_difference(out, expected.out) < 1e-5
    assert largest_difference(lse, expected.lse) < 1e-5


def test_a_failure_without_a_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("  ")

    use_kernel(monkeypatch, broken)
    q, k, v = random_qkv(200, d=32)
    with pytest.warns(RuntimeWarning, match=r"with a window: RuntimeError: no message\. "):
        attention.attend(q, k, v, scale=0.3, window=5)


@pytest.mark.parametrize(
    ("sizes", "other"),
    [({"d": 32, "d_v": 16}, {"d": 16, "d_v": 16}), ({"d": 32, "d_v": 16}, {"d": 32, "d_v": 32})],
)
def test_a_kernel_that_fails_condemns_no_other_size(monkeypatch: pytest.MonkeyPatch, sizes, other) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler")

    use_kernel(monkeypatch, broken)
    with pytest.warns(RuntimeWarning):
        attention.attend(*random_qkv(200, **sizes), scale=0.3, window=5)
    lengths = use_kernel(monkeypatch, flex_attention)
    attention.attend(*random_qkv(200, **other), scale=0.3, window=5)
    assert lengths == [200]


def test_two_heads_may_share_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = use_kernel(monkeypatch, flex_attention)
    q, k, v = random_qkv(200, group=2, d=16)
    out, _ = attention.attend(q, k, v, scale=0.3, window=5)
    assert largest_difference(out, dense(q, k, v, scale=0.3, window=5).out) < 1e-5
    assert lengths == [200]


@pytest.mark.parametrize(("scale", "shift", "is_right"), [(0.01, 1.5e-3, False), (30.0, 5e-3, True)])
def test_a_log_sum_exp_is_compared_relative_to_its_size(
    monkeypatch: pytest.MonkeyPatch, scale, shift, is_right
) -> None:
    def shifted(*args, **kwargs):
        out, aux = flex_attention(*args, **kwargs)
        return out, aux._replace(lse=aux.lse + shift)

    lengths = use_kernel(monkeypatch, shifted)
    q, k, v = random_qkv(200, d=32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        for _ in range(2):
            attention.attend(q, k, v, scale=scale, window=1)
    assert len([warning for warning in caught if "FlexAttention is not used" in str(warning.message)]) == (
        not is_right
    )
    assert lengths == [200] * (1 + is_right)


def test_a_text_with_nan_condemns_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = use_kernel(monkeypatch, flex_attention)
    q, k, v = random_qkv(200, d=32)
    broken = k.clone()
    broken[0, 0, 190] = torch.nan
    attention.attend(q, broken, v, scale=0.3, window=20)
    attention.attend(q, k, v, scale=0.3, window=20)
    assert lengths == [200, 200]


def test_out_of_memory_stays_an_error_and_condemns_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    q, k, v = random_qkv(200, d=32)
    use_kernel(monkeypatch, too_large)
    with pytest.raises(torch.OutOfMemoryError):
        attention.attend(q, k, v, scale=0.3, window=20)
    lengths = use_kernel(monkeypatch, flex_attention)
    attention.attend(q, k, v, scale=0.3, window=20)
    assert lengths == [200]

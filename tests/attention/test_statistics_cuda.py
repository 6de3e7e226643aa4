"""Statistics on a GPU equal the dense reference, with and without its fused kernels."""

import pytest
import torch

from phaselens import attention
from phaselens.attention import _flex
from tests.attention.reference import dense, largest_difference, random_qkv

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

LIMITS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}


def left_padded(n):
    """Mask of two texts, the second after five pads."""
    mask = torch.ones(2, 1, n, n, dtype=torch.bool).tril()
    mask[1, :, :, :5] = False
    return mask


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 7}, {"softcap": 2.0}, {"sink_logits": torch.tensor([1.0])}, {"mask": left_padded}],
    ids=["causal", "window", "softcap", "sink_logits", "mask"],
)
def test_gpu_statistics_equal_float64(dtype, options):
    for kv_heads, group in ((4, 1), (2, 3)):
        for n in (1, 33, 300):
            for d, d_v in ((64, 64), (20, 12)):
                q, k, v = random_qkv(n, kv_heads=kv_heads, group=group, d=d, d_v=d_v, dtype=dtype)
                shape_options = dict(options)
                if "mask" in shape_options:
                    shape_options["mask"] = shape_options["mask"](n)
                if "sink_logits" in shape_options:
                    shape_options["sink_logits"] = (
                        shape_options["sink_logits"].expand(kv_heads * group).clone()
                    )
                assert_equals_float64(q, k, v, LIMITS[dtype], **shape_options)


def assert_equals_float64(q, k, v, limit, **options):
    expected = dense(q, k, v, scale=0.3, **options)
    on_gpu = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    rounding = torch.finfo(q.dtype).eps
    q, k, v = q.cuda(), k.cuda(), v.cuda()
    out, lse = attention.attend(q, k, v, scale=0.3, **on_gpu)
    statistics = attention.summarise(q, k, lse, position=0, entropy=True, received=True, scale=0.3, **on_gpu)
    assert largest_difference(out.cpu(), expected.out) < max(
        limit, 8 * rounding * float(expected.out.abs().amax())
    )
    assert largest_difference(lse.cpu(), expected.lse) < limit
    assert (
        largest_difference(
            attention.sink_mass(q, k, lse, scale=0.3, **on_gpu).cpu(), expected.pattern[..., 0]
        )
        < limit
    )
    assert largest_difference(statistics.sink.cpu(), expected.pattern[..., 0]) < 1e-5
    assert largest_difference(statistics.entropy.cpu(), expected.entropy) < 1e-5
    assert largest_difference(statistics.received.cpu(), expected.received) < 1e-5 * max(1, q.shape[2] / 10)


def test_cached_decoding_equals_float64():
    q, k, v = random_qkv(5, 300, group=2, d=64, dtype=torch.float16)
    expected = dense(q, k, v, scale=0.3)
    out, lse = attention.attend(q.cuda(), k.cuda(), v.cuda(), scale=0.3)
    assert largest_difference(out.cpu(), expected.out) < 5e-3
    assert largest_difference(lse.cpu(), expected.lse) < 1e-4


def test_float64_is_used_where_products_round_to_tf32(monkeypatch):
    q, k, v = random_qkv(64, d=64)
    expected = dense(q, k, v, scale=1.0)
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    _, lse = attention.attend(q.cuda(), k.cuda(), v.cuda(), scale=1.0)
    statistics = attention.summarise(q.cuda(), k.cuda(), lse, entropy=True, scale=1.0)
    assert largest_difference(statistics.entropy.cpu(), expected.entropy) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize("options", [{"window": 100}, {"softcap": 2.0}, {"window": 700, "softcap": 30.0}])
def test_windows_and_softcaps_run_compiled_kernels(monkeypatch, dtype, d, options):
    if not _flex.is_available(torch.device("cuda", 0)):
        pytest.skip("torch compiles no kernels for this card, or Triton is missing")
    monkeypatch.setattr(_flex, "_is_right", {})
    for n in (128, 1000, 1500):
        q, k, v = random_qkv(n, kv_heads=2, group=2, d=d, d_v=d, dtype=dtype)
        assert_equals_float64(q, k, v, LIMITS[dtype], **options)
    assert list(_flex._is_right.values()) == [True]

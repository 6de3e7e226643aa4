"""The same answers on a GPU, through each of its kernels and without them."""

import pytest
import torch

from phaselens import attention
from tests.attention.reference import dense, random_qkv, worst

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

LIMITS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}


def left_padded(n):
    """Two texts, the second behind five pads."""
    mask = torch.ones(2, 1, n, n, dtype=torch.bool).tril()
    mask[1, :, :, :5] = False
    return mask


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 7}, {"softcap": 2.0}, {"sinks": torch.tensor([1.0])}, {"mask": left_padded}],
    ids=["causal", "window", "softcap", "sinks", "mask"],
)
def test_equals_float64(dtype, options):
    for kv_heads, group in ((4, 1), (2, 3)):
        for n in (1, 33, 300):
            for d, d_v in ((64, 64), (20, 12)):
                q, k, v = random_qkv(n, kv_heads=kv_heads, group=group, d=d, d_v=d_v, dtype=dtype)
                used = dict(options)
                if "mask" in used:
                    used["mask"] = used["mask"](n)
                if "sinks" in used:
                    used["sinks"] = used["sinks"].expand(kv_heads * group).clone()
                compare(q, k, v, LIMITS[dtype], **used)


def compare(q, k, v, limit, **options):
    want = dense(q, k, v, scale=0.3, **options)
    on_gpu = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    rounding = torch.finfo(q.dtype).eps
    q, k, v = q.cuda(), k.cuda(), v.cuda()
    out, lse = attention.attend(q, k, v, scale=0.3, **on_gpu)
    found = attention.summarise(q, k, lse, position=0, entropy=True, received=True, scale=0.3, **on_gpu)
    assert worst(out.cpu(), want.out) < max(limit, 8 * rounding * float(want.out.abs().amax()))
    assert worst(lse.cpu(), want.lse) < limit
    assert worst(attention.sink_mass(q, k, lse, scale=0.3, **on_gpu).cpu(), want.pattern[..., 0]) < limit
    assert worst(found.sink.cpu(), want.pattern[..., 0]) < 1e-5
    assert worst(found.entropy.cpu(), want.entropy) < 1e-5
    assert worst(found.received.cpu(), want.received) < 1e-5 * max(1, q.shape[2] / 10)


def test_cached_decoding():
    q, k, v = random_qkv(5, 300, group=2, d=64, dtype=torch.float16)
    want = dense(q, k, v, scale=0.3)
    out, lse = attention.attend(q.cuda(), k.cuda(), v.cuda(), scale=0.3)
    assert worst(out.cpu(), want.out) < 5e-3
    assert worst(lse.cpu(), want.lse) < 1e-4


def test_products_rounded_to_tf32_are_answered_in_float64(monkeypatch):
    q, k, v = random_qkv(64, d=64)
    want = dense(q, k, v, scale=1.0)
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    _, lse = attention.attend(q.cuda(), k.cuda(), v.cuda(), scale=1.0)
    found = attention.summarise(q.cuda(), k.cuda(), lse, entropy=True, scale=1.0)
    assert worst(found.entropy.cpu(), want.entropy) < 1e-5

"""Arguments and output shapes of calls to the GPU kernels, checked without a GPU."""

import pytest
import torch

from phaselens.attention import _kernels


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_calls_fit_the_efficient_kernel(dtype, masked):
    q, k, v = (
        torch.empty(2, heads, 33, d, dtype=dtype, device="meta") for heads, d in ((4, 20), (2, 20), (2, 12))
    )
    added = torch.empty(1, 1, 33, 33, dtype=dtype, device="meta") if masked else None
    out, lse = _kernels._cuda_efficient(q, k, v, 0.3, not masked, added)
    assert (out.shape, lse.shape, lse.dtype) == ((2, 4, 33, 12), (2, 4, 33), torch.float32)


def test_calls_fit_the_flash_kernel():
    q, k, v = (torch.empty(2, heads, 33, d).half().to("meta") for heads, d in ((4, 20), (2, 20), (2, 12)))
    out, lse = _kernels._cuda_flash(q, k, v, 0.3, True)
    assert (out.shape, lse.shape, lse.dtype) == ((2, 4, 33, 12), (2, 4, 33), torch.float32)

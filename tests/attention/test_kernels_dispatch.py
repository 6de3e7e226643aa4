"""Which kernel a GPU would run, by tensors without numbers on a machine without a GPU.

Tensors on the device `meta` have a dtype and a shape, and no numbers; the tests let it pass for a GPU. (Fake tensors of
the device `cuda` cannot be indexed where torch is built without CUDA.) So these tests show which operator is called
with what, that every operand is on the device, and that nothing is read back. They cannot show that the kernel accepts
these sizes on a card, what it returns, or how fast it is: `test_statistics_cuda.py` does, on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phaselens import attention
from phaselens.attention import _kernels

FLASH = "_scaled_dot_product_flash_attention"
EFFICIENT = "_scaled_dot_product_efficient_attention"
BLOCKS = "baddbmm"
CAPPED_BLOCKS = "bmm"
N = 300


class RecordedCalls(TorchDispatchMode):
    """Names and arguments of the operators that are called inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[object, ...]]] = []
        self.scales: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} <= {"meta"}, func
        self.calls.append((func.overloadpacket.__name__, args))
        if "scale" in (kwargs or {}):
            self.scales.append(kwargs["scale"])
        return func(*args, **(kwargs or {}))

    def arguments(self, name: str) -> list[tuple[object, ...]]:
        return [args for called, args in self.calls if called == name]


class ReadsOfTheHost(TorchDispatchMode):
    """Names of the operators inside the context whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the device `meta` pass for an H100."""
    monkeypatch.setattr(_kernels, "_device_type", lambda tensor: "cuda")
    capabilities = {torch.device("meta"): (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)


def attended(dtype: torch.dtype, d: int = 64, kv_heads: int = 2, **options: object) -> RecordedCalls:
    """Attend 300 tokens with 4 heads on the device; return the calls."""
    q, k, v = (
        torch.empty(1, n_heads, N, d, dtype=dtype, device="meta") for n_heads in (4, kv_heads, kv_heads)
    )
    with RecordedCalls() as calls:
        out, lse = attention.attend(q, k, v, scale=0.125, **options)
    assert (out.shape, out.dtype, out.device) == (q.shape, dtype, q.device)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert (lse.shape, lse.dtype, lse.device) == (q.shape[:3], expected, q.device)
    return calls


@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_flash_attention_with_shared_key_heads(dtype, d) -> None:
    calls = attended(dtype, d)
    (arguments,) = calls.arguments(FLASH)
    assert [tensor.shape[1] for tensor in arguments[:3]] == [4, 2, 2]
    assert arguments[3:5] == (0.0, True)
    assert calls.scales == [0.125]
    assert calls.arguments(EFFICIENT) == []


@pytest.mark.parametrize("d", [64, 256])
def test_float32_runs_efficient_attention_with_repeated_key_heads(d) -> None:
    calls = attended(torch.float32, d)
    (arguments,) = calls.arguments(EFFICIENT)
    assert [tensor.shape[1] for tensor in arguments[:3]] == [4, 4, 4]
    assert arguments[3:] == (None, True, 0.0, True)
    assert calls.scales == [0.125]
    assert calls.arguments(FLASH) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_window_runs_efficient_attention_on_blocks_of_rows_with_their_keys_only(dtype) -> None:
    calls = attended(dtype, window=32)
    arguments = calls.arguments(EFFICIENT)
    assert [(q.shape[2], k.shape[2]) for q, k, *_ in arguments] == [(256, 256), (44, 75)]
    assert all(mask is not None for _q, _k, _v, mask, *_ in arguments)


@pytest.mark.parametrize(
    ("dtype", "d", "options", "operator"),
    [
        (torch.float64, 64, {}, BLOCKS),
        (torch.bfloat16, 257, {}, BLOCKS),
        (torch.bfloat16, 64, {"softcap": 30.0}, CAPPED_BLOCKS),
        (torch.float32, 64, {"softcap": 30.0, "window": 32}, CAPPED_BLOCKS),
    ],
    ids=["float64", "large heads", "softcap", "softcap and window"],
)
def test_what_no_kernel_computes_runs_in_blocks(dtype, d, options, operator) -> None:
    calls = attended(dtype, d, **options)
    assert calls.arguments(FLASH) == calls.arguments(EFFICIENT) == []
    assert calls.arguments(operator)


def test_older_gpus_run_float16_without_flash_attention_and_bfloat16_in_blocks(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert attended(torch.float16).arguments(EFFICIENT)
    assert attended(torch.bfloat16).arguments(BLOCKS)


def test_learned_sink_logits_are_added_to_the_kernels_log_sum_exp() -> None:
    calls = attended(torch.bfloat16, sink_logits=torch.empty(4, device="meta"))
    assert len(calls.arguments(FLASH)) == 1
    assert len(calls.arguments("logaddexp")) == 1


@pytest.mark.parametrize(
    "options", [{}, {"window": 32}, {"softcap": 30.0}], ids=["causal", "window", "softcap"]
)
def test_attention_itself_reads_nothing_back_to_the_host(options) -> None:
    """These tensors have no number to read, so that `item`, `tolist` or `bool` would fail."""
    calls = attended(torch.bfloat16, **options)
    assert calls.arguments("_local_scalar_dense") == calls.arguments("nonzero") == []


def test_statistics_read_one_number_back_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with real numbers: the heads to compute in float64 are read once, for all statistics together.

    This cannot show what a driver waits for inside of an operator.
    """
    monkeypatch.setattr(_kernels, "_device_type", lambda tensor: tensor.device.type)
    q, k = torch.randn(2, 4, N, 16), torch.randn(2, 2, N, 16)
    _, lse = attention.attend(q, k, k, scale=0.25)
    with ReadsOfTheHost() as reads:
        attention.summarise(
            q,
            k,
            lse,
            scale=0.25,
            position=0,
            itself=True,
            entropy=True,
            received=True,
            distances=8,
            refine=True,
        )
    assert reads.names == ["nonzero"]

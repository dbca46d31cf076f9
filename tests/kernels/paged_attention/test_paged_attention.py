"""Attention over a paged cache against its reference: decode, mixed batches, splits, quantized caches."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from danaus.kernels.paged_attention import api, paged_attention, paged_attention_reference, quantize_kv
from danaus.kernels.tuning import using

from ..truth import Canaries, assert_close_as_torch, poisoned, poisoned_outputs, strided

if TYPE_CHECKING:
    from collections.abc import Generator

PAGE = 16
NOWHERE = 10**6
"""A page that is not there: a kernel that followed it would read far outside of the cache."""


@contextmanager
def small_blocks() -> Generator[None]:
    """Make tiles small enough for tiny inputs to have several."""
    with using("paged_attention", {"BLOCK_M": 16, "BLOCK_N": 16, "PROGRAMS_PER_SM": 1}):
        yield


@dataclass(frozen=True)
class Batch:
    """What a call takes."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    starts: Tensor | None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def attend(self, **options: Any) -> Tensor:
        return paged_attention(
            self.q, self.k, self.v, self.table, self.lengths,
            query_starts=self.starts, k_scale=self.k_scale, v_scale=self.v_scale, **options,
        )  # fmt: skip

    def wide(self) -> Batch:
        """Return the same in fp64, a quantized cache as it is."""
        if self.k_scale is not None:
            return replace(self, q=self.q.double())
        return replace(self, q=self.q.double(), k=self.k.double(), v=self.v.double())

    def quantized(self, dtype: torch.dtype) -> Batch:
        (k, k_scale), (v, v_scale) = quantize_kv(self.k, dtype), quantize_kv(self.v, dtype)
        return replace(self, k=k, v=v, k_scale=k_scale, v_scale=v_scale)


def batch(
    device: torch.device,
    lengths: list[int],
    new: list[int] | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    width: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Return sequences whose pages lie in no order; what no sequence holds is NaN."""
    num_heads, num_kv_heads = heads
    pages_each = [-(-length // PAGE) for length in lengths]
    num_pages = sum(pages_each) + 1
    order = torch.randperm(num_pages).tolist()
    table = torch.full((len(lengths), max(pages_each, default=0) + 1), NOWHERE, dtype=torch.int32)
    k, v = (poisoned((num_pages, PAGE, num_kv_heads, width), dtype, device) for _ in range(2))
    for index, length in enumerate(lengths):
        for number in range(pages_each[index]):
            page = order.pop()
            table[index, number] = page
            rows = min(length - number * PAGE, PAGE)
            for cache in (k, v):
                cache[page, :rows] = torch.randn(rows, num_kv_heads, width).to(dtype)
    num_tokens = len(lengths) if new is None else sum(new)
    starts = None if new is None else torch.tensor([0, *accumulate(new)], dtype=torch.int32, device=device)
    q = torch.randn(num_tokens, num_heads, width, device=device, dtype=dtype)
    return Batch(q, k, v, table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device), starts)


def check_exact(case: Batch, **options: Any) -> None:
    """Compare with the fp64 reference."""
    with small_blocks(), poisoned_outputs():
        got = case.attend(**options)
    options.pop("num_splits", None)
    torch.testing.assert_close(got.double(), case.wide().attend(impl="reference", **options), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"window_left": 20, "softcap": 1.5, "scale": 0.4}])
def test_decode_sees_the_whole_sequence(num_splits: int, options: dict[str, Any], device: torch.device) -> None:
    check_exact(batch(device, [1, 50, 0, 16, 33]), num_splits=num_splits, **options)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("options", [{}, {"window_left": 11, "softcap": 2.0}])
def test_prefill_and_decode_share_a_batch(num_splits: int, options: dict[str, Any], device: torch.device) -> None:
    # A decode, one without new tokens, a first prefill, a chunk of a later one (two tiles), a short one.
    case = batch(device, [40, 5, 9, 47, 3], [1, 0, 9, 20, 2])

    check_exact(case, num_splits=num_splits, **options)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (16, 1)])
def test_any_group_fits_into_a_tile(heads: tuple[int, int], device: torch.device) -> None:
    check_exact(batch(device, [20, 17], [7, 1], heads=heads), num_splits=2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("new", [None, [5, 1]])
def test_a_quantized_cache_is_widened_by_its_scales(
    dtype: torch.dtype, new: list[int] | None, device: torch.device
) -> None:
    # Scales of what no sequence holds are NaN: they must not be taken.
    check_exact(batch(device, [37, 18], new).quantized(dtype), num_splits=2)


def test_scales_may_be_one_number_or_one_per_head(device: torch.device) -> None:
    case = batch(device, [21, 18]).quantized(torch.int8)
    per_head = torch.tensor([0.02, 0.05], device=device)

    check_exact(replace(case, k_scale=per_head, v_scale=torch.tensor(0.03, device=device)))


@pytest.mark.parametrize("width", [1, 24, 64])
def test_half_precision_is_as_close_as_torch(width: int, device: torch.device) -> None:
    case = batch(device, [35, 16], [17, 1], width=width, dtype=torch.float16)

    with small_blocks(), poisoned_outputs():
        got = case.attend(num_splits=2)

    assert_close_as_torch(got, case.wide().attend(impl="reference"), case.attend(impl="reference"))


def test_bf16_is_right_in_the_interpreter_too(device: torch.device) -> None:
    case = batch(device, [35, 16], dtype=torch.bfloat16)

    got = case.attend()

    assert_close_as_torch(got, case.wide().attend(impl="reference"), case.attend(impl="reference"))


def test_any_strides_will_do(device: torch.device) -> None:
    case = batch(device, [20, 33], [4, 1])
    # A cache by heads, as some engines keep it, and queries that lie in a wider buffer.
    by_heads = case.k.transpose(1, 2).contiguous().transpose(1, 2)

    check_exact(replace(case, q=strided(case.q), k=by_heads, v=strided(case.v)), num_splits=2)


def test_rows_behind_the_last_sequence_give_zero(device: torch.device) -> None:
    case = batch(device, [20, 33], [4, 1])
    padded = replace(case, q=torch.cat([case.q, case.q[:3]]))

    with small_blocks():
        out = padded.attend()

    assert not out[5:].any()
    torch.testing.assert_close(out[:5], case.attend(impl="reference"), atol=1e-5, rtol=1e-5)


def test_no_sequences_give_nothing(device: torch.device) -> None:
    assert batch(device, []).attend().shape == (0, 4, 16)
    assert batch(device, [5], [0]).attend().shape == (0, 4, 16)


def test_splits_leave_the_number_of_programs_to_the_shapes(device: torch.device) -> None:
    case = batch(device, [48, 48])
    with small_blocks():
        full = case.attend(num_splits=3)
        # What a graph does between two replays: other lengths in the same buffers.
        case.lengths.copy_(torch.tensor([1, 30], dtype=torch.int32))
        short = case.attend(num_splits=3)

    assert not torch.equal(full, short)
    torch.testing.assert_close(short, case.attend(impl="reference"), atol=1e-5, rtol=1e-5)


def test_nothing_outside_of_the_tensors_is_read_or_written(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    canaries = Canaries()
    case = batch(device, [19, 33], [1, 5], width=24)
    q, k, v, table, lengths = (canaries.around(x) for x in (case.q, case.k, case.v, case.table, case.lengths))
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x: canaries.around(zeros_like(x)))

    with small_blocks():
        out = Batch(q, k, v, table, lengths, case.starts).attend(num_splits=2)

    assert out.isfinite().all()
    canaries.check()


def test_quantizing_rounds_to_the_nearest_step(device: torch.device) -> None:
    x = torch.randn(3, 5, 2, 16, device=device)
    x[0, 0] = 0.0

    values, scales = quantize_kv(x, torch.int8)

    assert values.dtype is torch.int8
    assert (values.float().abs().amax(-1)[x.any(-1)] == 127).all()
    assert ((values.float() * scales[..., None] - x).abs() <= scales[..., None] * 0.5001).all()


def test_torch_knows_it_as_an_operator(device: torch.device) -> None:
    case = batch(device, [20, 3])

    with small_blocks():
        torch.library.opcheck(
            api._paged_attention,
            (case.q, case.k, case.v, case.table, case.lengths, None, None, None, -1, 0.0, 0.25, 2),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_the_reference_is_dense_attention_over_the_gathered_pages(device: torch.device) -> None:
    case = batch(device, [20], [20])
    pages = case.table[0, :2].long()
    k, v = (x[pages].flatten(0, 1)[:20].transpose(0, 1)[None] for x in (case.k, case.v))

    dense = torch.nn.functional.scaled_dot_product_attention(
        case.q.transpose(0, 1)[None], k, v, is_causal=True, enable_gqa=True
    )

    out = paged_attention_reference(
        case.q, case.k, case.v, case.table, case.lengths, case.starts, None, None, left=-1, softcap=0.0, scale=0.25
    )
    torch.testing.assert_close(out, dense[0].transpose(0, 1))


def test_mistakes_are_named() -> None:
    case = batch(torch.device("cpu"), [20, 3])
    small = case.quantized(torch.int8)
    wrong: list[tuple[str, Batch, dict[str, Any]]] = [
        ("expected q", replace(case, q=case.q[0]), {}),
        ("multiple of key heads", replace(case, q=case.q[:, :3]), {}),
        ("must be int32", replace(case, lengths=case.lengths.long()), {}),
        ("pass query_starts", replace(case, q=case.q[:1]), {}),
        ("for q of", replace(case, q=case.q.half()), {}),
        ("goes with an int8", replace(case, k_scale=small.k_scale), {}),
        ("goes with an int8", replace(small, v_scale=None), {}),
        ("must be fp32", replace(small, v_scale=torch.ones((), dtype=torch.float64)), {}),
        ("must be positive", case, {"scale": 0.0}),
        ("must not be negative", case, {"window_left": -1}),
        ("outside of 1..128", case, {"num_splits": 129}),
        ("it has 'reference', 'triton'", case, {"impl": "torch"}),
        ("fp16, bf16 and fp32", case.wide(), {}),
    ]
    for message, mistaken, options in wrong:
        with pytest.raises(ValueError, match=message):
            mistaken.attend(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("new", [None, [1, 300, 1, 0]])
def test_bf16_on_a_gpu_is_as_close_as_torch(width: int, new: list[int] | None, device: torch.device) -> None:
    case = batch(device, [700, 301, 1, 64], new, heads=(8, 2), width=width, dtype=torch.bfloat16)

    with poisoned_outputs():
        got = case.attend()

    assert_close_as_torch(got, case.wide().attend(impl="reference"), case.attend(impl="reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_cache_on_a_gpu_is_as_close_as_torch(dtype: torch.dtype, device: torch.device) -> None:
    case = batch(device, [700, 301], heads=(8, 2), width=128, dtype=torch.bfloat16).quantized(dtype)

    assert_close_as_torch(case.attend(), case.wide().attend(impl="reference"), case.attend(impl="reference"))


@pytest.mark.gpu
def test_a_graph_replays_with_other_lengths_and_pages(device: torch.device) -> None:
    case = batch(device, [700, 301, 64], heads=(8, 2), width=128, dtype=torch.bfloat16)
    case.attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.attend()

    case.lengths.copy_(torch.tensor([20, 300, 1], dtype=torch.int32))
    case.table.copy_(case.table.flip(0))
    graph.replay()

    torch.testing.assert_close(out, case.attend(), atol=0.0, rtol=0.0)
    assert_close_as_torch(out, case.wide().attend(impl="reference"), case.attend(impl="reference"))


@pytest.mark.gpu
def test_offsets_pass_the_range_of_32_bits(device: torch.device) -> None:
    pages, num_kv_heads, width = 140_000, 8, 128
    cache = torch.empty(pages, PAGE, num_kv_heads, width, dtype=torch.bfloat16, device=device)
    assert cache.numel() > 2**31
    cache[-3:] = torch.randn(3, PAGE, num_kv_heads, width)
    table = torch.tensor([[pages - 1, pages - 3, pages - 2]], dtype=torch.int32, device=device)
    lengths = torch.tensor([47], dtype=torch.int32, device=device)
    q = torch.randn(1, 32, width, dtype=torch.bfloat16, device=device)

    case = Batch(q, cache, cache, table, lengths, None)

    torch.testing.assert_close(case.attend(), case.attend(impl="reference"), atol=2e-2, rtol=2e-2)

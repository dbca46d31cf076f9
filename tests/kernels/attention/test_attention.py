"""Attention against its reference, forward and backward, and against the promises of its docstring."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from danaus.kernels.attention import api, attention, attention_reference
from danaus.kernels.tuning import using

from ..truth import Canaries, assert_close_as_torch, misaligned, poisoned_outputs, strided

if TYPE_CHECKING:
    from collections.abc import Generator

OPS = ("attention_forward", "attention_dq", "attention_dkdv")


@contextmanager
def small_blocks(rows: int = 16, keys: int = 16) -> Generator[None]:
    """Make tiles small enough for tiny inputs to have several."""
    with ExitStack() as stack:
        for op in OPS:
            stack.enter_context(using(op, {"BLOCK_M": rows, "BLOCK_N": keys}))
        yield


def inputs(
    device: torch.device, len_q: int, len_k: int, *, heads: tuple[int, int] = (2, 1), width: int = 16,
    dtype: torch.dtype = torch.float32, batch: int = 1,
) -> list[Tensor]:  # fmt: skip
    """Return q, k, v that require gradients."""
    num_heads, num_kv_heads = heads
    shapes = [(batch, num_heads, len_q, width), *[(batch, num_kv_heads, len_k, width)] * 2]
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def run(leaves: list[Tensor], grads: list[Tensor], **options: Any) -> list[Tensor]:
    """Return output, log-sum-exp and the gradients of q, k, v; ``grads`` are those of the first two."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    results = attention(*leaves, return_lse=True, **options)
    return [
        *results,
        *torch.autograd.grad(results, leaves, [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]),
    ]


def seeds(leaves: list[Tensor], *, packed: bool = False) -> list[Tensor]:
    """Return random gradients of the output and of the log-sum-exp."""
    q = leaves[0]
    shape = (q.shape[1], q.shape[0]) if packed else q.shape[:3]
    return [torch.randn_like(q), torch.randn(shape, device=q.device)]


def check_exact(leaves: list[Tensor], *, packed: bool = False, **options: Any) -> None:
    """Compare fp32 results with the fp64 reference."""
    grads = seeds(leaves, packed=packed)
    with small_blocks(), poisoned_outputs():
        got = run(leaves, grads, **options)
    expected = run([leaf.double() for leaf in leaves], grads, impl="reference", **options)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(
    ("len_q", "len_k", "options"),
    [
        (33, 33, {}),
        (33, 33, {"causal": True}),
        (7, 37, {"causal": True}),
        (7, 37, {"causal": True, "align": "bottom_right"}),
        (37, 7, {"causal": True, "align": "bottom_right"}),
        (40, 40, {"window": (5, 3)}),
        (33, 20, {"window": (18, None), "causal": True, "align": "bottom_right"}),
        (20, 33, {"window": (None, 4), "softcap": 1.5}),
        (33, 33, {"causal": True, "softcap": 2.0, "scale": 0.7}),
        (1, 1, {"causal": True}),
        (5, 0, {}),
        (0, 5, {}),
    ],
)
def test_results_and_gradients_are_those_of_the_reference(
    len_q: int, len_k: int, options: dict[str, Any], device: torch.device
) -> None:
    check_exact(inputs(device, len_q, len_k), **options)


@pytest.mark.parametrize(("heads", "batch"), [((2, 2), 2), ((6, 2), 1)])
def test_heads_are_shared_by_groups(heads: tuple[int, int], batch: int, device: torch.device) -> None:
    check_exact(inputs(device, 17, 17, heads=heads, batch=batch), causal=True)


@pytest.mark.parametrize("num_parts", [2, 4])
def test_the_sum_over_a_group_may_be_cut_into_parts(num_parts: int, device: torch.device) -> None:
    with patch.object(api, "_num_parts", lambda *_: num_parts):
        check_exact(inputs(device, 17, 17, heads=(4, 1)), causal=True)


@pytest.mark.parametrize(("width", "options"), [(1, {}), (24, {"causal": True}), (64, {"causal": True})])
def test_half_precision_is_as_close_as_torch(width: int, options: dict[str, Any], device: torch.device) -> None:
    leaves = inputs(device, 35, 35, width=width, dtype=torch.float16)
    grads = seeds(leaves)

    with small_blocks(16, 32), poisoned_outputs():
        got = run(leaves, grads, **options)

    plain = run(leaves, grads, impl="reference", **options)
    wide = run([leaf.double() for leaf in leaves], [grad.double() for grad in grads], impl="reference", **options)
    for index, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        assert_close_as_torch(got[index], wide[index], plain[index], grad=index > 1, what=name)


def test_bf16_is_right_in_the_interpreter_too(device: torch.device) -> None:
    leaves = inputs(device, 17, 17, dtype=torch.bfloat16)
    grads = seeds(leaves)

    with small_blocks(32, 32):
        got = run(leaves, grads, causal=True)

    plain = run(leaves, grads, impl="reference", causal=True)
    wide = run([leaf.double() for leaf in leaves], [grad.double() for grad in grads], impl="reference", causal=True)
    for index, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        assert_close_as_torch(got[index], wide[index], plain[index], grad=index > 1, what=name)


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "align": "bottom_right", "window": (6, None)}])
def test_packed_sequences_do_not_see_each_other(options: dict[str, Any], device: torch.device) -> None:
    lens_q, lens_k = [20, 0, 3, 5], [20, 4, 9, 0]
    # Three rows behind the last sequence belong to none.
    q, k, v = (
        torch.randn(sum(lens) + 3, heads, 16, device=device, requires_grad=True)
        for lens, heads in ((lens_q, 2), (lens_k, 1), (lens_k, 1))
    )
    edges_q, edges_k = (torch.tensor([0, *lens], device=device).cumsum(0).to(torch.int32) for lens in (lens_q, lens_k))

    check_exact(
        [q, k, v], packed=True, cu_seqlens_q=edges_q, cu_seqlens_k=edges_k, max_seqlen_q=20, max_seqlen_k=20, **options
    )


def test_one_list_of_edges_serves_queries_and_keys_and_lengths_may_be_left_out(device: torch.device) -> None:
    q, k, v = (torch.randn(19, 2, 16, device=device) for _ in range(3))
    edges = torch.tensor([0, 12, 19], device=device, dtype=torch.int32)

    with small_blocks():
        out = attention(q, k, v, cu_seqlens_q=edges, causal=True)

    torch.testing.assert_close(out, attention(q, k, v, cu_seqlens_q=edges, causal=True, impl="reference"))


def test_any_strides_will_do(device: torch.device) -> None:
    len_q, num_heads, width = 18, 2, 16
    q = torch.randn(1, len_q, num_heads, width, device=device).transpose(1, 2)
    k = strided(torch.randn(1, 1, len_q, width, device=device)).expand(1, num_heads, -1, -1)
    v = torch.randn(1, num_heads, width, len_q, device=device).mT

    check_exact([q, k, v], causal=True)
    check_exact([misaligned(x) for x in (q.contiguous(), k.contiguous(), v.contiguous())])


def test_the_output_lies_in_memory_as_the_queries_do(device: torch.device) -> None:
    q = torch.randn(1, 5, 2, 16, device=device).transpose(1, 2)

    assert attention(q, q, q).stride() == q.stride()


def test_rows_may_lie_far_apart(device: torch.device) -> None:
    # 16 rows of such a tile reach beyond 2**31 bytes of offset arithmetic in 32 bits; the memory is never touched.
    apart = 2**23
    q = torch.empty(3 * apart, dtype=torch.float16, device=device).as_strided((1, 1, 3, 16), (0, 0, apart, 1))
    q.copy_(torch.randn(1, 1, 3, 16))
    assert api._flags((q,), -1, -1, packed=False, bottom_right=False, softcap=0.0)["LONG"]

    with small_blocks():
        out = attention(q, q, q)

    near = q.contiguous()
    torch.testing.assert_close(out, attention(near, near, near, impl="reference"), atol=2e-3, rtol=0)


def test_nothing_outside_of_the_tensors_is_read_or_written(device: torch.device) -> None:
    canaries = Canaries()
    leaves = [canaries.around(x.detach()).requires_grad_() for x in inputs(device, 19, 21, width=24)]
    grads = [canaries.around(x) for x in seeds(leaves)]
    empty_like = torch.empty_like

    def guarded(x: Tensor, **options: Any) -> Tensor:
        return canaries.around(empty_like(x, **options).fill_(torch.nan))

    with small_blocks(), patch.object(torch, "empty_like", guarded):
        results = attention(*leaves, causal=True, return_lse=True)
        got = torch.autograd.grad(results, leaves, grads)

    # What stands around the inputs is NaN, so reading it would show.
    assert not any(x.isnan().any() for x in (*results, *got))
    canaries.check()


def test_the_backward_gives_the_same_bits_each_time(device: torch.device) -> None:
    leaves = inputs(device, 33, 33, heads=(4, 2), dtype=torch.float16)
    grads = seeds(leaves)
    with small_blocks():
        first, second = (run(leaves, grads, causal=True) for _ in range(2))

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_query_that_sees_nothing_gives_zero(device: torch.device) -> None:
    q, k, v = inputs(device, 6, 2)

    out, lse = attention(q, k, v, causal=True, align="bottom_right", return_lse=True)

    assert not out[:, :, :4].any()
    assert (lse[:, :, :4] == -torch.inf).all()
    assert lse[:, :, 4:].isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"left": -1, "right": 0, "bottom_right": True, "softcap": 0.0},
        {"left": 2, "right": 1, "bottom_right": False, "softcap": 1.5},
    ],
)
def test_gradients_of_the_reference_are_right(options: dict[str, Any]) -> None:
    # Five queries at three keys: under the bottom right mask two of them see nothing.
    q, k, v = (x.detach().double().requires_grad_() for x in inputs(torch.device("cpu"), 5, 3, width=3))

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention_reference(q, k, v, None, None, scale=0.6, **options)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "align": "bottom_right"}, {"window": (2, 1)}]
)
def test_torch_agrees_with_the_reference(options: dict[str, Any]) -> None:
    q, k, v = inputs(torch.device("cpu"), 5, 9)

    torch.testing.assert_close(
        attention(q, k, v, impl="torch", **options), attention(q, k, v, impl="reference", **options)
    )


def test_torch_knows_it_as_an_operator(device: torch.device) -> None:
    q, k, v = inputs(device, 5, 5, heads=(2, 1))
    edges = torch.tensor([0, 3, 5], device=device, dtype=torch.int32)
    rows = [x.detach()[0].transpose(0, 1).requires_grad_() for x in (q, k, v)]

    with small_blocks():
        torch.library.opcheck(api._attention, (q, k, v, None, None, 5, 5, -1, 0, False, 0.0, 0.25))
        torch.library.opcheck(
            api._attention,
            (*rows, edges, edges, 5, 5, -1, 0, False, 0.0, 0.25),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_a_compiled_model_holds_it_in_one_graph(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.compile draws a progress bar, whose thread would stay.
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    leaves = inputs(device, 5, 5)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True) * 2

    with small_blocks():
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = compiled(*leaves)

    expected = attention(leaves[0], leaves[1], leaves[2], causal=True, impl="reference") * 2
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_mistakes_are_named() -> None:
    q, k, v = inputs(torch.device("cpu"), 4, 4)
    edges = torch.tensor([0, 4], dtype=torch.int32)
    wrong: list[tuple[str, tuple[Tensor, ...], dict[str, Any]]] = [
        ("expected q", (q[0], k, v), {}),
        ("expected q", (q, k, v[:, :, :3]), {}),
        ("at most 256", tuple(torch.randn(1, 1, 2, 257) for _ in range(3)), {}),
        ("multiple of key heads", (q[:, :1].repeat(1, 3, 1, 1), q, q), {}),
        ("convert them to one", (q, k.half(), v), {}),
        ("fp16, bf16 and fp32", (q.double(), k.double(), v.double()), {}),
        ("must be positive", (q, k, v), {"scale": -1.0}),
        ("must not be negative", (q, k, v), {"window": (-1, 0)}),
        ('use "top_left"', (q, k, v), {"align": "left"}),
        ("must be int32", (q[0], k[0], v[0]), {"cu_seqlens_q": edges.long()}),
        ("without cu_seqlens_q", (q, k, v), {"cu_seqlens_k": edges}),
        ("no packed sequences", (q, k, v), {"impl": "torch", "softcap": 1.0}),
        ("impl='flash'", (q, k, v), {"impl": "flash"}),
    ]
    for message, tensors, options in wrong:
        with pytest.raises(ValueError, match=message):
            attention(*tensors, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": (100, None), "softcap": 20.0}])
def test_bf16_on_a_gpu_is_as_close_as_torch(width: int, options: dict[str, Any], device: torch.device) -> None:
    leaves = inputs(device, 515, 515, heads=(4, 2), width=width, dtype=torch.bfloat16)
    grads = seeds(leaves)

    with poisoned_outputs():
        got = run(leaves, grads, **options)

    plain = run(leaves, grads, impl="reference", **options)
    wide = run([leaf.double() for leaf in leaves], [grad.double() for grad in grads], impl="reference", **options)
    for index, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        assert_close_as_torch(got[index], wide[index], plain[index], grad=index > 1, what=name)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256])
def test_fp32_on_a_gpu_is_exact(width: int, device: torch.device) -> None:
    leaves = inputs(device, 130, 130, width=width)
    grads = seeds(leaves)

    got = run(leaves, grads, causal=True)

    expected = run([leaf.double() for leaf in leaves], grads, impl="reference", causal=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_offsets_pass_the_range_of_32_bits(device: torch.device) -> None:
    batch, num_heads, length, width = 33, 32, 16384, 128
    q = torch.randn(batch, num_heads, length, width, device=device, dtype=torch.bfloat16)
    assert q.numel() > 2**31

    out = attention(q, q, q, causal=True)

    last = q[-1:, -1:]
    expected = attention(last, last, last, causal=True, impl="torch")
    torch.testing.assert_close(out[-1:, -1:], expected, atol=2e-2, rtol=2e-2)

"""The fused loss: every option against the reference, shares and chunks, memory, what is ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from danaus.kernels import tuning
from danaus.kernels.cross_entropy import linear as module
from danaus.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

from ..agree import DTYPES, assert_agrees
from ..truth import Canaries, misaligned, strided

EVERYTHING: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0}
SMALL_TILES = {"BLOCK_N": 16, "BLOCK_V": 32, "BLOCK_D": 16, "GROUP": 2}
IGNORED = -100


def inputs(
    num_rows: int, num_features: int, vocab: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, weight and targets; of more than two rows the second is ignored."""
    x = torch.randn(num_rows, num_features, device=device, dtype=dtype, requires_grad=True)
    weight = (2 * torch.randn(vocab, num_features, device=device) / num_features**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (num_rows,), device=device)
    if num_rows > 2:
        targets[1] = IGNORED
    return x, weight, targets


def check(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], **options: Any) -> None:
    x, weight, targets = tensors
    assert_agrees(
        lambda x, weight: linear_cross_entropy(x, weight, targets, **options),
        lambda x, weight: linear_cross_entropy_reference(x, weight, targets, **options),
        (x, weight),
        str(options),
    )


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Several row blocks, shares, tiles per share and chunks of columns from small inputs."""
    monkeypatch.setattr(module, "num_sms", lambda device: 2)
    monkeypatch.setattr(module, "G_BYTES", 37 * 4 * 70)
    with tuning.using("linear_cross_entropy", SMALL_TILES), tuning.using("linear_cross_entropy_backward", SMALL_TILES):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 16, 3), (5, 33, 130), (18, 24, 300)])
def test_it_equals_the_reference(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    check(inputs(*shape, device, dtype))
    check(inputs(*shape, device, dtype), **EVERYTHING)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3}, {"z_loss": 0.1}, {"softcap": 2.0}, EVERYTHING])
@pytest.mark.usefixtures("small_tiles")
def test_shares_and_chunks_join(reduction: str, options: dict[str, float], device: torch.device) -> None:
    check(inputs(37, 20, 131, device), reduction=reduction, **options)


@pytest.mark.parametrize("layout", [strided, misaligned])
@pytest.mark.usefixtures("small_tiles")
def test_any_layout_of_the_rows_will_do(layout: Any, device: torch.device) -> None:
    x, weight, targets = inputs(17, 20, 70, device)

    check((layout(x), layout(weight), targets.int()), **EVERYTHING)


@pytest.mark.parametrize("ignore_index", [-1, 0, 5])
def test_the_ignored_index_may_be_any(ignore_index: int, device: torch.device) -> None:
    x, weight, targets = inputs(6, 8, 9, device)
    targets[1:4] = ignore_index

    check((x, weight, targets), ignore_index=ignore_index)


def test_ignored_rows_may_hold_anything(device: torch.device) -> None:
    x, weight, targets = inputs(3, 8, 9, device)
    with torch.no_grad():
        x[1] = 1e30

    loss = linear_cross_entropy(x, weight, targets, reduction="sum")
    dx, dw = torch.autograd.grad(loss, (x, weight))

    assert loss.isfinite()
    assert not dx[1].any()
    assert dw.isfinite().all()


def test_a_target_outside_of_the_vocabulary_is_not_overlooked(device: torch.device) -> None:
    x, weight, targets = inputs(4, 8, 9, device)
    targets[:] = torch.tensor([0, 9, -1, 8])

    loss = linear_cross_entropy(x, weight, targets, reduction="none")

    assert loss.isnan().tolist() == [False, True, True, False]


def test_no_rows_have_no_loss(device: torch.device) -> None:
    x, weight, targets = inputs(0, 8, 9, device)

    loss = linear_cross_entropy(x, weight, targets, reduction="sum")
    dx, dw = torch.autograd.grad(loss, (x, weight))

    assert loss == 0
    assert dx.shape == (0, 8)
    assert not dw.any()


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen: int, device: torch.device) -> None:
    x, weight, targets = inputs(5, 8, 9, device)
    (x, weight)[frozen].requires_grad_(False)

    check((x, weight, targets))


def test_large_logits_do_not_overflow(device: torch.device) -> None:
    x, weight, targets = inputs(5, 16, 40, device)

    check((x, (weight.detach() * 300).requires_grad_(), targets))


@pytest.mark.usefixtures("small_tiles")
def test_its_memory_does_not_grow_with_the_vocabulary(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: sizes.append((e := make(*shape, **kind)).numel()) or e)

    def largest(vocab: int) -> int:
        sizes.clear()
        x, weight, targets = inputs(17, 8, vocab, device)
        # The weight's own gradient is as large as the weight, whoever computes it.
        linear_cross_entropy(x, weight.detach(), targets).backward()
        return max(sizes)

    assert largest(320) == largest(480)


def test_it_writes_only_its_results(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = inputs(18, 20, 37, device)
    canaries = Canaries()
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: canaries.around(make(*shape, **options)))

    linear_cross_entropy(x, weight, targets, **EVERYTHING).backward()

    canaries.check()


def test_the_same_bits_every_time(device: torch.device) -> None:
    x, weight, targets = inputs(18, 20, 37, device)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_reference_is_torchs_loss(reduction: Any, device: torch.device) -> None:
    x, weight, targets = inputs(6, 8, 9, device)
    logits = torch.nn.functional.linear(x, weight)

    got = linear_cross_entropy_reference(x, weight, targets, reduction=reduction, label_smoothing=0.2)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction=reduction, label_smoothing=0.2)

    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="torch 2.13 has it")
def test_torchs_own_is_the_same(device: torch.device) -> None:
    x, weight, targets = inputs(6, 8, 9, device)

    got = linear_cross_entropy(x, weight, targets, label_smoothing=0.2, impl="torch")

    torch.testing.assert_close(got, linear_cross_entropy_reference(x, weight, targets, label_smoothing=0.2))


def test_the_references_gradient_is_its_derivative() -> None:
    x, weight, targets = inputs(4, 3, 5, torch.device("cpu"))
    wide = tuple(t.detach().double().requires_grad_() for t in (x, weight))

    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy_reference(x, w, targets, **EVERYTHING), wide)


@pytest.mark.timeout(60)
def test_torch_may_trace_it(device: torch.device) -> None:
    torch.library.opcheck(module._linear_op, (*inputs(5, 16, 40, device), IGNORED, 0.1, 0.01, 3.0))


def test_it_says_what_it_takes(device: torch.device) -> None:
    x, weight, targets = inputs(5, 8, 9, device)

    with pytest.raises(ValueError, match=r"expected x \[N, D\] and w \[V, D\] of one dtype"):
        linear_cross_entropy(x, weight.half(), targets)
    with pytest.raises(ValueError, match=r"expected int64 or int32 targets \[5\]"):
        linear_cross_entropy(x, weight, targets[:3])
    with pytest.raises(ValueError, match="reduction='max' is not there"):
        linear_cross_entropy(x, weight, targets, reduction="max")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"label_smoothing=2.0 is outside"):
        linear_cross_entropy(x, weight, targets, label_smoothing=2.0)
    with pytest.raises(ValueError, match='impl="torch"'):
        linear_cross_entropy(x, weight, targets, softcap=1.0, impl="torch")


@pytest.mark.gpu
def test_offsets_pass_two_to_the_31(device: torch.device) -> None:
    vocab, num_features = 2**31 // 1024 + 64, 1024
    x = torch.randn(64, num_features, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(vocab, num_features, device=device, dtype=torch.bfloat16)
    weight[-1] = 0.1 * torch.randn(num_features, device=device)
    targets = torch.full((64,), vocab - 1, device=device)

    loss = linear_cross_entropy(x, weight, targets)
    (dx,) = torch.autograd.grad(loss, x)

    z = x.detach().float() @ weight[-1].float()
    lse = torch.logaddexp(z, torch.tensor(float(vocab - 1), device=device).log())
    torch.testing.assert_close(loss, (lse - z).mean(), rtol=1e-4, atol=1e-4)
    expected = ((z - lse).exp() - 1)[:, None] * weight[-1].float() / 64
    torch.testing.assert_close(dx.float(), expected, rtol=2e-2, atol=1e-5)

"""The loss of logits that exist: every option against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from danaus.kernels import tuning
from danaus.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from danaus.kernels.cross_entropy import plain as module

from ..agree import DTYPES, assert_agrees
from ..truth import Canaries, misaligned, strided

EVERYTHING: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0}
IGNORED = -100


def inputs(
    num_rows: int, vocab: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and targets; of more than two rows the second is ignored."""
    logits = (3 * torch.randn(num_rows, vocab, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (num_rows,), device=device)
    if num_rows > 2:
        targets[1] = IGNORED
    return logits, targets


def check(logits: torch.Tensor, targets: torch.Tensor, **options: Any) -> None:
    assert_agrees(
        lambda logits: cross_entropy(logits, targets, **options),
        lambda logits: cross_entropy_reference(logits, targets, **options),
        (logits,),
        str(options),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 130)])
@pytest.mark.parametrize("options", [{}, EVERYTHING, {"reduction": "sum"}, {"reduction": "none"}])
def test_it_equals_the_reference(
    shape: tuple[int, int], options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    check(*inputs(*shape, device, dtype), **options)


def test_rows_longer_than_a_block_are_walked_over(device: torch.device) -> None:
    with tuning.using("cross_entropy", {"BLOCK_V": 32}), tuning.using("cross_entropy_backward", {"BLOCK_V": 32}):
        check(*inputs(4, 131, device), **EVERYTHING)


@pytest.mark.parametrize("layout", [strided, misaligned])
def test_any_layout_of_the_rows_will_do(layout: Any, device: torch.device) -> None:
    logits, targets = inputs(5, 37, device)

    check(layout(logits), targets)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_tokens_may_be_ruled_out(device: torch.device) -> None:
    logits, targets = inputs(3, 9, device)
    with torch.no_grad():
        logits[:, 4:] = float("-inf")
    targets[:] = 2

    got = torch.autograd.grad(cross_entropy(logits, targets), logits)[0]
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), logits)[0]

    torch.testing.assert_close(got, expected)


def test_no_rows_have_no_loss(device: torch.device) -> None:
    logits, targets = inputs(0, 9, device)

    loss = cross_entropy(logits, targets, reduction="sum")

    assert loss == 0
    assert torch.autograd.grad(loss, logits)[0].shape == (0, 9)


def test_a_target_outside_of_the_vocabulary_is_not_overlooked(device: torch.device) -> None:
    logits, targets = inputs(4, 9, device)
    targets[:] = torch.tensor([0, 9, -1, 8])

    assert cross_entropy(logits, targets, reduction="none").isnan().tolist() == [False, True, True, False]


def test_it_writes_only_its_results(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = inputs(5, 37, device)
    canaries = Canaries()
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: canaries.around(make(*shape, **options)))

    cross_entropy(logits, targets).backward()

    canaries.check()


def test_torchs_own_is_the_same(device: torch.device) -> None:
    logits, targets = inputs(5, 37, device)

    torch.testing.assert_close(cross_entropy(logits, targets, impl="torch"), cross_entropy_reference(logits, targets))


def test_the_references_gradient_is_its_derivative() -> None:
    logits, targets = inputs(4, 5, torch.device("cpu"))
    wide = logits.detach().double().requires_grad_()

    assert torch.autograd.gradcheck(lambda z: cross_entropy_reference(z, targets, **EVERYTHING), (wide,))


@pytest.mark.timeout(60)
def test_torch_may_trace_it(device: torch.device) -> None:
    torch.library.opcheck(module._plain_op, (*inputs(5, 16, device), IGNORED, 0.1, 0.01, 3.0))


def test_it_says_what_it_takes(device: torch.device) -> None:
    logits, targets = inputs(5, 8, device)

    with pytest.raises(ValueError, match=r"expected logits \[N, V\]"):
        cross_entropy(logits[0], targets)
    with pytest.raises(ValueError, match=r"expected int64 or int32 targets \[5\]"):
        cross_entropy(logits, targets.float())
    with pytest.raises(ValueError, match=r"z_loss=-1\.0 is negative"):
        cross_entropy(logits, targets, z_loss=-1.0)
    with pytest.raises(ValueError, match="has neither z_loss nor softcap"):
        cross_entropy(logits, targets, softcap=1.0, impl="torch")

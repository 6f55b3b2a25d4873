"""The loss over a vocabulary and its gradient are those of the plain formula."""

import pytest
import torch
import torch.nn.functional as F

from deltatune.training.cross_entropy import cross_entropy_


@pytest.mark.parametrize(("rows", "classes"), [(1, 3), (37, 9_001), (3, 300_000)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient_are_those_of_the_plain_formula(rows: int, classes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(rows, classes, generator=generator)).to(dtype)
    logits[0, 0] = 400.0  # exp of it is no number
    targets = torch.randint(classes, (rows,), generator=generator)
    leaf = logits.double().requires_grad_()
    wanted = F.cross_entropy(leaf, targets, reduction="sum") / 50
    wanted.backward()
    loss = cross_entropy_(logits, targets, 50)
    assert loss == pytest.approx(wanted.item(), rel=1e-5 if dtype != torch.float64 else 1e-12)
    near = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(logits.double(), leaf.grad, rtol=near, atol=near / 50)

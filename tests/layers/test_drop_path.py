"""Stochastic depth."""

from __future__ import annotations

import pytest
import torch

from mambavision_backbone.layers.drop_path import drop_factors
from mambavision_backbone.layers.stage import ConvStage, TokenStage


def token_stage(drop_path: float, with_cp: bool = False) -> TokenStage:
    return TokenStage(16, 2 * [drop_path], 2, 4, "fit", 2.0, None, "auto", False, with_cp)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_each_branch_is_skipped_with_its_probability(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.empty(40_001, 5, 7, dtype=dtype, requires_grad=True)
    rates = [0.0, 0.01, 0.5, 0.0, 0.5, 0.9]
    factors = drop_factors(rates, x)
    for rate, factor in zip(rates, factors, strict=True):
        if rate == 0:
            assert factor is None
            continue
        assert factor is not None
        assert factor.shape == (40_001, 1, 1)
        assert factor.data_ptr() % 16 == 0
        assert factor.dtype == dtype
        assert not factor.requires_grad
        kept = factor[factor != 0]
        assert torch.equal(kept, torch.full_like(kept, 1 / (1 - rate)))
        deviation = (rate * (1 - rate) / len(factor)) ** 0.5
        assert abs(len(kept) / len(factor) - (1 - rate)) < 5 * deviation
    both = ((factors[2] != 0) & (factors[4] != 0)).float().mean()  # type: ignore[operator]
    assert abs(both - 0.25) < 0.02  # one by one, not together


@pytest.mark.parametrize(
    "stage", [ConvStage(16, 2 * [1 - 1e-9], None, False), token_stage(1 - 1e-9)], ids=type
)
def test_a_stage_of_skipped_branches_changes_nothing(stage: ConvStage | TokenStage) -> None:
    x = torch.randn(8, 16, 4, 8)
    assert torch.equal(stage.train()(x), x)
    assert not torch.allclose(stage.eval()(x), x)
    stage.train()
    stage.blocks[1].eval()  # as frozen blocks are
    assert not torch.allclose(stage(x), x)


def test_windows_and_branches_are_skipped_one_by_one() -> None:
    """Of one block's two branches, with probability 0.5 each: four outcomes of equal windows."""
    torch.manual_seed(0)
    stage = TokenStage(16, [0.5], 2, 4, "fit", 2.0, None, "auto", False, False).train()
    y = stage(torch.randn(1, 16, 4, 4).repeat(1, 1, 8, 8))  # one image of 64 windows
    windows = y.unflatten(2, (8, 4)).unflatten(4, (8, 4)).permute(0, 2, 4, 1, 3, 5).reshape(64, -1)
    alike = torch.cdist(windows, windows) < 1e-2
    assert len(alike.unique(dim=0)) == 4


def test_recomputed_blocks_skip_the_same_branches() -> None:
    stages = token_stage(0.5), token_stage(0.5, with_cp=True)
    stages[1].load_state_dict(stages[0].state_dict())
    x = torch.randn(8, 16, 8, 8)
    grads = []
    for stage in stages:
        torch.manual_seed(0)
        y = x.clone().requires_grad_()
        stage.train()(y).square().sum().backward()
        grads.append(y.grad)
    torch.testing.assert_close(*grads)

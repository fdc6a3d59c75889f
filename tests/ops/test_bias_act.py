"""Bias, activation and residual sum: PyTorch's operators, and the kernel against them."""

from __future__ import annotations

import pytest
import torch

from mambavision_backbone.ops import bias_act as package
from mambavision_backbone.ops.bias_act import bias_act
from tests.conftest import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the kernel is interpreted


@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
@pytest.mark.parametrize("act", ["none", "relu", "gelu_tanh"])
def test_kernel(act: str, add: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    layout = torch.channels_last
    y, x = (4 * torch.randn(2, 5, 16, 17, device=DEVICE).to(memory_format=layout) for _ in range(2))
    bias, x = torch.randn(5, device=DEVICE), x if add else None
    with monkeypatch.context() as patch:
        patch.setattr(package, "fusible", lambda _: False)
        exact = bias_act(y.double(), bias.double(), act, None if x is None else x.double())
    monkeypatch.setattr(package, "fusible", lambda _: True)
    assert relative_error(bias_act(y.clone(), bias, act, x), exact) < 1e-6
    other = y.contiguous()  # not channels-last: PyTorch's operators
    assert relative_error(bias_act(other, bias, act, x), exact) < 1e-6


@pytest.mark.parametrize("act", ["none", "relu", "gelu_tanh"])
def test_a_nan_stays_one(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(package, "fusible", lambda _: True)
    y = torch.full((1, 3, 2, 2), torch.nan, device=DEVICE).to(memory_format=torch.channels_last)
    assert bias_act(y, torch.zeros(3, device=DEVICE), act).isnan().all()

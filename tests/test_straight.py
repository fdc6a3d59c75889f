"""Straight-line stages against the modules that they stand in for (interpreted on a CPU)."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mambavision_backbone import MambaVision, straight
from mambavision_backbone.inference import FastBackbone
from mambavision_backbone.layers.stage import TokenStage
from tests.ops.test_fused_network import set_fused

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16  # which CPUs have, too
CASES = [("pad", None), ("fit", None), ("pad", 0.5)]  # window mode, layer scale


@pytest.fixture
def fast(
    request: pytest.FixtureRequest, tiny_arch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> FastBackbone:
    """A fast network with random biases, whose operators are kernels."""
    mode, scale = getattr(request, "param", CASES[0])
    arch = {**tiny_arch, "layer_scale": scale, "layer_scale_conv": scale}
    model = MambaVision(arch, window_mode=mode).to(DEVICE)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    set_fused(monkeypatch, model, True)
    monkeypatch.setattr(straight, "fusible", lambda _: True)
    return FastBackbone(model.eval(), DTYPE, graphs=0)


def through_modules(fast: FastBackbone, x: Tensor) -> tuple[Tensor, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(straight.StraightStage, "_straight", lambda *_: False)
        return fast(x)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.fixture
def modules_called(monkeypatch: pytest.MonkeyPatch) -> list[TokenStage]:
    """Stages that went through their modules."""
    called: list[TokenStage] = []
    forward = TokenStage.forward

    def spy(stage: TokenStage, x: Tensor) -> Tensor:
        called.append(stage)
        return forward(stage, x)

    monkeypatch.setattr(TokenStage, "forward", spy)
    return called


@pytest.mark.parametrize("hw", [(96, 128), (70, 161)], ids=str)
@pytest.mark.parametrize("fast", CASES, ids=str, indirect=True)
def test_same_maps(fast: FastBackbone, hw: tuple[int, int], modules_called: list[Any]) -> None:
    x = torch.randn(2, 3, *hw, device=DEVICE)
    maps = fast(x)
    assert not modules_called
    assert all(m.isfinite().all() for m in maps)
    assert same(maps, through_modules(fast, x))
    assert len(modules_called) == 2


def test_copies_moves_and_changed_weights(fast: FastBackbone) -> None:
    """The chain holds the parameters that the modules hold."""
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    before = fast(x)
    copied = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(0.5)
    assert not same(fast(x), before)
    assert same(fast(x), through_modules(fast, x))
    assert same(copied(x), before)
    moved = copied.to(torch.float32).to(DTYPE)
    assert same(moved(x), before)
    moved.load_state_dict(fast.state_dict())
    assert same(moved(x), fast(x))


def test_hooks_are_called(fast: FastBackbone, modules_called: list[Any]) -> None:
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    seen: list[Tensor] = []
    before = fast(x)
    block = fast.net.levels[3].blocks[0]
    handle = block.mlp.fc2.register_forward_hook(lambda _m, _i, out: seen.append(out))
    fast(x)
    assert len(seen) == 1
    assert modules_called == [fast.net.levels[3]]
    handle.remove()
    assert same(fast(x), before)
    assert len(seen) == 1


def test_other_layers_and_float32(
    tiny_arch: dict[str, Any], monkeypatch: pytest.MonkeyPatch, modules_called: list[Any]
) -> None:
    """Adapters, and what the chain has no kernels for, go through the modules."""
    model = MambaVision(tiny_arch).to(DEVICE).eval()
    set_fused(monkeypatch, model, True)
    monkeypatch.setattr(straight, "fusible", lambda _: True)
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    FastBackbone(model, torch.float32, graphs=0)(x)
    assert len(modules_called) == 2
    fc1 = model.levels[2].blocks[0].mlp.fc1
    torch.nn.utils.parametrizations.weight_norm(fc1)
    adapted = FastBackbone(model, DTYPE, graphs=0)
    modules_called.clear()
    adapted(x)
    assert modules_called == [adapted.net.levels[2]]


def test_traced(fast: FastBackbone, modules_called: list[Any], monkeypatch: Any) -> None:
    """Compilers and exporters see modules."""
    monkeypatch.setattr(
        straight, "fusible", sys.modules["mambavision_backbone.ops.triton_support"].fusible
    )
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        fast(torch.randn(1, 3, 64, 64, device=DEVICE))
    assert len(modules_called) == 2

"""The whole network by fused kernels (interpreted on a CPU) against PyTorch's operators."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mambavision_backbone import MambaVision
from mambavision_backbone.inference import accelerate
from mambavision_backbone.layers.mixer import MambaVisionMixer
from tests.conftest import relative_error

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = "mambavision_backbone.ops."
DRAWS = 3
MODULES = ["batch_norm", "bias_act", "cast", "conv_silu", "layer_norm", "linear", "mix", "mlp"]


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def set_fused(monkeypatch: pytest.MonkeyPatch, model: MambaVision, fused: bool) -> None:
    for name in MODULES:
        monkeypatch.setattr(sys.modules[OPS + name], "fusible", lambda _: fused)
    for module in model.modules():
        if isinstance(module, MambaVisionMixer):
            module.scan_backend = "triton" if fused else "chunked"


def run(model: MambaVision, x: Tensor) -> dict[str, Tensor]:
    """Maps, gradients and statistics."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # drop path
    outs = model(x)
    sum(o.square().mean() for o in outs).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    return {**{str(i): o for i, o in enumerate(outs)}, **grads, **buffers}


@pytest.mark.parametrize("mode", ["pad", "fit"])
@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_training(
    mode: str,
    layer_scale: float | None,
    tiny_arch: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most three times the error of PyTorch's operators, against float64.

    Summed over some draws: batch norms multiply rounding by a thousand, with luck or without.
    """
    arch = {**tiny_arch, "layer_scale": layer_scale, "layer_scale_conv": layer_scale}
    errors: dict[str, list[float]] = {}
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        model = MambaVision(arch, window_mode=mode, drop_path_rate=0.3).to(DEVICE)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        x = torch.randn(2, 3, 40, 48, device=DEVICE)
        set_fused(monkeypatch, model, True)
        got = run(model, x)
        set_fused(monkeypatch, model, False)
        model.load_state_dict(state)
        plain = run(model, x)
        model.double().load_state_dict(state)
        for name, exact in run(model, x.double()).items():
            if name.endswith(("conv1.bias", "conv2.bias")):
                assert (got[name] == 0).all()  # without the kernels: rounding
                continue
            total = errors.setdefault(name, [0.0, 0.0])
            total[0] += relative_error(got[name], exact)
            total[1] += relative_error(plain[name], exact)
    for name, (ours, plains) in errors.items():
        assert ours < max(3 * plains, 1e-5 * DRAWS), name


def test_inference(tiny_arch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = MambaVision(tiny_arch).to(DEVICE).eval()
    x = torch.randn(2, 3, 40, 48, device=DEVICE)
    with torch.no_grad():
        wanted = model(x)
        set_fused(monkeypatch, model, True)
        for net in (model, accelerate(model, torch.float32)):
            for a, b in zip(net(x), wanted, strict=True):
                assert a.is_contiguous()
                assert relative_error(a, b) < 1e-5

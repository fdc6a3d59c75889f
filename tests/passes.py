"""What tests of training passes share: networks, images and what is to be the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambavision_backbone import MambaVision

A, B, C = (64, 64), (64, 96), (32, 32)


def both(
    arch: dict[str, Any], device: str, way: dict[str, Any], **options: Any
) -> tuple[MambaVision, MambaVision]:
    """The same network: with passes run in some way, and as they are."""
    options = {"drop_path_rate": 0.0, **options}
    torch.manual_seed(0)
    model = MambaVision(arch, replay=False, **options)
    other = MambaVision(arch, **way, **options)
    other.load_state_dict(model.state_dict())
    return other.to(device), model.to(device)


def moved(model: MambaVision) -> None:
    """Put the weights into other memory."""
    model.to(torch.float64).to(torch.float32)


def images(hw: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(2, 3, *hw, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    x = x.to(next(model.parameters()).device)
    with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None and x.is_cuda):
        maps = model(x)
    return torch.stack([m.float().square().mean() for m in maps]).sum()


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have the same weights, statistics and gradients."""
    tensors = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    grads = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in tensors) and all(
        (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad))
        for p, q in grads
    )


def train_a_hundred_steps(models: Sequence[MambaVision], device: str) -> None:
    """As recipes train: losses scaled, gradients clipped, evaluation now and then; all the same."""
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in models]
    scalers = [torch.amp.GradScaler(device, init_scale=2.0**20) for _ in models]
    for step in range(100):
        losses = []
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            loss = loss_of(model, images(A if step % 3 else B, step), torch.float16)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            if step % 20 == 19:
                model.eval()
                with torch.no_grad():
                    loss = loss_of(model, images(C, 0), None)
                model.train()
            losses.append(loss.detach())
        assert torch.equal(*losses), step
    assert same(*models)

"""What tests of training passes share: networks, images and what is to be the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambavision_backbone import MambaVision

A, B, C = (64, 64), (64, 96), (32, 32)
USED_MAPS = [  # of passes, one after the other
    [(0, 1, 2, 3), (1,), (0, 1, 2, 3), (1, 2), (3,), (0,)],
    [(1,), (1,), (1,), (1,), (0, 1, 2, 3), (1,), (0, 1, 2, 3)],
    [(2,), (1,), (2,), (1,), (2,), (0,), (1, 2), (3,), (3,), (0, 1, 2, 3)],
]


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


def check_modified_weights(models: Sequence[MambaVision]) -> None:
    """As PyTorch does it: an error, not gradients of a mixture."""
    for model in models:
        for seed in range(3):
            loss_of(model, images(A, seed), None).backward()
        loss = loss_of(model, images(A, 3), None)
        with torch.no_grad():
            model.outnorm3.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def check_losses_of_some_maps(models: Sequence[MambaVision], used: Sequence[Sequence[int]]) -> None:
    """Weights behind maps that are not used have no gradients, rather than zeros."""
    device = next(models[0].parameters()).device.type
    for seed, numbers in enumerate(used):
        for model in models:
            model.zero_grad()
            with torch.autocast(device, torch.float16, enabled=device == "cuda"):
                maps = model(images(A, seed).to(device))
            sum(maps[i].float().square().sum() for i in numbers).backward()
        assert same(*models), numbers


def check_an_infinite_map_without_a_loss(models: Sequence[MambaVision]) -> None:
    """It does not reach the weights that other maps share with it, not even by zeros."""
    device = next(models[0].parameters()).device
    for model in models:
        with torch.no_grad():
            model.levels[3].blocks[0].norm1.bias.fill_(torch.inf)
    for seed in range(4):
        for model in models:
            model.zero_grad()
            maps = model(images(A, seed).to(device))
            assert not maps[3].isfinite().all()
            (maps[0].square().sum() + maps[2].square().sum()).backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert all(grad.isfinite().all() for grad in grads), seed
        assert same(*models), seed


def check_a_late_loss(models: Sequence[MambaVision], dtype: torch.dtype | None = None) -> None:
    """Of a map that had none when its pass began: with the pass's own draws, and no new ones."""
    device = next(models[0].parameters()).device
    for seed in range(6):
        following = []
        for model in models:
            model.zero_grad()
            torch.manual_seed(seed)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                maps = model(images(A, seed).to(device))
            torch.rand(1), torch.rand(1, device=device)
            sum(m.square().sum() for m in (maps if seed > 3 else maps[1:2])).backward()
            following.append((torch.rand(1), torch.rand(1, device=device)))
        assert following[0] == following[1]
        assert same(*models), seed


def check_a_late_loss_that_cannot_be(model: MambaVision) -> None:
    """The image, or the network, are not what they were."""
    device = next(model.parameters()).device
    for seed in range(3):
        model(images(A, seed).to(device))[1].sum().backward()
    x = images(A, 3).to(device)
    loss = model(x)[2].sum()
    x.zero_()
    with pytest.raises(RuntimeError, match=r"the image or weights .* modified by an inplace"):
        loss.backward()
    del loss  # with it, one pass would still be under way
    loss = model(images(A, 3).to(device))[2].sum()
    model.levels[2].eval()
    with pytest.raises(RuntimeError, match=r"changed between .* set graphs=0 and replay=False"):
        loss.backward()


def check_weights_that_are_no_parameters(models: Sequence[MambaVision]) -> None:
    """They get their gradients in every pass."""
    for model in models:
        layer = model.levels[2].blocks[0].mlp.fc1
        flat = nn.Parameter(layer.weight.detach().flatten())
        del layer.weight
        model.flat = flat
        layer.weight = flat.view(layer.out_features, layer.in_features)
        layer.own = flat.new_ones(3)  # an attribute, too
    for seed in range(4):
        for model in models:
            model.zero_grad()
            loss_of(model, images(A, seed), None).backward(retain_graph=True)
            assert model.flat.grad.abs().sum() > 0
        assert same(*models), seed


def check_a_weight_from_outside(model: MambaVision) -> None:
    """A layer of ours that reads another network's parameter."""
    device = next(model.parameters()).device
    outside = nn.Parameter(torch.ones(8, 1, 1, device=device))
    stem = type(model.patch_embed)
    forward = stem.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stem, "forward", lambda m, x: forward(m, x) * outside.sum())
        for seed in range(4):
            outside.grad = None
            loss_of(model, images(A, seed), None).backward()
            assert outside.grad.abs().sum() > 0, seed


def check_sharded_weights(models: Sequence[MambaVision], original: bool, folder: Path) -> None:
    """FSDP replaces parameters by views of one tensor, unless it keeps the original ones."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, plain = models
    device = next(plain.parameters()).device
    backend = "nccl" if device.type == "cuda" else "gloo"
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group(backend, meeting, rank=0, world_size=1)
    try:
        sharded = FullyShardedDataParallel(model, use_orig_params=original, device_id=device)
        for seed in range(4):
            sums = []
            for network in (sharded, plain):
                network.zero_grad()
                loss_of(network, images(A, seed), None).backward()
                grads = [p.grad for p in network.parameters() if p.grad is not None]
                sums.append(torch.stack([g.square().sum() for g in grads]).sum())
            assert torch.allclose(*sums, rtol=1e-3), seed
    finally:
        torch.distributed.destroy_process_group()

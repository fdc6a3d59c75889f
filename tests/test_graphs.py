"""Training by CUDA graphs: what it computes is what it computes without them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambavision_backbone import MambaVision
from mambavision_backbone.graphs import TrainingGraphs

A, B, C = (64, 64), (64, 96), (32, 32)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """The same algorithms in every run."""
    flags = {"benchmark": False, "deterministic": True, "allow_tf32": False}
    with torch.backends.cudnn.flags(enabled=True, **flags):
        yield


def pair(tiny_arch: dict[str, Any], graphs: int, **options: Any) -> tuple[MambaVision, MambaVision]:
    """The same network, with graphs and without."""
    torch.manual_seed(0)
    model = MambaVision(tiny_arch, drop_path_rate=0.0, **options)
    graphed = MambaVision(tiny_arch, drop_path_rate=0.0, graphs=graphs, **options)
    graphed.load_state_dict(model.state_dict())
    return graphed.cuda(), model.cuda()


def images(hw: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(2, 3, *hw, generator=torch.Generator().manual_seed(seed)).cuda()


def loss_of(model: nn.Module, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
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


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_training_is_the_same(
    dtype: torch.dtype | None, layout: torch.memory_format, tiny_arch: dict[str, Any]
) -> None:
    models = [m.to(memory_format=layout) for m in pair(tiny_arch, graphs=2)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in models]
    for step, hw in enumerate([A, B, A, B, C, C, A, B, A, C]):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = loss_of(model, images(hw, step), dtype)
            loss.backward()
            losses.append(loss.detach())
        assert torch.equal(*losses), step
        assert same(*models), step
        for optimizer in optimizers:
            optimizer.step()
    assert {key[0][2:] for key in models[0]._graphs._passes} == {A, B}


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_passes_that_overlap_and_gradients_that_add_up(tiny_arch: dict[str, Any]) -> None:
    models = pair(tiny_arch, graphs=2)
    for step in range(4):
        for model in models:  # gradients add up over the steps
            first = loss_of(model, images(A, step), torch.float16)
            second = loss_of(model, images(A, step + 10), torch.float16)
            (first + 2 * second).backward()
        assert same(*models), step
    for model in models:
        loss_of(model, images(A, 7), torch.float16)  # never differentiated
        maps = [m.clone() for m in model(images(A, 8))]
        loss_of(model, images(A, 9), torch.float16).backward()
        kept = model(images(A, 8))
        loss_of(model.eval(), images(A, 9), torch.float16).backward()
        model.train()
        assert all(m.isfinite().all() for m in (*maps, *kept))
    assert same(*models)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_maps_are_the_callers(tiny_arch: dict[str, Any]) -> None:
    graphed, _ = pair(tiny_arch, graphs=1)
    for seed in range(3):
        loss_of(graphed, images(A, seed), None).backward()
    kept = graphed(images(A, 1))
    before = [m.detach().clone() for m in kept]
    sum(m.sum() for m in kept).backward()
    gradients = [p.grad for p in graphed.parameters()]
    values = [g.clone() for g in gradients]
    graphed.zero_grad()
    loss_of(graphed, images(A, 2), None).backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, values, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_changes_of_the_network_are_noticed(tiny_arch: dict[str, Any]) -> None:
    models = pair(tiny_arch, graphs=2)

    def steps() -> None:
        for step in range(3):
            for model in models:
                model.zero_grad()
                loss_of(model, images(A, step), torch.float16).backward()
            assert same(*models)

    steps()
    for model in models:
        model.levels[0].requires_grad_(False)
    steps()
    for model in models:
        model.patch_embed.eval()
    steps()
    for model in models:
        model.cpu().cuda()
        model.load_state_dict({k: 0.5 * v for k, v in model.state_dict().items()})
    steps()
    assert len(models[0]._graphs._passes) == 1


@pytest.mark.gpu
def test_drop_path_is_drawn_anew(tiny_arch: dict[str, Any]) -> None:
    model = MambaVision(tiny_arch, drop_path_rate=0.5, graphs=1).cuda()
    x = images(A, 0)
    losses = []
    for _ in range(8):
        loss = loss_of(model, x, torch.float16)
        loss.backward()
        losses.append(loss.item())
    assert model._graphs._passes
    assert len(set(losses[2:])) > 2


@pytest.mark.gpu
def test_differentiating_twice_is_refused(tiny_arch: dict[str, Any]) -> None:
    model, _ = pair(tiny_arch, graphs=1)
    loss_of(model, images(A, 0), None).backward()
    loss = loss_of(model, images(A, 0), None)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated once: set graphs=0"):
        loss.backward()


@pytest.mark.gpu
def test_what_cannot_be_captured_runs_as_it_is(
    tiny_arch: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = pair(tiny_arch, graphs=4)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for step in range(3):
        loss_of(model, images(A, step), torch.float16).backward()
    assert "SyncBatchNorm" in caplog.text
    assert caplog.text.count("no more CUDA graphs") == 1


def test_nothing_changes_on_a_cpu(tiny_arch: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = MambaVision(tiny_arch, drop_path_rate=0.0)
    graphed = MambaVision(tiny_arch, drop_path_rate=0.0, graphs=2)
    graphed.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for _ in range(3):
        for a, b in zip(graphed(x), model(x), strict=True):
            assert torch.equal(a, b)
    assert not graphed._graphs._seen


def test_copies_start_without_graphs() -> None:
    graphs = TrainingGraphs(3)
    graphs._seen.add("a shape")
    for copied in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert copied.limit == 3
        assert not copied._seen


def test_bad_arguments(tiny_arch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="graphs must not be negative, got -1"):
        MambaVision(tiny_arch, graphs=-1)
    for other in ("compile", "with_cp"):
        with pytest.raises(ValueError, match="together with compile or with_cp"):
            MambaVision(tiny_arch, graphs=1, **{other: True})

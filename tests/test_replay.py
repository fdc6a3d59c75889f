"""Training by recorded calls: what it computes is what it computes by the modules, bit by bit."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from mambavision_backbone import MambaVision
from mambavision_backbone.replay import TrainingReplays
from mambavision_backbone.tape.kernels import KernelStart
from tests.conftest import relative_error
from tests.ops.test_fused_network import set_fused
from tests.passes import (
    USED_MAPS,
    A,
    B,
    C,
    both,
    check_a_late_loss,
    check_a_late_loss_that_cannot_be,
    check_a_weight_from_outside,
    check_an_infinite_map_without_a_loss,
    check_losses_of_some_maps,
    check_modified_weights,
    check_sharded_weights,
    check_weights_that_are_no_parameters,
    images,
    loss_of,
    moved,
    same,
    train_a_hundred_steps,
)

if not TrainingReplays(True).limit:
    pytest.skip("this torch does not tell when a graph is retained", allow_module_level=True)

WAY = {"replay": True}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A GPU, with the same algorithms in every run; or a CPU that is taken for one."""
    if request.param == "cpu":
        monkeypatch.setattr("mambavision_backbone.passes.on_gpu", lambda _: True)
    flags = {"benchmark": False, "deterministic": True, "allow_tf32": False}
    with torch.backends.cudnn.flags(enabled=True, **flags):
        yield request.param


def step(model: MambaVision, hw: tuple[int, int], seed: int, dtype: Any = torch.float16) -> Tensor:
    """Gradients of a new image, drop path drawn from the seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = loss_of(model, images(hw, seed), dtype)
    loss.backward()
    return loss.detach()


def check_steps(models: tuple[MambaVision, MambaVision]) -> None:
    """Three steps of both: as it is, recorded and replayed if the network is new or changed."""
    for seed in range(3):
        losses = [step(model, A, seed) for model in models]
        assert torch.equal(*losses), seed
        assert same(*models), seed
    assert models[0]._replays._passes


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mode", ["pad", "fit"])
def test_training_is_the_same(
    dtype: torch.dtype | None,
    layout: torch.memory_format,
    mode: str,
    device: str,
    tiny_arch: dict[str, Any],
) -> None:
    if device == "cpu" and dtype is not None:
        pytest.skip("autocast is a GPU's here")
    models = both(tiny_arch, device, WAY, window_mode=mode, drop_path_rate=0.3)
    models = tuple(m.to(memory_format=layout) for m in models)  # type: ignore[call-overload]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in models]
    for seed, hw in enumerate([A, B, A, B, C, C, A, B, A, C, C]):
        losses = [step(model, hw, seed, dtype) for model in models]
        assert torch.equal(*losses), seed
        assert same(*models), seed
        for optimizer in optimizers:
            optimizer.step()
    assert {key[0][2:] for key in models[0]._replays._passes} == {A, B, C}


def test_fused_kernels(
    device: str, tiny_arch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of ours are recorded, too; interpreted on a CPU."""
    pytest.importorskip("triton")
    models = both(tiny_arch, device, WAY, drop_path_rate=0.3, window_mode="fit")
    for model in models:
        set_fused(monkeypatch, model, True)
    for seed in range(4):
        losses = [step(model, (40, 48), seed, None) for model in models]
        assert torch.equal(*losses), seed
        assert same(*models), seed
    (replay,) = models[0]._replays._passes.values()
    kernels = [
        call.arguments(replay._tape.slots)[0].launch.kernel.__name__
        for part in replay._tape.parts
        for call in part.calls
        if call.function is KernelStart.start
    ]
    assert len(kernels) > 20
    assert "eight_row_sums" in kernels


def test_weights_cast_at_once(tiny_arch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies in half precision are kept for all tapes, and follow the weights."""
    monkeypatch.setattr("mambavision_backbone.passes.on_gpu", lambda _: True)
    monkeypatch.setattr("mambavision_backbone.ops.cast.fusible", lambda _: True)
    models = both(tiny_arch, "cpu", WAY)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    for seed, hw in enumerate([A, B, A, B, A, B, A]):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                maps = model(images(hw, seed))
            loss = sum(m.float().square().mean() for m in maps)
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
        assert torch.equal(*losses), seed
        assert same(*models), seed
    assert len(models[0]._replays._passes) == 2
    (copies,) = models[0]._replays.kept.values()
    assert {c.dtype for c in copies} == {torch.bfloat16}


@pytest.mark.parametrize("last_first", [False, True])
def test_passes_of_two_shapes_that_overlap(
    last_first: bool, device: str, tiny_arch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share the copies of weights, recorded or replayed."""
    if device == "cpu":
        monkeypatch.setattr("mambavision_backbone.ops.cast.fusible", lambda _: True)
    models = both(tiny_arch, device, WAY)
    alone, overlapping = [(A,), (B,), (C,)], [(A, B), (A, B), (C, A), (B, C)]
    for seed, shapes in enumerate([*alone, *overlapping]):
        for model in models:
            model.zero_grad()
            losses = []
            for hw in shapes:
                with torch.autocast(device, torch.bfloat16):
                    maps = model(images(hw, seed).to(device))
                losses.append(sum(m.float().square().mean() for m in maps))
            for loss in reversed(losses) if last_first else losses:
                loss.backward()
        assert same(*models), seed
    assert len(models[0]._replays._passes) == 3
    assert len(models[0]._replays.kept) == 1


def test_a_hundred_steps_with_evaluation_in_between(device: str, tiny_arch: dict[str, Any]) -> None:
    """As recipes train: losses scaled, gradients clipped, and statistics used now and then."""
    models = both(tiny_arch, device, WAY)
    train_a_hundred_steps(models, device)
    assert len(models[0]._replays._passes) == 2


def test_passes_that_overlap_and_gradients_that_add_up(
    device: str, tiny_arch: dict[str, Any]
) -> None:
    models = both(tiny_arch, device, WAY)
    for seed in range(4):
        for model in models:  # gradients add up over the steps
            first = loss_of(model, images(A, seed), torch.float16)
            second = loss_of(model, images(A, seed + 10), torch.float16)
            loss_of(model, images(A, 7), torch.float16)  # never differentiated
            (first + 2 * second).backward()
        for a, b in zip(*(m.parameters() for m in models), strict=True):
            # A weight used twice gets the terms of its gradient in another order.
            assert relative_error(a.grad, b.grad) < 1e-6
    assert models[0]._replays._passes


def test_differentiating_twice(device: str, tiny_arch: dict[str, Any]) -> None:
    models = both(tiny_arch, device, WAY)
    for seed in range(3):
        for model in models:
            model.zero_grad()
            loss = loss_of(model, images(A, seed), None)
            loss.backward(retain_graph=True)
            loss.backward()
            with pytest.raises(RuntimeError, match="second time"):
                loss.backward()
        assert same(*models), seed
    assert models[0]._replays._passes


def test_weights_modified_before_the_backward_pass(device: str, tiny_arch: dict[str, Any]) -> None:
    check_modified_weights(both(tiny_arch, device, WAY))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_an_image_modified_before_the_backward_pass(
    layout: torch.memory_format, device: str, tiny_arch: dict[str, Any]
) -> None:
    """An error where the first convolution has it, none where that has a copy."""
    for model in both(tiny_arch, device, WAY):
        for seed in range(4):
            x = images(A, seed).to(device, memory_format=layout)
            loss = sum(m.square().mean() for m in model(x))
            if seed == 3:
                x.zero_()
            if seed == 3 and layout == torch.channels_last:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()
            else:
                loss.backward()


@pytest.mark.parametrize("used", USED_MAPS, ids=str)
def test_losses_of_some_maps(
    used: Sequence[Sequence[int]], device: str, tiny_arch: dict[str, Any]
) -> None:
    models = both(tiny_arch, device, WAY)
    check_losses_of_some_maps(models, used)
    assert models[0]._replays._passes


def test_an_infinite_map_without_a_loss(device: str, tiny_arch: dict[str, Any]) -> None:
    models = both(tiny_arch, device, WAY)
    check_an_infinite_map_without_a_loss(models)
    assert models[0]._replays._passes


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_late_loss(dtype: torch.dtype | None, device: str, tiny_arch: dict[str, Any]) -> None:
    models = both(tiny_arch, device, WAY, drop_path_rate=0.3)
    check_a_late_loss(models, dtype)
    assert models[0]._replays._passes


def test_a_late_loss_that_cannot_be(device: str, tiny_arch: dict[str, Any]) -> None:
    check_a_late_loss_that_cannot_be(both(tiny_arch, device, WAY)[0])


def test_late_losses_one_after_the_other(device: str, tiny_arch: dict[str, Any]) -> None:
    """Of one pass that is retained, while its network is recorded and replayed for other maps."""
    models = both(tiny_arch, device, WAY, drop_path_rate=0.3)
    for seed in range(5):
        for model in models:
            model.zero_grad()
            torch.manual_seed(seed)
            maps = model(images(A, seed).to(device))
            losses = [m.square().sum() for m in (maps[:2] if seed < 3 else maps)]
            for loss in losses[:-1]:
                loss.backward(retain_graph=True)
            losses[-1].backward()
        assert same(*models), seed
    assert models[0]._replays._passes


def test_maps_are_the_callers(device: str, tiny_arch: dict[str, Any]) -> None:
    model, _ = both(tiny_arch, device, WAY)
    for seed in range(3):
        step(model, A, seed, None)
    kept = model(images(A, 1).to(device))
    before = [m.detach().clone() for m in kept]
    model.zero_grad()
    sum(m.sum() for m in kept).backward()
    gradients = [p.grad for p in model.parameters()]
    values = [g.clone() for g in gradients]
    step(model, A, 2, None)
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, values, strict=True))


def test_images_and_gradients_in_any_layout(device: str, tiny_arch: dict[str, Any]) -> None:
    models = both(tiny_arch, device, WAY)
    gray = torch.randn(2, 1, 64, 64).expand(-1, 3, -1, -1).to(device)
    for seed in range(-2, 5):
        whole = torch.randn(3, 3, 64, 67, generator=torch.Generator().manual_seed(seed + 2))
        x = (whole[1:, :, :, 3:], whole[:2, :, :, :64].contiguous())[seed % 2].to(device)
        x = x.to(memory_format=torch.channels_last) if seed == 4 else x
        x = gray if seed < 0 else x
        for model in models:
            model.zero_grad()
            maps = model(x)
            sum(m.transpose(2, 3).flatten(1).cumsum(1).mean() for m in maps).backward()
        assert same(*models), seed


def test_changes_of_the_network_are_noticed(device: str, tiny_arch: dict[str, Any]) -> None:
    models = both(tiny_arch, device, WAY)
    check_steps(models)
    for model in models:
        model.levels[0].requires_grad_(False)
    check_steps(models)
    for model in models:
        model.patch_embed.eval()
    check_steps(models)
    for model in models:
        moved(model)
        model.load_state_dict({k: 0.5 * v for k, v in model.state_dict().items()})
    check_steps(models)
    for model in models:
        fc1 = model.levels[2].blocks[0].mlp.fc1
        fc1.weight = nn.Parameter(2 * fc1.weight.detach())
        norm = model.levels[1].blocks[0].norm1
        model.levels[1].blocks[0].norm1 = copy.deepcopy(norm)
        norm = model.levels[0].blocks[0].norm1
        norm.running_mean = norm.running_mean + 1
        norm.momentum = 0.3
    check_steps(models)
    for model in models:
        model.requires_grad_(False)
        model.outnorm3.requires_grad_(True)  # one map has gradients
    check_steps(models)
    assert len(models[0]._replays._passes) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.levels[2].blocks[0].mlp.drop1, "p", 0.5),
        lambda m: setattr(m.levels[0].blocks[0].norm1, "eps", 1.0),
        lambda m: setattr(m.levels[0].blocks[0].norm1, "track_running_stats", False),
        lambda m: setattr(m.levels[2], "window_mode", "fit"),
        lambda m: setattr(m.levels[1].blocks[0], "act1", nn.ReLU()),
        lambda m: vars(m.levels[2].blocks[1].mixer).update(num_heads=1, head_dim=64),
    ],
)
def test_changed_settings_are_noticed(change: Any, device: str, tiny_arch: dict[str, Any]) -> None:
    models = both(tiny_arch, device, WAY)
    check_steps(models)
    for model in models:
        change(model)
    check_steps(models)


def test_a_patched_forward_is_called(device: str, tiny_arch: dict[str, Any]) -> None:
    model, _ = both(tiny_arch, device, WAY)
    for seed in range(3):
        step(model, A, seed)
    layer = model.levels[0].blocks[0].act1
    calls = []
    layer.forward = lambda x: calls.append(1) or nn.GELU.forward(layer, x)  # type: ignore[func-returns-value]
    for seed in range(3):
        step(model, A, seed)
    assert len(calls) == 3
    assert not model._replays._passes


def test_a_change_while_a_recording_is_under_way(device: str, tiny_arch: dict[str, Any]) -> None:
    """What is recorded to its end after the network has changed is not kept."""
    models = both(tiny_arch, device, WAY)
    for model in models:
        for hw in (A, B):
            step(model, hw, 0)
        late = loss_of(model, images(A, 1), None)  # recorded
        model.levels[0].requires_grad_(False)
        model.patch_embed.eval()
        step(model, B, 1)
        step(model, B, 2)
        late.backward()
    for seed in range(3):
        losses = [step(model, A, seed) for model in models]
        assert torch.equal(*losses), seed
        assert same(*models), seed


def test_weights_that_are_no_parameters(device: str, tiny_arch: dict[str, Any]) -> None:
    models = both(tiny_arch, device, WAY)
    check_weights_that_are_no_parameters(models)
    assert not models[0]._replays._passes


def test_a_weight_from_outside(device: str, tiny_arch: dict[str, Any]) -> None:
    model, _ = both(tiny_arch, device, WAY)
    check_a_weight_from_outside(model)
    assert not model._replays._passes


@pytest.mark.parametrize("original", [False, True])
def test_sharded_weights(
    original: bool, device: str, tmp_path: Path, tiny_arch: dict[str, Any]
) -> None:
    models = both(tiny_arch, device, WAY)
    check_sharded_weights(models, original, tmp_path)
    assert not models[0]._replays._passes


def test_memory_of_weights_that_are_moved(device: str, tiny_arch: dict[str, Any]) -> None:
    model, _ = both(tiny_arch, device, WAY)
    for seed in range(3):
        step(model, A, seed)
    model.zero_grad()
    storages = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
    model.to(torch.float64)
    gc.collect()
    assert all(storage.expired() for storage in storages)


def test_networks_that_change_all_the_time_run_as_they_are(
    device: str, tiny_arch: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mambavision_backbone")
    model, _ = both(tiny_arch, device, WAY)
    for _ in range(17):
        for seed in range(3):
            step(model, A, seed)
        moved(model)
    assert caplog.text.count("the network changes all the time") == 1
    assert not model._replays._passes


def test_hooks_are_called(device: str, tiny_arch: dict[str, Any]) -> None:
    models = both(tiny_arch, device, WAY)
    check_steps(models)
    called = []
    layer = models[0].levels[2].blocks[0]
    handle = layer.register_forward_hook(lambda *_: called.append(1))
    for seed in range(4):
        for model in models:
            step(model, A, seed)
    assert len(called) == 4
    handle.remove()
    for hook in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = hook(lambda *_: called.append(1))
        before = len(called)
        step(models[0], A, 0)
        assert len(called) > before + 20
        step(models[1], A, 0)
        handle.remove()
    check_steps(models)


class Noisy(nn.Linear):
    """A layer that a recording would freeze."""

    calls = itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        return next(self.calls) * super().forward(x)


def test_layers_of_others_run_as_they_are(
    device: str, tiny_arch: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = both(tiny_arch, device, WAY)
    caplog.set_level("INFO", "mambavision_backbone")
    model.levels[2].blocks[0].mlp.fc2.__class__ = Noisy
    losses = {step(model, A, 0).item() for _ in range(5)}
    assert len(losses) == 5
    assert "Noisy may do more than its operators" in caplog.text
    assert caplog.text.count("no more replays") == 1


def test_a_network_with_adapters(device: str, tiny_arch: dict[str, Any]) -> None:
    model, _ = both(tiny_arch, device, WAY)
    nn.utils.parametrizations.weight_norm(model.levels[2].blocks[0].mlp.fc1)
    for seed in range(3):
        step(model, A, seed, None)
    assert not model._replays._passes


def test_copies_start_anew(device: str, tiny_arch: dict[str, Any]) -> None:
    models = both(tiny_arch, device, WAY)
    check_steps(models)
    copied = copy.deepcopy(models[0])
    assert not copied._replays._passes
    check_steps((copied, models[1]))
    assert pickle.loads(pickle.dumps(models[0]._replays)).limit == models[0]._replays.limit
    assert TrainingReplays(False).limit == 0


def test_together_with_graphs(device: str, tiny_arch: dict[str, Any]) -> None:
    """Shapes beyond those with graphs are replayed."""
    if device == "cpu":
        pytest.skip("no graphs")
    models = both(tiny_arch, device, {"graphs": 1})
    for seed, hw in enumerate([A, A, A, B, B, B, A, B, A, B]):
        losses = [step(model, hw, seed) for model in models]
        assert torch.equal(*losses), seed
        assert same(*models), seed
    assert len(models[0]._graphs._passes) == 1
    assert len(models[0]._replays._passes) == 1


def test_checkpointing_around_the_backbone(device: str, tiny_arch: dict[str, Any]) -> None:
    """What is not to be saved is not saved by a replay either."""
    models = both(tiny_arch, device, WAY)
    for seed in range(4):
        for model in models:
            model.zero_grad()
            x = images(A, seed).to(device)
            maps = checkpoint(model, x, use_reentrant=False)
            sum(m.square().mean() for m in maps).backward()
        assert same(*models), seed
    assert not models[0]._replays._passes


def test_two_passes_under_one_autocast(tiny_arch: dict[str, Any], device: str) -> None:
    """Autocast keeps the weights that it casts for the second one."""
    models = both(tiny_arch, device, WAY)
    for model in models:
        set_plain = pytest.MonkeyPatch()
        set_plain.setattr("mambavision_backbone.ops.cast.fusible", lambda _: False)
        for _ in range(3):
            with torch.autocast(device, torch.bfloat16):
                first, second = (model(images(A, seed).to(device)) for seed in range(2))
            model.zero_grad()
            sum(m.float().square().mean() for m in (*first, *second)).backward()
        set_plain.undo()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-2
    assert models[0]._replays._passes


def test_off_where_it_cannot_be(tiny_arch: dict[str, Any]) -> None:
    model = MambaVision(tiny_arch)
    assert model._replays.limit
    for options in ({"replay": False}, {"with_cp": True}, {"compile": True}):
        assert not MambaVision(tiny_arch, **options)._replays.limit
    for seed in range(3):
        step(model, A, seed)  # on a CPU
    assert not model._replays._seen


@pytest.mark.gpu
def test_memory(tiny_arch: dict[str, Any]) -> None:
    """No more than through the modules, neither recorded nor replayed, but for kept copies."""
    peaks = []
    for way in (WAY, {"replay": False}):
        model = MambaVision({**tiny_arch, "dim": 64}, **way).cuda()
        for seed in range(4):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(model, (512, 512), seed)
            peaks.append(torch.cuda.max_memory_allocated() - before)
    copies = 2 * sum(p.numel() for p in model.parameters())
    assert max(peaks[1:4]) < 1.05 * max(peaks[5:]) + copies


def train_in_parallel(rank: int, meeting: str, device: str, arch: dict[str, Any]) -> None:
    """One of two processes: the same gradients with replays and without, averaged over both."""
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, f"file://{meeting}", rank=rank, world_size=2)
    if device == "cuda":
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    else:
        from mambavision_backbone import passes

        passes.on_gpu = lambda _: True
    models = both(arch, device, WAY)
    parallel = [nn.parallel.DistributedDataParallel(m) for m in models]
    for seed, hw in enumerate([A, B, A, B, A, B]):
        for model in parallel:
            model.zero_grad()
            loss_of(model, images(hw, 10 * rank + seed), torch.float16).backward()
        for a, b in zip(*(m.parameters() for m in models), strict=True):
            assert relative_error(a.grad, b.grad) < 1e-6  # buckets fill in another order
    assert len(models[0]._replays._passes) == 2
    grad = models[0].patch_embed.conv_down[0].weight.grad
    grads = [torch.empty_like(grad) for _ in range(2)]
    torch.distributed.all_gather(grads, grad)
    assert torch.equal(*grads)
    os._exit(0)  # gloo's destructor waits for a thread that waits for Python, now and then


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_processes(kind: str, tmp_path: Path, tiny_arch: dict[str, Any]) -> None:
    if kind == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    arguments = str(tmp_path / "meeting"), kind, tiny_arch
    torch.multiprocessing.spawn(train_in_parallel, arguments, nprocs=2)

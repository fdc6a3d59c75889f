"""Training by CUDA graphs: what it computes is what it computes without them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambavision_backbone import MambaVision
from mambavision_backbone.graphs import TrainingGraphs
from tests.conftest import relative_error
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


class Recorder(TorchDispatchMode):
    """Stands for a CUDA graph on a CPU: replays operators on the tensors that they were run on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function._schema.is_mutable or "batch_norm" in function.name():
            written = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.before += [(t, t.clone()) for t in written]
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, value in reversed(self.before):  # a capture computes nothing
                tensor.data.copy_(value)

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@pytest.fixture(params=["recorded", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A GPU, with the same algorithms in every run; or a CPU that records what a GPU captures."""
    if request.param == "cuda":
        flags = {"benchmark": False, "deterministic": True, "allow_tf32": False}
        with torch.backends.cudnn.flags(enabled=True, **flags):
            yield "cuda"
        return
    monkeypatch.setattr("mambavision_backbone.passes.on_gpu", lambda _: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, *_, **__: graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    yield "cpu"


def pair(
    tiny_arch: dict[str, Any], graphs: int, device: str, **options: Any
) -> tuple[MambaVision, MambaVision]:
    """The same network, with graphs and without; neither by replays."""
    return both(tiny_arch, device, {"graphs": graphs, "replay": False}, **options)


def check_steps(models: tuple[MambaVision, MambaVision]) -> None:
    """Three steps of both: eager, captured and replayed if the network is new or changed."""
    for step in range(3):
        for model in models:
            model.zero_grad()
            loss_of(model, images(A, step), torch.float16).backward()
        assert same(*models)
    assert models[0]._graphs._passes


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_training_is_the_same(
    dtype: torch.dtype | None, layout: torch.memory_format, device: str, tiny_arch: dict[str, Any]
) -> None:
    if device == "cpu" and dtype is not None:
        pytest.skip("autocast is a GPU's here")
    models = [m.to(memory_format=layout) for m in pair(tiny_arch, 2, device)]
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


def test_the_first_and_the_last_graph_are_logged(
    device: str, tiny_arch: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    graphed, _ = pair(tiny_arch, 2, device)
    with caplog.at_level("INFO", "mambavision_backbone"):
        for step, hw in enumerate([A, B, C] * 3):
            loss_of(graphed, images(hw, step), torch.float16).backward()
    assert [record.message for record in caplog.records if "graphs" in record.message] == [
        "training by CUDA graphs, of up to 2 input shapes",
        "no more CUDA graphs than graphs=2: other shapes run without",
    ]


def test_a_hundred_steps_with_evaluation_in_between(device: str, tiny_arch: dict[str, Any]) -> None:
    """As recipes train: losses scaled, gradients clipped, and statistics used now and then."""
    models = pair(tiny_arch, 2, device)
    train_a_hundred_steps(models, device)
    assert len(models[0]._graphs._passes) == 2


def test_passes_that_overlap_and_gradients_that_add_up(
    device: str, tiny_arch: dict[str, Any]
) -> None:
    models = pair(tiny_arch, 2, device)
    for step in range(4):
        for model in models:  # gradients add up over the steps
            first = loss_of(model, images(A, step), torch.float16)
            second = loss_of(model, images(A, step + 10), torch.float16)
            (first + 2 * second).backward()
        for a, b in zip(*(m.parameters() for m in models), strict=True):
            # A weight used twice gets the four terms of its gradient in another order.
            assert relative_error(a.grad, b.grad) < 1e-6
    values: list[list[Tensor]] = []
    for model in models:
        model.zero_grad()
        loss_of(model, images(A, 7), torch.float16)  # never differentiated
        kept = model(images(A, 8).to(device))
        values.append([m.detach().clone() for m in kept])
        loss_of(model, images(A, 9), torch.float16).backward()  # while another pass is under way
        loss_of(model.eval(), images(A, 9), torch.float16).backward()
        model.train()
        assert all(torch.equal(a, b) for a, b in zip(kept, values[-1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    assert same(*models)


def test_maps_are_the_callers(device: str, tiny_arch: dict[str, Any]) -> None:
    graphed, _ = pair(tiny_arch, 1, device)
    for seed in range(3):
        loss_of(graphed, images(A, seed), None).backward()
    kept = graphed(images(A, 1).to(device))
    before = [m.detach().clone() for m in kept]
    graphed.zero_grad()
    sum(m.sum() for m in kept).backward()
    gradients = [p.grad for p in graphed.parameters()]
    values = [g.clone() for g in gradients]
    graphed.zero_grad()
    loss_of(graphed, images(A, 2), None).backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, values, strict=True))


def test_changes_of_the_network_are_noticed(device: str, tiny_arch: dict[str, Any]) -> None:
    models = pair(tiny_arch, 2, device)

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
    assert len(models[0]._graphs._passes) == 1
    for model in models:
        model.requires_grad_(False)
        model.outnorm3.requires_grad_(True)  # one map has gradients
    check_steps(models)
    assert len(models[0]._graphs._passes) == 1


def test_a_change_makes_the_graphs_of_all_shapes_invalid(
    device: str, tiny_arch: dict[str, Any]
) -> None:
    models = pair(tiny_arch, 2, device)
    for change in range(2):
        for step, hw in enumerate([A, B] * 3):
            for model in models:
                model.zero_grad()
                loss_of(model, images(hw, step), torch.float16).backward()
            assert same(*models), (change, step)
        assert len(models[0]._graphs._passes) == 2
        for model in models:
            moved(model)
            model.load_state_dict({k: 0.5 * v for k, v in model.state_dict().items()})
    for hw in (B, A):
        for model in models:
            model.zero_grad()
            loss_of(model, images(hw, 0), torch.float16).backward()
        assert same(*models)
    assert not models[0]._graphs._passes


def test_layers_without_a_mode_of_their_own(device: str, tiny_arch: dict[str, Any]) -> None:
    """As ``torch.compile`` makes them."""

    class Passing(nn.Module):
        training = property(lambda _: True, lambda *_: None)  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return x

    models = pair(tiny_arch, 1, device)
    for model in models:
        model.levels[0].blocks.append(Passing())
    check_steps(models)


def test_replaced_tensors_and_modules_are_noticed(device: str, tiny_arch: dict[str, Any]) -> None:
    models = pair(tiny_arch, 2, device)

    check_steps(models)
    for model in models:
        state = {k: 0.5 * v for k, v in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    check_steps(models)
    for model in models:
        fc1 = model.levels[2].blocks[0].mlp.fc1
        fc1.weight = nn.Parameter(2 * fc1.weight.detach())
    check_steps(models)
    for model in models:
        norm = model.levels[1].blocks[0].norm1
        model.levels[1].blocks[0].norm1 = copy.deepcopy(norm)
        norm = model.levels[0].blocks[0].norm1
        norm.running_mean = norm.running_mean + 1
        norm.momentum = 0.3
    check_steps(models)
    for model in models:
        model.requires_grad_(False)
    assert not models[0](images(A, 0).to(device))[0].requires_grad
    for model in models:
        model.requires_grad_(True)
    models[1](images(A, 0).to(device))  # statistics
    check_steps(models)


def test_networks_that_change_all_the_time_run_as_they_are(
    device: str, tiny_arch: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = pair(tiny_arch, 2, device)
    for _ in range(17):
        for step in range(3):
            loss_of(model, images(A, step), torch.float16).backward()
        moved(model)
    assert caplog.text.count("the network changes all the time") == 1
    assert not model._graphs._passes


def test_nothing_is_kept_of_networks_that_change_all_the_time(
    device: str, tiny_arch: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = pair(tiny_arch, 2, device)
    for step in range(20):
        model.outnorm3.weight = nn.Parameter(model.outnorm3.weight.detach().clone())
        loss_of(model, images(A, step), torch.float16).backward()
    assert caplog.text.count("the network changes all the time") == 1
    assert model._graphs._snapshot is None


def test_replays_take_no_part_in_passes_that_are_captured(
    device: str, tiny_arch: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """So a network that moves after every epoch does not lose them."""
    model, _ = both(tiny_arch, device, {"graphs": 1})
    caplog.set_level("INFO", "mambavision_backbone")
    for _ in range(17):
        for step in range(12):
            loss_of(model, images(A, step), torch.float16).backward()
        moved(model)
    assert "all the time" not in caplog.text
    for step in range(3):
        loss_of(model, images(A, step), torch.float16).backward()
        loss_of(model, images(B, step), torch.float16).backward()  # beyond the limit
    assert len(model._graphs._passes) == 1
    replayed = [key[0][2:] for key in model._replays._passes]
    assert replayed == ([B] if model._replays.limit else [])  # torch 2.4 has none


def test_a_late_backward_pass_is_of_the_old_network(device: str, tiny_arch: dict[str, Any]) -> None:
    model, _ = pair(tiny_arch, 1, device)
    loss = loss_of(model, images(A, 0), torch.float16)
    model.levels[0].requires_grad_(False)
    loss_of(model, images(B, 0), torch.float16)
    loss.backward()
    assert not model._graphs._seen


def test_hooks_of_weights_are_called_once_a_pass(device: str, tiny_arch: dict[str, Any]) -> None:
    """Also where some maps lead to no loss."""
    model, _ = pair(tiny_arch, 1, device)
    calls: list[Tensor] = []
    model.patch_embed.conv_down[0].weight.register_hook(calls.append)
    for step in range(4):
        model(images(A, step).to(device))[1].square().sum().backward()
        assert len(calls) == step + 1


def test_copies_of_a_network_that_was_captured(device: str, tiny_arch: dict[str, Any]) -> None:
    graphed, model = pair(tiny_arch, 2, device)
    for step in range(3):
        for m in (graphed, model):
            loss_of(m, images(A, step), torch.float16).backward()
    copied = copy.deepcopy(graphed)
    assert not copied._graphs._passes
    for step in range(6):
        for m in (graphed, copied, model):
            m.zero_grad()
            loss_of(m, images(A, step), torch.float16).backward()
            m.eval()  # validation in between
            with torch.no_grad():
                m(images(A, step).to(device))
            m.train()
        assert same(graphed, model)
        assert same(copied, model)


def test_drop_path_is_drawn_anew(device: str, tiny_arch: dict[str, Any]) -> None:
    model = MambaVision(tiny_arch, drop_path_rate=0.5, graphs=1).to(device)
    x = images(A, 0)
    losses = []
    for _ in range(8):
        loss = loss_of(model, x, torch.float16)
        loss.backward()
        losses.append(loss.item())
    assert model._graphs._passes
    assert len(set(losses[2:])) > 2


def train_in_parallel(rank: int, meeting: str, arch: dict[str, Any]) -> None:
    """One of two processes: the same gradients with graphs and without, averaged over both."""
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", f"file://{meeting}", rank=rank, world_size=2)
    models = pair(arch, 2, f"cuda:{rank}")
    parallel = [nn.parallel.DistributedDataParallel(m, device_ids=[rank]) for m in models]
    flags = {"benchmark": False, "deterministic": True, "allow_tf32": False}
    with torch.backends.cudnn.flags(enabled=True, **flags):
        for step, hw in enumerate([A, B, A, B, A, B]):
            for model in parallel:
                model.zero_grad()
                loss_of(model, images(hw, 10 * rank + step), torch.float16).backward()
            assert same(*models), step
    assert len(models[0]._graphs._passes) == 2
    grad = models[0].patch_embed.conv_down[0].weight.grad
    grads = [torch.empty_like(grad) for _ in range(2)]
    torch.distributed.all_gather(grads, grad)
    assert torch.equal(*grads)
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_two_gpus(tmp_path: Path, tiny_arch: dict[str, Any]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.multiprocessing.spawn(train_in_parallel, (str(tmp_path / "meeting"), tiny_arch), nprocs=2)


@pytest.mark.gpu
def test_shapes_share_memory(tiny_arch: dict[str, Any]) -> None:
    """The pool is little more than what the largest shape takes."""

    def kept() -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))

    before = kept()  # of tests before this one
    sizes = []
    model = MambaVision(tiny_arch, graphs=8).cuda()
    for hw in [(512, 512), (480, 512), (512, 480), (256, 512)]:
        for step in range(3):
            loss_of(model, images(hw, step), torch.float16).backward()
        sizes.append(kept() - before)
    assert len(model._graphs._passes) == 4
    assert sizes[-1] < 1.25 * sizes[0]


def test_differentiating_twice_is_refused(device: str, tiny_arch: dict[str, Any]) -> None:
    model, _ = pair(tiny_arch, 1, device)
    loss_of(model, images(A, 0), None).backward()
    loss = loss_of(model, images(A, 0), None)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated once: set graphs=0"):
        loss.backward()


def test_weights_modified_before_the_backward_pass(device: str, tiny_arch: dict[str, Any]) -> None:
    check_modified_weights(pair(tiny_arch, 1, device))


@pytest.mark.parametrize("used", USED_MAPS, ids=str)
def test_losses_of_some_maps(
    used: Sequence[Sequence[int]], device: str, tiny_arch: dict[str, Any]
) -> None:
    models = pair(tiny_arch, 1, device)
    check_losses_of_some_maps(models, used)
    assert models[0]._graphs._passes


def test_an_infinite_map_without_a_loss(device: str, tiny_arch: dict[str, Any]) -> None:
    models = pair(tiny_arch, 1, device)
    check_an_infinite_map_without_a_loss(models)
    assert models[0]._graphs._passes


def test_a_late_loss(device: str, tiny_arch: dict[str, Any]) -> None:
    # The stand-in for a graph draws when it captures, too.
    models = pair(tiny_arch, 1, device, drop_path_rate=0.3 if device == "cuda" else 0.0)
    check_a_late_loss(models)
    assert models[0]._graphs._passes


def test_a_late_loss_that_cannot_be(device: str, tiny_arch: dict[str, Any]) -> None:
    check_a_late_loss_that_cannot_be(pair(tiny_arch, 1, device)[0])


def test_a_late_loss_beside_another_shape(device: str, tiny_arch: dict[str, Any]) -> None:
    """The graph of one shape is captured anew, in the memory of both."""
    models = pair(tiny_arch, 2, device)
    for step in range(12):
        for model in models:
            model.zero_grad()
            maps = model(images((A, B)[step % 2], step).to(device))
            used = maps if step in (8, 10) else maps[1:3]
            sum(m.square().sum() for m in used).backward()
        assert same(*models), step
    assert len(models[0]._graphs._passes) == 2


def test_frozen_or_not_before_a_capture(
    device: str, tiny_arch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was seen of another network does not count: its kernels are others."""
    model, _ = pair(tiny_arch, 1, device)
    captured: list[int] = []
    capture = TrainingGraphs._capture
    monkeypatch.setattr(
        TrainingGraphs, "_capture", lambda *args: captured.append(1) or capture(*args)
    )
    for trained in (True, False):
        model.levels[0].requires_grad_(trained)
        loss_of(model, images(A, 0), None).backward()
    assert not captured
    loss_of(model, images(A, 0), None).backward()
    assert captured


def test_weights_that_are_no_parameters(
    device: str, tiny_arch: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    models = pair(tiny_arch, 2, device)
    check_weights_that_are_no_parameters(models)
    assert not models[0]._graphs._passes
    assert "no more CUDA graphs" in caplog.text
    assert "maps depend on tensors that are no parameters of the network" in caplog.text


def test_a_weight_from_outside(
    device: str, tiny_arch: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = pair(tiny_arch, 2, device)
    check_a_weight_from_outside(model)
    assert not model._graphs._passes
    assert "maps depend on tensors that are no parameters of the network" in caplog.text


@pytest.mark.parametrize("original", [False, True])
def test_sharded_weights(
    original: bool, device: str, tmp_path: Path, tiny_arch: dict[str, Any]
) -> None:
    models = pair(tiny_arch, 2, device)
    check_sharded_weights(models, original, tmp_path)
    assert not models[0]._graphs._passes


class SyncBatchNorm(nn.BatchNorm2d):
    """Stands for mmcv's, which is not PyTorch's."""


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, SyncBatchNorm])
def test_what_cannot_be_captured_runs_as_it_is(
    kind: type[nn.Module],
    device: str,
    tiny_arch: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, _ = pair(tiny_arch, 4, device)
    model.patch_embed.conv_down[1] = kind(model.patch_embed.conv_down[1].num_features).to(device)
    for step in range(3):
        model(images(A, step).to(device))[1].square().sum().backward()
    assert "SyncBatchNorm" in caplog.text
    assert caplog.text.count("no more CUDA graphs") == 1


def test_nothing_changes_on_a_cpu(tiny_arch: dict[str, Any]) -> None:
    graphed, model = pair(tiny_arch, 2, "cpu")
    x = torch.randn(1, 3, 64, 64)
    for _ in range(3):
        for a, b in zip(graphed(x), model(x), strict=True):
            assert torch.equal(a, b)
    assert not graphed._graphs._seen


def test_copies_start_without_graphs() -> None:
    graphs = TrainingGraphs(3)
    graphs._seen["a shape"] = set()
    for copied in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert copied.limit == 3
        assert not copied._seen


def test_bad_arguments(tiny_arch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="graphs must not be negative, got -1"):
        MambaVision(tiny_arch, graphs=-1)
    for other in ("compile", "with_cp"):
        with pytest.raises(ValueError, match="together with compile or with_cp: set graphs=0"):
            MambaVision(tiny_arch, graphs=1, **{other: True})

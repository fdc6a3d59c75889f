"""Fast inference: same maps, and its limits."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambavision_backbone import MambaVision
from mambavision_backbone.inference import FastBackbone, accelerate
from tests.conftest import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[None, 0.5], ids=["", "layer scale"])
def model(request: pytest.FixtureRequest, tiny_arch: dict[str, Any]) -> MambaVision:
    """A network with statistics of some images."""
    arch = {**tiny_arch, "layer_scale": request.param, "layer_scale_conv": request.param}
    model = MambaVision(arch)
    for _ in range(3):
        model(2 * torch.randn(4, 3, 64, 64) + 1)
    return model.eval()


def maps(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(x)


def test_folded_network_gives_the_same_maps(model: MambaVision) -> None:
    x = torch.randn(2, 3, 70, 90)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fast = accelerate(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    for a, b in zip(fast(x), maps(model, x), strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 1e-5
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_half_precision_is_as_exact_as_autocast(model: MambaVision) -> None:
    x = torch.randn(2, 3, 70, 90)
    exact = maps(model, x)
    fast = accelerate(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        autocast, got = maps(model, x), fast(x)
    for a, b, c in zip(got, autocast, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert relative_error(a, c) < 1.5 * relative_error(b, c)
    assert fast(x)[0].dtype == torch.float32  # outside of autocast: x's


def test_whole_model_gets_a_fast_backbone(model: MambaVision) -> None:
    detector = nn.Module()
    detector.backbone = model
    assert accelerate(detector) is detector
    assert isinstance(detector.backbone, FastBackbone)
    detector.eval()
    with pytest.raises(RuntimeError, match="for inference"):
        detector.train()
    with pytest.raises(TypeError, match="Module has no MambaVision"):
        accelerate(detector)  # a second time


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float64}, "dtype must be float16, bfloat16 or float32"),
        ({"dtype": torch.float16}, "float16 needs a GPU"),
        ({"graphs": -1}, "graphs must not be negative"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, tiny_arch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        accelerate(MambaVision(tiny_arch), **arguments)


def test_copies_and_casts(model: MambaVision) -> None:
    x = torch.randn(1, 3, 64, 64)
    fast = accelerate(model)
    wanted = fast(x)
    for a, b in zip(copy.deepcopy(fast)(x), wanted, strict=True):
        assert torch.equal(a, b)
    half = copy.deepcopy(fast).to(torch.bfloat16)
    for a, b in zip(half(x), wanted, strict=True):
        assert a.dtype == torch.float32
        assert 1e-4 < relative_error(a, b) < 0.1


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 3, 1, 64, 64), (1, 4, 64, 64)], ids=str)
def test_shapes_that_are_not_images(shape: tuple[int, ...], model: MambaVision) -> None:
    fast = accelerate(model.to(DEVICE))
    for _ in range(3):
        with pytest.raises(ValueError, match="expected images of shape"):
            fast(torch.randn(shape, device=DEVICE))


def test_images_of_other_dtypes(model: MambaVision) -> None:
    fast = accelerate(model.to(DEVICE))
    x = torch.randint(256, (1, 3, 64, 64), device=DEVICE)
    wanted = fast(x.float())
    images = x.to(torch.uint8), x.double(), x.float().to(memory_format=torch.channels_last)
    for image, dtype in zip(images, (fast.dtype, torch.float64, torch.float32), strict=True):
        for a, b in zip(fast(image), wanted, strict=True):
            assert a.dtype == dtype
            assert torch.equal(a.float(), b)


@pytest.mark.slow
def test_exports_with_any_number_of_images(model: MambaVision) -> None:
    fast = accelerate(model)
    batch = torch.export.Dim("batch", min=2)
    x = torch.randn(3, 3, 64, 64)
    program = torch.export.export(fast, (x[:2],), dynamic_shapes=({0: batch},))
    for a, b in zip(program.module()(x), fast(x), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.gpu
def test_graphs_change_nothing_and_are_bounded(model: MambaVision) -> None:
    model.cuda()
    fast, eager = accelerate(model, graphs=2), accelerate(model, graphs=0)
    sizes = [(64, 64), (64, 96), (64, 64), (64, 96), (32, 32), (32, 32), (64, 64), (64, 96)]
    kept = []
    for seed, hw in enumerate(sizes):
        x = torch.randn(1, 3, *hw, generator=torch.Generator().manual_seed(seed)).cuda()
        got, wanted = fast(x), eager(x)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        kept.append((got, wanted))
    assert set(fast._graphs) == {(1, 3, 64, 64), (1, 3, 64, 96)}
    for got, wanted in kept:  # later replays wrote elsewhere
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_graphs_are_of_the_weights_that_are_loaded(model: MambaVision) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fast = accelerate(model.to(device), torch.bfloat16, graphs=1)
    x = torch.randn(1, 3, 64, 64, device=device)
    for _ in range(3):
        before = fast(x)
    fast._seen.add((1, 3, 96, 96))  # also where there are no graphs
    zeros = {key: torch.zeros_like(value).float() for key, value in fast.state_dict().items()}
    fast.load_state_dict(zeros, assign=True)
    assert not fast._seen
    assert not fast._graphs
    assert fast.dtype == torch.float32
    for _ in range(3):
        after = fast(x)
    assert all(m.abs().sum() > 0 for m in before)
    assert not any(m.any() for m in after)


@pytest.mark.gpu
def test_two_threads(model: MambaVision) -> None:
    """Graphs of all shapes share their memory: threads wait for each other."""
    fast = accelerate(model.cuda(), graphs=2)
    inputs = [torch.randn(1, 3, 64, width, device="cuda") for width in (64, 96)]
    for _ in range(2):
        wanted = [fast(x) for x in inputs]

    def same(i: int) -> bool:
        maps = fast(inputs[i])
        return all(torch.equal(a, b) for a, b in zip(maps, wanted[i], strict=True))

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(same, [0, 1] * 200))

"""Weights cast at once: same results as autocast's own casts, and nothing left behind."""

from __future__ import annotations

import copy
import operator
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from mambavision_backbone import MambaVision
from mambavision_backbone.ops import cast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def model(tiny_arch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> MambaVision:
    monkeypatch.setattr(cast, "fusible", lambda _: True)
    return MambaVision(tiny_arch, drop_path_rate=0.0, frozen_stages=1).to(DEVICE)


def run(model: MambaVision, x: Tensor) -> list[Tensor]:
    """Maps and gradients under autocast."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        outs = model(x)
    if outs[0].requires_grad:
        sum(o.float().square().mean() for o in outs[1:]).backward()
    return [*outs, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_training_is_as_with_autocasts_own(
    model: MambaVision, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 3, 64, 64, device=DEVICE)
    own = dict(model.named_parameters())
    got = run(model, x)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in own.items()}
    monkeypatch.setattr(cast, "fusible", lambda _: False)
    wanted = run(model, x)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)
    assert all(p.grad is None for p in model.levels[0].blocks.parameters())  # frozen


def test_inference_sees_every_change_of_a_weight(model: MambaVision) -> None:
    """By .data too, which leaves no trace; mmengine's EMA hook writes so."""
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    model.eval()
    with torch.no_grad():
        first = run(model, x)
        model.levels[2].blocks[0].mlp.fc1.weight.data.mul_(2)
        assert not torch.equal(first[2], run(model, x)[2])


def test_a_copy_of_the_model_uses_its_own_weights(model: MambaVision) -> None:
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    model.eval()
    with torch.no_grad():
        first = run(model, x)
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.zero_()
        assert all((out == 0).all() for out in run(other, x))
        assert all(torch.equal(a, b) for a, b in zip(run(model, x), first, strict=True))


def test_frozen_and_parametrised_weights(model: MambaVision) -> None:
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    torch.nn.utils.parametrizations.weight_norm(model.levels[2].blocks[0].mlp.fc1)
    assert run(model, x)
    model.requires_grad_(False)
    assert len(run(model, x)) == 4


@pytest.mark.parametrize("autocast", [False, True])
def test_a_second_thread_waits_for_the_weights(autocast: bool, model: MambaVision) -> None:
    """It never sees the first one's copies: of another dtype, or of another history."""
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    own = [p for p in model.parameters() if p.requires_grad]
    inside, other = threading.Event(), threading.Event()
    came: list[bool] = []

    def meet(*_: Any) -> None:
        if inside.is_set():
            other.set()
        else:
            inside.set()
            came.append(other.wait(0.5))

    def run(enabled: bool) -> list[Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            maps = model(x)
        return [*maps, *torch.autograd.grad(sum(m.float().square().mean() for m in maps), own)]

    def second() -> list[Tensor]:
        assert inside.wait(60)
        return run(autocast)

    flags = {"benchmark": False, "deterministic": True, "allow_tf32": False}
    with torch.backends.cudnn.flags(enabled=True, **flags), ThreadPoolExecutor() as threads:
        wanted = run(True), run(autocast)
        model.levels[2].register_forward_pre_hook(meet)
        got = threads.submit(run, True), threads.submit(second)
        for a, b in zip(got, wanted, strict=True):
            assert all(map(torch.equal, a.result(), b))
    assert came == [False]  # while the first one was inside
    assert all(map(operator.is_, own, (p for p in model.parameters() if p.requires_grad)))


def test_copies_and_pickles(model: MambaVision) -> None:
    for copied in (copy.deepcopy(model._caster), pickle.loads(pickle.dumps(model._caster))):
        assert len(copied.slots) == len(model._caster.slots)
        with copied.cast(torch.ones(1)):
            pass


def test_weights_come_back_after_an_error(model: MambaVision) -> None:
    weight = model.levels[3].blocks[0].mlp.fc1.weight
    model.levels[3].blocks[1].mixer = torch.nn.Identity()
    with pytest.raises(TypeError):
        run(model, torch.randn(1, 3, 64, 64, device=DEVICE))
    assert model.levels[3].blocks[0].mlp.fc1.weight is weight

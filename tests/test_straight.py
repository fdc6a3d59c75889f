"""Straight-line stages against the modules that they stand in for (interpreted on a CPU)."""

from __future__ import annotations

import copy
import pickle
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mambavision_backbone import MambaVision, straight
from mambavision_backbone.inference import FastBackbone
from mambavision_backbone.layers.attention import Attention
from mambavision_backbone.layers.mixer import D_STATE
from mambavision_backbone.layers.stage import TokenStage
from mambavision_backbone.ops.triton_support import traced
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


@pytest.mark.parametrize("hw", [(96, 128), (40, 160)], ids=str)
@pytest.mark.parametrize("fast", CASES, ids=str, indirect=True)
def test_same_maps(fast: FastBackbone, hw: tuple[int, int], modules_called: list[Any]) -> None:
    for _ in range(3 if DEVICE == "cuda" else 1):  # with launches that are settled
        x = torch.randn(2, 3, *hw, device=DEVICE)
        modules_called.clear()
        maps = fast(x)
        assert not modules_called
        assert all(m.isfinite().all() for m in maps)
        assert same(maps, through_modules(fast, x))
        assert len(modules_called) == 2


def test_shapes_in_turn(
    fast: FastBackbone, modules_called: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches are kept for each, up to a number, and are for that shape."""
    monkeypatch.setattr(straight, "_MAX_SHAPES", 2)
    known = fast.net.levels[2]._launches
    sizes = (1, 64), (2, 96), (3, 40)
    a, b, c = (torch.randn(n, 3, 64, width, device=DEVICE) for n, width in sizes)
    for x, count in [(a, 1), (b, 2), (a, 2), (b, 2), (c, 1)]:
        maps = fast(x)
        modules_called.clear()
        assert same(maps, through_modules(fast, x))
        assert len(modules_called) == 2
        assert len(known) == count


def test_input_at_an_odd_address(
    fast: FastBackbone, modules_called: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches that are settled on others get a copy."""
    stage = fast.net.levels[2]
    seen: list[int] = []

    class Rows(straight._Rows):
        def __init__(self, tokens: Tensor, *args: Any) -> None:
            seen.append(tokens.data_ptr())
            super().__init__(tokens, *args)

    monkeypatch.setattr(straight, "_Rows", Rows)
    memory = torch.randn(1 + 64 * 5 * 5, device=DEVICE).to(DTYPE)  # a window, no padding
    x = memory[1:].view(1, 5, 5, 64).permute(0, 3, 1, 2)
    even, before = x.clone(memory_format=torch.preserve_format), x.clone()
    with torch.no_grad():
        maps = [stage(even), stage(x), stage(x)]
        assert not modules_called
        assert torch.equal(x, before)
        assert seen[0] == even.data_ptr()
        assert not any(address % 16 for address in seen)
        wanted = TokenStage.forward(stage, even)
    assert all(torch.equal(y, wanted) for y in maps)


def test_copies_moves_and_changed_weights(fast: FastBackbone, modules_called: list[Any]) -> None:
    """The chain follows the weights that the modules have."""
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    before = fast(x)
    copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(0.5)
    after = fast(x)
    assert not same(after, before)
    assert same(after, through_modules(fast, x))
    modules_called.clear()
    for assign, copied in enumerate(copies):
        assert same(copied(x), before)
        copied.to(torch.float32).to(DTYPE)
        assert same(copied(x), before)
        copied.load_state_dict(fast.state_dict(), assign=bool(assign))
        assert same(copied(x), after)
    assert not modules_called


def test_hooks_are_called(fast: FastBackbone, modules_called: list[Any]) -> None:
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    before = fast(x)
    seen: list[str] = []
    stage = fast.net.levels[3]
    block = stage.blocks[0]
    of_all = torch.nn.modules.module.register_module_forward_hook
    for name, register, hooked in [
        ("after", block.mlp.fc2.register_forward_hook, block.mlp.fc2),
        ("before", block.mlp.fc2.register_forward_pre_hook, block.mlp.fc2),
        ("of all modules", of_all, block),
    ]:
        modules_called.clear()

        def look(module: nn.Module, *_: Any, name: str = name, hooked: Any = hooked) -> None:
            if module is hooked:
                seen.append(name)

        handle = register(look)
        fast(x)
        handle.remove()
        assert seen.pop() == name
        assert not seen
        assert modules_called[-1] is stage
    stage.register_forward_hook(lambda *_: seen.append("stage"))
    modules_called.clear()
    assert same(fast(x), before)
    assert seen == ["stage"]
    assert not modules_called


@pytest.fixture
def model(tiny_arch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> MambaVision:
    """A network to be made fast, whose operators are kernels."""
    model = MambaVision(tiny_arch).to(DEVICE).eval()
    set_fused(monkeypatch, model, True)
    monkeypatch.setattr(straight, "fusible", lambda _: True)
    return model


class Adapter(nn.Module):
    """Around a layer, as those of adapters are, and with what they show of it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    weight = property(lambda self: self.layer.weight)
    bias = property(lambda self: self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 1


class Subclass(TokenStage):
    """Somebody's own."""


def adapt(model: MambaVision) -> None:
    block = model.levels[2].blocks[0]
    block.mlp.fc1 = Adapter(block.mlp.fc1)


def normalise_weights(model: MambaVision) -> None:
    nn.utils.parametrizations.weight_norm(model.levels[2].blocks[0].mlp.fc1)


def subclass(model: MambaVision) -> None:
    model.levels[2].__class__ = Subclass


def lower_rank(model: MambaVision) -> None:
    """Of one mixer: buffers and launches are for all of them."""
    stage = model.levels[2]
    stage.blocks = nn.ModuleList([stage.blocks[0], copy.deepcopy(stage.blocks[0])])
    mixer = stage.blocks[1].mixer
    rank = mixer.dt_proj.in_features - 1
    mixer.dt_proj = nn.Linear(rank, mixer.dim_inner, device=DEVICE)
    mixer.x_proj = nn.Linear(mixer.dim_inner, rank + 2 * D_STATE, False, DEVICE)


def fewer_heads(model: MambaVision) -> None:
    """Of one attention."""
    stage = model.levels[2]
    stage.window_mode = "fit"
    stage.blocks.append(copy.deepcopy(stage.blocks[1]))
    stage.blocks[2].mixer = Attention(64, 2).to(DEVICE)


def bias_of_in_proj(model: MambaVision) -> None:
    model.levels[2].blocks[0].mixer.in_proj = nn.Linear(64, 64, device=DEVICE)


def bias_of_out_proj(model: MambaVision) -> None:
    model.levels[2].blocks[0].mixer.out_proj = nn.Linear(64, 64, device=DEVICE)


def another_backend(model: MambaVision) -> None:
    """Of the second mixer."""
    stage = model.levels[2]
    stage.blocks = nn.ModuleList([stage.blocks[0], copy.deepcopy(stage.blocks[0])])
    stage.blocks[1].mixer.scan_backend = "reference"


def tanh_gelu(model: MambaVision) -> None:
    model.levels[2].blocks[0].mlp.act = nn.GELU(approximate="tanh")


def no_activation(model: MambaVision) -> None:
    model.levels[2].blocks[0].mlp.act = nn.Identity()


def norm_in_mlp(model: MambaVision) -> None:
    model.levels[2].blocks[0].mlp.norm = nn.LayerNorm(256, device=DEVICE)


def no_norm(model: MambaVision) -> None:
    model.levels[2].blocks[0].norm1 = nn.Identity()


def norm_without_weights(model: MambaVision) -> None:
    model.levels[2].blocks[0].norm2 = nn.LayerNorm(64, elementwise_affine=False)


def no_bias_of_fc1(model: MambaVision) -> None:
    model.levels[2].blocks[0].mlp.fc1 = nn.Linear(64, 256, bias=False, device=DEVICE)


def no_bias_of_qkv(model: MambaVision) -> None:
    model.levels[2].blocks[1].mixer.qkv = nn.Linear(64, 192, bias=False, device=DEVICE)


def no_qkv(model: MambaVision) -> None:
    mixer = model.levels[2].blocks[1].mixer
    mixer.packed = mixer.qkv
    del mixer.qkv
    mixer.forward = MethodType(lambda m, x, *_: (m.proj(m.packed(x)[..., :64]), None), mixer)


CHANGES = [adapt, normalise_weights, subclass, lower_rank, fewer_heads, another_backend]
CHANGES += [bias_of_in_proj, bias_of_out_proj, no_bias_of_fc1, no_bias_of_qkv, no_qkv]
CHANGES += [tanh_gelu, no_activation, norm_in_mlp, no_norm, norm_without_weights]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_other_layers(change: Any, model: MambaVision, modules_called: list[Any]) -> None:
    change(model)
    fast = FastBackbone(model, DTYPE, graphs=0)
    fast(torch.randn(1, 3, 64, 64, device=DEVICE))
    assert modules_called == [fast.net.levels[2]]


@pytest.mark.parametrize("order", ["0101", "10", "11"])
def test_blocks_in_another_order(order: str, model: MambaVision, modules_called: list[Any]) -> None:
    """0 is the mixer, 1 attention."""
    stage = model.levels[2]
    stage.window_mode = "fit"
    stage.blocks = nn.ModuleList([copy.deepcopy(stage.blocks[int(i)]) for i in order])
    fast = FastBackbone(model, DTYPE, graphs=0)
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    maps = fast(x)
    assert not modules_called
    assert same(maps, through_modules(fast, x))


def test_weights_that_lie_otherwise(fast: FastBackbone, modules_called: list[Any]) -> None:
    """Kernels that were compiled for others do not take them."""
    state = fast.state_dict()
    name = "net.levels.2.blocks.0.norm1.weight"
    memory = torch.zeros(1 + state[name].numel(), device=DEVICE, dtype=DTYPE)
    state[name] = memory[1:].copy_(state[name])
    name = "net.levels.3.blocks.0.mixer.A_log"  # nor in another order
    state[name] = state[name].t().contiguous().t()
    fast.load_state_dict(state, assign=True)
    fast(torch.randn(1, 3, 64, 64, device=DEVICE))
    assert modules_called == [*fast.net.levels[2:]]


def test_channels_that_the_scan_does_not_take_as_they_are(
    monkeypatch: pytest.MonkeyPatch, modules_called: list[Any]
) -> None:
    """Three for each half, and they are read in pairs."""
    monkeypatch.setattr(straight, "fusible", lambda _: True)
    stage = TokenStage(6, [0.0, 0.0], 2, 4, "fit", 4, None, "triton", False, False)
    fast = straight.StraightStage(stage.to(DEVICE, DTYPE).eval())
    x = torch.randn(2, 6, 4, 4, device=DEVICE, dtype=DTYPE)
    with torch.no_grad():
        assert fast(x).isfinite().all()
    assert modules_called == [fast]


def test_hooks_of_stages_are_kept(model: MambaVision) -> None:
    seen: list[int] = []
    model.levels[2].register_forward_hook(lambda *_: seen.append(2))
    FastBackbone(model, DTYPE, graphs=0)(torch.randn(1, 3, 64, 64, device=DEVICE))
    assert seen == [2]


@pytest.mark.parametrize("other", ["float32", "backend", "gradients", "replica", "autocast"])
def test_where_the_chain_is_not_meant_for(
    other: str, model: MambaVision, modules_called: list[Any]
) -> None:
    model.levels[2].blocks[0].mixer.scan_backend = "reference" if other == "backend" else "triton"
    fast = FastBackbone(model, torch.float32 if other == "float32" else DTYPE, graphs=0)
    stage = fast.net.levels[2]
    stage._is_replica = other == "replica"
    x = torch.randn(1, 64, 8, 8, device=DEVICE, dtype=fast.dtype)
    autocast = torch.autocast(DEVICE, DTYPE, enabled=other == "autocast")
    with torch.set_grad_enabled(other == "gradients"), autocast:
        stage(x)
    assert modules_called == [stage]


def test_compilers_exporters_and_counters_see_modules(
    fast: FastBackbone, modules_called: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(straight, "fusible", lambda _: not traced())
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    fast(x)
    assert not modules_called
    with FlopCounterMode(display=False):
        fast(x)
    assert len(modules_called) == 2

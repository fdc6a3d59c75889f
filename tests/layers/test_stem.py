"""The stem runs what is in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambavision_backbone.layers.stem import PatchEmbed


def _replaced(stem: PatchEmbed) -> None:
    stem.conv_down = nn.Conv2d(3, 8, 4, 4)  # type: ignore[assignment]


def _longer(stem: PatchEmbed) -> None:
    stem.conv_down.append(nn.Tanh())


def _patched(stem: PatchEmbed) -> None:
    layers = stem.conv_down
    layers.forward = lambda x: -nn.Sequential.forward(layers, x)  # type: ignore[method-assign]


def _hooked(stem: PatchEmbed) -> None:
    stem.conv_down.register_forward_hook(lambda _m, _x, y: 2 * y)


def _nothing(stem: PatchEmbed) -> None:
    pass


@pytest.mark.parametrize("change", [_nothing, _replaced, _longer, _patched, _hooked])
def test_whatever_it_is_made_of(change: Any) -> None:
    stem = PatchEmbed(3, 4, 8)
    change(stem)
    x = torch.randn(2, 3, 16, 16)

    def run(network: Any) -> Tensor:
        torch.manual_seed(0)
        return network(x)

    assert torch.equal(run(stem), run(stem.conv_down))

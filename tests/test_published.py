"""The adapter for configs in the published argument style."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mambavision_backbone import MambaVision, MM_mamba_vision

# The backbone of a published detection config: the published names, and what mmdet's merging of a
# ResNet base config leaves in it.
PUBLISHED: dict[str, Any] = dict(
    dim=80,
    in_dim=32,
    depths=(1, 3, 8, 4),
    window_size=(8, 8, 112, 56),
    mlp_ratio=4,
    num_heads=(2, 4, 8, 16),
    drop_path_rate=0.3,
    norm_layer="ln2d",
    layer_scale=None,
    out_indices=(0, 1, 2, 3),
)
INHERITED: dict[str, Any] = dict(
    depth=50,
    num_stages=4,
    frozen_stages=1,
    norm_cfg=dict(type="BN", requires_grad=True),
    norm_eval=True,
    style="pytorch",
    init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
)


def test_published_config_builds_the_same_network_and_its_checkpoint_loads(tmp_path: Path) -> None:
    windows = (8, 8, 14, 7)  # those of detection, padded, would only cost time here
    arguments = {**PUBLISHED, "window_size": windows}
    with pytest.warns(UserWarning, match="no effect"):
        published = MM_mamba_vision(**arguments, **INHERITED).eval()
    file = tmp_path / "published.pth"
    torch.save({"state_dict": published.state_dict()}, file)
    ours = MambaVision(
        "T",
        window_size=windows,
        init_cfg=dict(type="Pretrained", checkpoint=str(file)),
    ).eval()
    assert list(published.state_dict()) == list(ours.state_dict())
    ours.init_weights()
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(published(x), ours(x), strict=True):
        assert torch.equal(a, b)


def test_each_ignored_argument_is_named_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = MM_mamba_vision(**PUBLISHED, **INHERITED)
    messages = [str(w.message) for w in caught if "no effect" in str(w.message)]
    ignored = ["drop_path_rate", *INHERITED]
    assert len(messages) == len(ignored)
    for name in ignored:
        assert sum(f": {name}=" in m for m in messages) == 1, name
    assert all(p.requires_grad for p in model.parameters())  # frozen_stages=1 had no effect
    assert model.levels[3].blocks[-1].drop_path_rate == 0.2  # nor had 0.3
    assert model.init_cfg is None


def test_plain_config_does_not_warn() -> None:
    arguments = {k: v for k, v in PUBLISHED.items() if k != "drop_path_rate"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MM_mamba_vision(**arguments)


def test_pretrained_becomes_init_cfg() -> None:
    with pytest.warns(UserWarning, match="no effect"):
        model = MM_mamba_vision(**PUBLISHED, pretrained="tiny.pth")
    assert model.init_cfg == {"type": "Pretrained", "checkpoint": "tiny.pth"}
    with pytest.raises(FileNotFoundError, match=r"tiny\.pth"):
        model.init_weights()


def test_layer_scale_and_norm_layer() -> None:
    model = MM_mamba_vision(
        **{**PUBLISHED, "layer_scale": 1e-5, "norm_layer": "bn", "drop_path_rate": None}
    )
    assert model.levels[2].blocks[0].gamma_1.unique().item() == pytest.approx(1e-5)
    assert isinstance(model.outnorm0, torch.nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_layer": "gn"}, "unknown norm_layer 'gn'"),
        ({"qkv_bias": False}, "qkv_bias=False is not supported"),
        ({"attn_drop_rate": 0.1}, "attn_drop_rate=0.1 is not supported"),
        ({"depths": (1, 3, 0, 4)}, "depths must be"),
    ],
)
def test_what_cannot_be_reproduced_is_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MM_mamba_vision(**{**PUBLISHED, "drop_path_rate": None, **change})


def test_unknown_argument_is_an_error() -> None:
    with pytest.raises(TypeError, match="dims"):
        MM_mamba_vision(**PUBLISHED, dims=3)

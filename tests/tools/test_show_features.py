"""What is shown of a network is what the network does, and every way the input can be wrong."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor

from mambavision_backbone import VARIANTS, Arch, MambaVision
from mambavision_backbone.layers.windows import window_grid
from tests.conftest import ROOT, TINY_ARCH

sys.path.append(str(ROOT / "tools"))
tool: Any = importlib.import_module("show_features")
ToolError = importlib.import_module("common").ToolError

HW = (50, 90)
# An attention block that is the stage's last, so that it may crop, and one that is not.
ARCH = {**TINY_ARCH, "depths": (1, 1, 4, 2)}


def attend_all(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (windows, heads, L, L) and output (windows, L, C) by loops over windows and heads."""
    count, length, dim = tokens.shape
    heads, width = attention.num_heads, dim // attention.num_heads
    qkv = tokens.double() @ attention.qkv.weight.double().T + attention.qkv.bias.double()
    weights = torch.empty(count, heads, length, length, dtype=torch.float64)
    mixed = torch.empty(count, length, dim, dtype=torch.float64)
    for n in range(count):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            q, k, v = (qkv[n, :, i * dim :][:, part] for i in range(3))
            exps = (q @ k.T / width**0.5).exp()
            weights[n, h] = exps / exps.sum(1, keepdim=True)
            mixed[n, :, part] = weights[n, h] @ v
    return weights, mixed @ attention.proj.weight.double().T + attention.proj.bias.double()


# Positions in the first window, in another one, and in the last, which padding cuts. The maps are
# of 7×13 in windows of 5 (pad: 3 rows and 2 columns; fit: 4×5, 1 and 2), and of 4×7 in windows of 3
# or, with padding that every window has and so is dropped by the last block, of 9.
@pytest.mark.parametrize(
    ("stage", "block", "window", "position"),
    [
        (3, 4, 5, (1, 2)),
        (3, 3, 5, (3, 7)),
        (3, 4, 5, (6, 12)),
        (4, 2, 3, (3, 6)),
        (4, 2, 9, (2, 5)),
    ],
    ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else str(v),
)
@pytest.mark.parametrize("mode", ["pad", "fit"])
def test_attention_is_the_networks(
    stage: int, block: int, window: int, position: tuple[int, int], mode: str
) -> None:
    windows = (8, 8, window, window)
    backbone = MambaVision(ARCH, window_size=windows, window_mode=mode).eval()
    attention: Any = backbone.levels[stage - 1].blocks[block - 1].mixer  # type: ignore
    torch.nn.init.normal_(attention.qkv.weight, std=0.3)  # attention far from uniform
    outputs: list[Tensor] = []
    attention.register_forward_hook(lambda *call: outputs.append(call[2]))
    maps, tokens = tool.run_backbone(backbone, torch.randn(1, 3, 100, 200), [attention])
    hw = maps[stage - 1].shape[2:]
    grid = window_grid(hw, window, mode)
    assert hw == ((7, 13) if stage == 3 else (4, 7))
    (rows, cols), (height, width) = grid.counts, grid.size
    reference, output = attend_all(attention, tokens[attention])

    row, col = position
    number = row // height * cols + col // width
    local = (row % height, col % width)
    index = local[0] * width + local[1]
    weights = tool.attention_row(attention, tokens[attention][number], index)
    torch.testing.assert_close(weights.double(), reference[number, :, index], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights.sum(1), torch.ones(attention.num_heads))
    assert weights.std() > 0.1 / weights.shape[1]

    # The module's own output of that position, which lies elsewhere where padding was dropped.
    kept_width = (
        grid.crop()[1].size[1] if block == len(backbone.levels[stage - 1].blocks) else width
    )
    out, bias = outputs[0]
    out = out if bias is None else out + bias
    real = out[number, local[0] * kept_width + local[1]].double()
    torch.testing.assert_close(output[number, index], real, rtol=1e-5, atol=1e-5)
    values = attention.qkv(tokens[attention][number]).chunk(3, dim=1)[2]
    mixed = torch.einsum("hl,lhd->hd", weights, values.unflatten(1, (attention.num_heads, -1)))
    torch.testing.assert_close(attention.proj(mixed.flatten()).double(), real, rtol=1e-5, atol=1e-5)

    # On the map, position by position.
    expected = torch.zeros(hw, dtype=torch.float64)
    for r in range(hw[0]):
        for c in range(hw[1]):
            if r // height == row // height and c // width == col // width:
                other = r % height * width + c % width
                expected[r, c] = reference[number, :, index, other].mean()
    shown = tool.attention_map(attention, tokens[attention], grid, position)
    torch.testing.assert_close(shown.double(), expected, rtol=1e-4, atol=1e-6)
    padded = (row // height + 1) * height > hw[0] or (col // width + 1) * width > hw[1]
    assert (shown.sum() < 0.999) == padded
    assert rows * cols == len(tokens[attention])


def test_maps_are_the_returned_ones_before_their_norm() -> None:
    backbone = MambaVision(ARCH, out_indices=(0, 2)).eval()
    x = torch.randn(1, 3, *HW)
    maps, _ = tool.run_backbone(backbone, x)
    assert len(maps) == 3
    for i, returned in zip((0, 2), backbone(x), strict=True):
        torch.testing.assert_close(getattr(backbone, f"outnorm{i}")(maps[i]), returned)
    assert not backbone.levels[0]._forward_hooks


def test_gradient_is_that_of_the_objective() -> None:
    """Central differences at two pixels, in float64."""
    backbone = MambaVision(TINY_ARCH).double().eval().requires_grad_(False)
    x = torch.randn(1, 3, 40, 48, dtype=torch.float64, requires_grad=True)
    gradients = [tool.image_gradient(y, x) for y in tool.run_backbone(backbone, x)[0]]
    assert [g.shape for g in gradients] == [(40, 48)] * 4
    step = 1e-4
    for row, col in ((0, 0), (17, 30)):
        total = torch.zeros(4, dtype=torch.float64)
        for channel in range(3):
            change = torch.zeros_like(x)
            change[0, channel, row, col] = step
            ends = [
                torch.stack([y.pow(2).mean() for y in tool.run_backbone(backbone, moved)[0]])
                for moved in (x.detach() + change, x.detach() - change)
            ]
            total += (ends[0] - ends[1]).abs() / (2 * step)
        found = torch.stack([g[row, col] for g in gradients])
        torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-9)


def test_principal_components() -> None:
    """Three directions of falling strength come back in their order, up to sign and offset."""
    signals = torch.randn(30, 3, dtype=torch.float64)
    signals = torch.linalg.qr(signals - signals.mean(0))[0]
    directions = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0]
    strengths = torch.tensor([9.0, 4.0, 2.0], dtype=torch.float64)
    features = (signals * strengths) @ directions.T + torch.randn(8, dtype=torch.float64)
    found = tool.principal_components(features.T.reshape(1, 8, 5, 6))
    assert found.shape == (5, 6, 3)
    for i in range(3):
        expected = signals[:, i] * strengths[i]
        expected *= torch.sign(expected[0] * found.reshape(30, 3)[0, i])
        torch.testing.assert_close(found.reshape(30, 3)[:, i], expected)


def test_positions_are_drawn_where_they_are() -> None:
    values = torch.arange(6.0).view(2, 3)
    drawn = tool.enlarge(values, 4, (7, 9))
    assert drawn.shape == (7, 9)
    assert all(drawn[y, x] == values[y // 4, x // 4] for y in range(7) for x in range(9))


def test_points_move_with_the_image() -> None:
    image = np.zeros((100, 300, 3), np.uint8)
    small, points = tool.shrink(image, [(0, 0), (299, 99), (150, 30)], 60)
    assert small.shape == (20, 60, 3)
    assert points == [(0, 0), (59, 19), (30, 6)]
    assert tool.shrink(image, [(299, 99)], 400)[1] == [(299, 99)]
    assert tool.shrink(image, [(299, 99)], 1)[0].shape == (1, 1, 3)


def test_window_is_framed() -> None:
    """Windows of 2×2 positions of 32 pixels; the second of the upper row is cut by the border."""
    grid = window_grid((3, 3), 2, "pad")
    image = np.zeros((80, 90, 3), np.uint8)
    drawn = tool.show_attention(torch.zeros(3, 3), grid, 32, (78, 30), image)
    white = (drawn == 255).all(2)
    assert white[[0, 63], 64:].all()
    assert white[:64, [64, 89]].all()
    assert not white[64:].any()
    assert not white[:, :64].any()
    assert drawn[25:36, 73:84].any()  # the point


def write_image(folder: Path) -> Path:
    """A picture whose sides no stride divides."""
    path = folder / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (*HW, 3), dtype=np.uint8)
    cv2.imwrite(str(path), pixels)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_image(tmp_path)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's segmenter, narrower: config.py, and the whole model's model.pth."""
    folder = tmp_path_factory.mktemp("segmenter")
    cfg = Config.fromfile(ROOT / "mmseg_configs" / "upernet_mambavision_demo.py")
    cfg.model.backbone.arch = TINY_ARCH
    cfg.model.decode_head.update(in_channels=[16, 32, 64, 128], channels=16)
    cfg.model.auxiliary_head.update(in_channels=64, channels=16)
    cfg.model.backbone.compile = True  # must not matter
    cfg.dump(folder / "config.py")
    cfg.model.backbone.compile = False
    init_default_scope(cfg.default_scope)
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, folder / "model.pth")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the tool on a CPU; its T is narrow."""
    monkeypatch.setitem(VARIANTS, "T", Arch(**ARCH))
    words = [str(argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["show_features.py", *words, "--device", "cpu"])
    tool.main()


def names_of(points: list[tuple[int, int]], blocks: dict[int, int]) -> list[str]:
    """The files that are to be written, in their order."""
    names = []
    for stage in range(1, 5):
        names += [f"stage{stage}_{kind}.png" for kind in ("norm", "pca", "gradient")]
        for x, y in points if stage in blocks else ():
            names.append(f"stage{stage}_block{blocks[stage]}_attention_{x}_{y}.png")
    return [*names, "overview.png"]


def check_files(out: Path, names: list[str], hw: tuple[int, int], printed: str) -> None:
    assert printed.split() == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for name in names:
        picture = cv2.imread(str(out / name))
        assert picture.std() > 1
        assert name == "overview.png" or picture.shape == (*hw, 3)


def test_backbone_alone(
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A shrunk image, two points, and the block given for one of the stages."""
    positions = []
    attention_map = tool.attention_map

    def spy(*arguments: Any) -> Tensor:
        positions.append(arguments[3])
        return attention_map(*arguments)

    monkeypatch.setattr(tool, "attention_map", spy)
    out = tmp_path / "out" / "new"
    points = ["--point", 0, 0, "--point", 89, 49, "--point", 0, 0]
    blocks = ["--block", 3, 3]
    run(monkeypatch, image, "--arch", "T", "--out", out, "--max-size", 45, *points, *blocks)
    captured = capsys.readouterr()
    assert "RANDOM" in captured.err
    check_files(out, names_of([(0, 0), (89, 49)], {3: 3, 4: 2}), (25, 45), captured.out)
    assert positions == [(0, 0), (1, 2), (0, 0), (0, 1)]


@pytest.mark.parametrize("mode", ["pad", "fit"])
def test_segmenter(
    segmenter: Path,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
) -> None:
    """Its backbone sees the image normalised as its data preprocessor does it, and its weights."""
    seen: list[Tensor] = []
    kept: list[MambaVision] = []
    run_backbone = tool.run_backbone

    def spy(backbone: MambaVision, x: Tensor, *rest: Any) -> Any:
        kept.append(backbone)
        maps, tokens = run_backbone(backbone, x, *rest)
        seen.extend([x, maps[0]])
        return maps, tokens

    monkeypatch.setattr(tool, "run_backbone", spy)
    config, weights = segmenter / "config.py", segmenter / "model.pth"
    arguments = ["--config", config, "--weights", weights, "--window-mode", mode]
    run(monkeypatch, image, *arguments, "--out", tmp_path / "out")
    captured = capsys.readouterr()
    assert "RANDOM" not in captured.err
    check_files(tmp_path / "out", names_of([(45, 25)], {3: 2, 4: 2}), HW, captured.out)

    cfg = Config.fromfile(config)
    bgr = torch.from_numpy(cv2.imread(str(image))).permute(2, 0, 1)
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    expected = preprocessor({"inputs": [bgr], "data_samples": None})["inputs"]
    torch.testing.assert_close(seen[0].detach(), expected)
    colors = tool.stretch(tool.enlarge(tool.principal_components(seen[1]), 4, HW))
    written = cv2.imread(str(tmp_path / "out" / "stage1_pca.png"))[..., ::-1]
    np.testing.assert_array_equal(written, (255 * colors).round())
    assert kept[0].levels[2].window_mode == mode
    state = torch.load(weights)["state_dict"]
    for name, weight in kept[0].state_dict().items():
        assert torch.equal(weight, state[f"backbone.{name}"]), name


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, segmenter: Path) -> Path:
    """A folder of inputs that are wrong, each in its own way, and of some that are not."""
    folder = tmp_path_factory.mktemp("inputs")
    write_image(folder)
    (folder / "text.png").write_text("not an image")
    (folder / "nothing.py").write_text("default_scope = 'mmseg'\n")
    cfg = Config.fromfile(segmenter / "config.py")
    cfg.dump(folder / "config.py")
    cfg.model.backbone.in_channels = 4
    cfg.dump(folder / "four.py")
    cfg.model.backbone = dict(type="mmseg.ResNet", depth=18)
    cfg.dump(folder / "resnet.py")
    model = torch.load(segmenter / "model.pth")
    model["state_dict"].pop("backbone.levels.3.blocks.1.mixer.qkv.bias")
    torch.save(model, folder / "bad.pth")
    return folder


WRONG = {
    "no image": ("no.png --arch T", r"image 'no\.png' does not exist"),
    "not an image": ("text.png --arch T", r"cannot read text\.png: not an image\. Give an image"),
    "x": ("picture.png --arch T --point 90 3", r"--point 90 3 is .* X in 0\.\.89 and Y in 0\.\.49"),
    "y": ("picture.png --arch T --point 3 -1", "--point 3 -1 is outside the image: give X in 0"),
    "no config": ("picture.png --config no.py", r"config 'no\.py' does not exist"),
    "no backbone": ("picture.png --config nothing.py", "nothing.py has no backbone: give a detec"),
    "another": ("picture.png --config resnet.py", "is a ResNet: .* with type='MambaVision'"),
    "channels": ("picture.png --config four.py", r"four\.py must have in_channels=3"),
    "mixer": ("picture.png --arch T --block 3 2", "--block 3 2 .* these have: 3 3, 3 4, 4 2$"),
    "block": (
        "picture.png --arch T --block 3 9",
        "--block 3 9 has no attention, but these have: 3 3",
    ),
    "stage": (
        "picture.png --arch T --block 2 1",
        "--block 2 1 has no attention, but these have: 3 3",
    ),
    "no weights": ("picture.png --arch T --weights no.pth", r"'no\.pth' does not exist"),
    "missing": (
        "picture.png --config config.py --weights bad.pth",
        r"bad\.pth' .*missing: .*qkv\.bias",
    ),
    "other": ("picture.png --arch T --weights bad.pth", "bad.pth' does not fit this backbone"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(inputs)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments.split(), "--out", tmp_path / "out")
    assert re.match(f"error: .*{message}", str(caught.value), re.DOTALL)
    assert not (tmp_path / "out").exists()


def test_a_backbone_without_attention() -> None:
    """Stages of one block have a mixer only, and stages behind the last map are not run."""
    backbone = MambaVision({**TINY_ARCH, "depths": (1, 1, 1, 2)}, out_indices=(0, 1, 2))
    assert tool.choose_blocks(backbone, []) == {}
    with pytest.raises(ToolError, match=r"--block 4 2 .* these have: none"):
        tool.choose_blocks(backbone, [(4, 2)])


@pytest.mark.parametrize("arguments", [[], ["--arch", "T", "--config", "c.py"]], ids=str)
def test_one_network_is_given(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, image, "--out", tmp_path / "out", *arguments)


@pytest.mark.gpu
def test_on_a_gpu(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, gradients and attention are the CPU's; components may turn where two are as strong."""
    names = [name for name in names_of([(45, 25)], {3: 8, 4: 4})[:-1] if "pca" not in name]
    pictures = []
    for device in ("cpu", "cuda"):
        words = [str(image), "--arch", "T", "--out", str(tmp_path / device), "--device", device]
        monkeypatch.setattr(sys, "argv", ["show_features.py", *words])
        tool.main()
        pictures.append([cv2.imread(str(tmp_path / device / name)).astype(int) for name in names])
    for ours, theirs in zip(*pictures, strict=True):
        assert np.abs(ours - theirs).mean() < 2

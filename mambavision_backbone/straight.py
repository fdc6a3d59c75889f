"""Stages of tokens for inference on a GPU, as straight-line code.

Kernel by kernel, the way from module to module takes Python longer than what it comes to takes the
host to start and the GPU to run. Here that way has been gone once, and what is left of it is a
chain of calls on rows of tokens: by the same kernels, hence to the same maps. Blocks work in the
same buffers, one after the other, so that kernels are launched on the same tensors but for weights:
how, is settled once for a shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from .layers.attention import Attention
from .layers.blocks import Branch, TokenBlock
from .layers.mixer import MambaVisionMixer
from .layers.stage import TokenStage
from .layers.windows import merge, partition
from .ops.plain import global_hooks, own_forward
from .ops.selective_scan import choose_backend
from .ops.triton_support import Launch, aligned, fusible

if TYPE_CHECKING:
    from .ops.selective_scan.triton.launch import ScanLaunch

# What blocks are made of; adapters and quantised or parametrised layers do something else.
_USUAL: dict[type[nn.Module], dict[str, type[nn.Module]]] = {
    MambaVisionMixer: {
        "in_proj": nn.Linear,
        "conv1d_x": nn.Conv1d,
        "conv1d_z": nn.Conv1d,
        "x_proj": nn.Linear,
        "dt_proj": nn.Linear,
        "out_proj": nn.Linear,
    },
    Attention: {"qkv": nn.Linear, "proj": nn.Linear},
    Mlp: {
        "fc1": nn.Linear,
        "act": nn.GELU,
        "drop1": nn.Dropout,
        "norm": nn.Identity,
        "fc2": nn.Linear,
        "drop2": nn.Dropout,
    },
}
_MAX_SHAPES = 1000  # of which launches are kept; then they are forgotten


class StraightStage(TokenStage):
    """Another stage for inference, (B, C, H, W) → same; it takes its modules, hooks included.

    Through the modules, as there, where kernels of ours cannot be used, in float32, under autocast,
    for compilers and exporters, in replicas of nn.DataParallel, and where modules have hooks, are
    not the usual ones or not alike. Weights of the stage may be changed in place; the stage as a
    whole may be loaded, cast and moved. Other weights or layers in their places are not noticed.
    """

    def __init__(self, stage: TokenStage) -> None:
        self.__dict__.update(stage.__dict__)
        self.register_load_state_dict_post_hook(_chain_anew)
        self._set_chain()

    def forward(self, x: Tensor) -> Tensor:
        """Cut into windows, run the blocks, put back."""
        if not self._straight(x):
            return super().forward(x)
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return self.forward(x)
        tokens, grid = partition(x, self.window_size, self.window_mode)
        if not (self._scans_by_triton(tokens) and _kernels().takes(tokens)):
            return super().forward(x)
        keep, grid = grid.crop()
        tokens = tokens.contiguous()
        tokens = tokens if aligned(tokens) else tokens.clone()
        tokens, branch = self._run_chain(tokens, self._chain if keep is None else self._chain[:-1])
        if keep is not None:
            tokens, branch = self.blocks[-1](tokens, branch, keep)
        assert branch is not None  # there is a block
        return merge(branch.add_to(tokens), grid)

    def _run_chain(self, tokens: Tensor, chain: list[_Block]) -> tuple[Tensor, Branch | None]:
        key = (tokens.shape, tokens.device)
        if key not in self._launches and len(self._launches) >= _MAX_SHAPES:
            self._launches.clear()
        launches = self._launches.setdefault(key, _Launches())
        width = max((block.width for block in chain), default=0)
        rows = _Rows(tokens, width, launches)
        for block in chain:
            block(rows)
        return rows.tokens()

    def _straight(self, x: Tensor) -> bool:
        return (
            len(self._chain) > 0
            and fusible(x)
            and x.dtype == self._chain[0].norm1[0].dtype != torch.float32
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and not (any(self._hooks) or global_hooks())
            and not getattr(self, "_is_replica", False)  # weights not its own
        )

    def _scans_by_triton(self, tokens: Tensor) -> bool:
        backends = {m.scan_backend: m.A_log for m in self._mixers}
        return all(choose_backend(b, tokens, A) == "triton" for b, A in backends.items())

    def _set_chain(self) -> None:
        modules = list(self.blocks.modules())
        self._mixers = [m for m in modules if isinstance(m, MambaVisionMixer)]
        usual = (
            all(map(_is_usual, self.blocks))
            and all(map(own_forward, modules))
            and all(p.is_contiguous() for p in self.blocks.parameters())
        )
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        chain = [_Block.of(block) for block in self.blocks] if usual else []
        self._chain = chain if _alike(chain) else []
        self._launches: dict[Any, _Launches] = {}

    def _apply(self, *args: Any, **kwargs: Any) -> StraightStage:
        """Move or cast; the chain holds views of the weights."""
        super()._apply(*args, **kwargs)
        self._set_chain()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the chain out of copies."""
        return {**self.__dict__, "_chain": [], "_hooks": [], "_mixers": [], "_launches": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make it anew."""
        super().__setstate__(state)
        self._set_chain()


def _chain_anew(stage: nn.Module, _keys: Any) -> None:
    """Loading may have replaced weights; the stage that this one was made of has the hook, too."""
    if isinstance(stage, StraightStage):
        stage._set_chain()


def _is_usual(block: nn.Module) -> bool:
    """Whether a block is made of what it was made of, with weights where ``_Block`` wants them."""
    if not (type(block) is TokenBlock and type(block.mixer) in (MambaVisionMixer, Attention)):
        return False
    places = {"norm1": nn.LayerNorm, "mixer": type(block.mixer), "norm2": nn.LayerNorm, "mlp": Mlp}
    mixer: Any = block.mixer
    if _children(block) != places or _children(mixer) != _USUAL[type(mixer)]:
        return False
    if type(mixer) is MambaVisionMixer:
        with_bias = {mixer.dt_proj}
        without: set[Any] = {mixer.in_proj, mixer.x_proj, mixer.out_proj}
    else:
        with_bias, without = {mixer.qkv}, set()
    norms = block.norm1, block.norm2
    return (
        _children(block.mlp) == _USUAL[Mlp]
        and all(m.bias is not None for m in (block.mlp.fc1, *with_bias, *norms))
        and all(m.weight is not None for m in norms)
        and not any(m.bias is not None for m in without)
        and block.mlp.act.approximate == "none"
    )


def _children(module: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(child) for name, child in module.named_children()}


def _alike(chain: Sequence[_Block]) -> bool:
    """Whether the first block's launches and buffers are those of all blocks."""
    tensors = list(_tensors(chain))
    mixers = {
        tuple(t.shape for t in _tensors(b.mixer)) for b in chain if isinstance(b.mixer, _Mixer)
    }
    heads = {b.mixer.heads for b in chain if isinstance(b.mixer, _Attention)}
    return (
        len({(t.dtype, t.device) for t in tensors}) < 2
        and len(mixers) < 2
        and len(heads) < 2
        and all(map(aligned, tensors))
    )


def _tensors(parts: Any) -> Iterator[Tensor]:
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, tuple):
            yield from _tensors(part)


@functools.cache
def _kernels() -> Any:
    """Triton is loaded at first use."""
    from .ops.conv_silu.launch import forward_launch as conv_silu
    from .ops.layer_norm.launch import forward_launch as norm
    from .ops.mix.launch import parameters, split_BC
    from .ops.selective_scan.triton.launch import ScanLaunch, takes

    return SimpleNamespace(
        conv_silu=conv_silu,
        norm=norm,
        parameters=parameters,
        scan=ScanLaunch,
        split_BC=split_BC,
        takes=takes,
    )


class _Launches:
    """On buffers for tokens of one shape; each is made when it is first wanted."""

    def __init__(self) -> None:
        self.norms: dict[Any, Launch] = {}
        self.conv_silu: Launch | None = None
        self.scan: ScanLaunch | None = None


class _Rows:
    """Tokens (B·windows, L, C) as rows, on their way through the blocks.

    ``normed`` is what a branch starts from, ``y`` what it comes to, to be added to the stream once
    ``late``, a bias and gamma, are. In between branches work in one buffer, ``width`` a row.
    """

    def __init__(self, tokens: Tensor, width: int, launches: _Launches) -> None:
        self.shape = tokens.shape
        self.stream = tokens.flatten(0, 1)
        self.normed, self.y, self._sum = (torch.empty_like(self.stream) for _ in range(3))
        self.late: tuple[Tensor | None, Tensor | None] | None = None
        self._buffer = tokens.new_empty(len(self.stream) * width)
        self._views: dict[Any, Any] = {}
        self.launches = launches

    def cut(self, *widths: int) -> list[Tensor]:
        """The buffer as tensors of so many columns."""
        sizes = [len(self.stream) * width for width in widths]
        parts = self._buffer[: sum(sizes)].split(sizes)
        return [part.view(-1, width) for part, width in zip(parts, widths, strict=True)]

    def work(self, make: Callable[..., Any], *sizes: Any) -> Any:
        """What a kind of branch works in: views of the buffer, made once a pass."""
        key = make, sizes
        if key not in self._views:
            self._views[key] = make(self, *sizes)
        return self._views[key]

    def norm(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        """Add what the branch came to; ``normed`` is the sum's norm."""
        late = self.late
        given = late is not None, *(t is not None for t in late or (None, None)), False
        start = self.launches.norms.get((given, eps))
        if start is None:
            rows, channels = self.stream.shape
            start = _kernels().norm(rows, 1, channels, eps, given, False)
            self.launches.norms[given, eps] = start
        x, normed = self.stream, self.normed
        if late is None:
            start(x, None, None, None, None, weight, bias, x, normed, None, None)
        else:  # what came in is left alone; behind the first sum it and the stream are one
            start(x, self.y, *late, None, weight, bias, self._sum, normed, None, None)
            self.stream = self._sum

    def tokens(self) -> tuple[Tensor, Branch | None]:
        """The stream, and what is to be added to it."""
        if self.late is None:
            return self.stream.view(self.shape), None
        return self.stream.view(self.shape), Branch(self.y.view(self.shape), *self.late, None)


class _Block(NamedTuple):
    """What ``TokenBlock`` does to rows."""

    norm1: tuple[Tensor, Tensor, float]
    mixer: _Mixer | _Attention
    gamma_1: Tensor | None
    norm2: tuple[Tensor, Tensor, float]
    mlp: _Mlp
    gamma_2: Tensor | None
    width: int  # of its work, at most

    @classmethod
    def of(cls, block: Any) -> _Block:
        """Pick what is needed."""
        attends = isinstance(block.mixer, Attention)
        mixer = _Attention.of(block.mixer) if attends else _Mixer.of(block.mixer)
        mlp = _Mlp.of(block.mlp)
        return cls(
            (block.norm1.weight, block.norm1.bias, block.norm1.eps),
            mixer,
            block.gamma_1,
            (block.norm2.weight, block.norm2.bias, block.norm2.eps),
            mlp,
            block.gamma_2,
            max(mixer.width, mlp.width),
        )

    def __call__(self, rows: _Rows) -> None:
        rows.norm(*self.norm1)
        rows.late = self.mixer(rows), self.gamma_1
        rows.norm(*self.norm2)
        rows.late = self.mlp(rows), self.gamma_2


class _MixerWork:
    def __init__(self, rows: _Rows, widths: tuple[int, ...], rank: int, dstate: int) -> None:
        batch, seqlen, _ = rows.shape
        self.xz, self.yz, self.x, self.dt, dt_BC = rows.cut(*widths)
        self.dt_BC = dt_BC[:, rank % 2 :]
        self.low = self.dt_BC[:, :rank]
        self.y, self.z = self.yz.view(rows.shape).chunk(2, 2)
        u, dt = (x.view(batch, seqlen, -1) for x in (self.x, self.dt))
        self.scanned = u, dt, *_kernels().split_BC(self.dt_BC, batch, rank, dstate)


class _Mixer(NamedTuple):
    in_proj: Tensor
    convs: tuple[Tensor, Tensor]
    x_proj: Tensor
    dt_proj: Tensor
    scan: tuple[Tensor, Tensor, Tensor]  # log(-A), D, bias of dt
    out_proj: Tensor
    rank: int  # of dt
    widths: tuple[int, ...]  # of xz, yz, x, dt, dt_BC

    @classmethod
    def of(cls, layer: MambaVisionMixer) -> _Mixer:
        channels, dim, rank = layer.in_proj.in_features, layer.dim_inner, layer.dt_proj.in_features
        low = rank % 2 + layer.x_proj.out_features  # B and C at even addresses, as ops.mix
        return cls(
            layer.in_proj.weight.t(),
            (layer.conv1d_x.weight, layer.conv1d_z.weight),
            layer.x_proj.weight.t(),
            layer.dt_proj.weight.t(),
            (layer.A_log, layer.D, layer.dt_proj.bias),
            layer.out_proj.weight.t(),
            rank,
            (channels, channels, dim, dim, low),
        )

    @property
    def width(self) -> int:
        return sum(self.widths)

    def __call__(self, rows: _Rows) -> None:
        work = rows.work(_MixerWork, self.widths, self.rank, self.scan[0].shape[1])
        torch.mm(rows.normed, self.in_proj, out=work.xz)
        self._conv_silu(rows.launches, work)
        torch.mm(work.x, self.x_proj, out=work.dt_BC)
        torch.mm(work.low, self.dt_proj, out=work.dt)
        self._scan(rows.launches, work)
        torch.mm(work.yz, self.out_proj, out=rows.y)

    def _conv_silu(self, launches: _Launches, work: _MixerWork) -> None:
        u = work.scanned[0]
        if launches.conv_silu is None:
            strides = work.xz.stride(0), u.stride(1), work.z.stride(1)
            launches.conv_silu = _kernels().conv_silu(
                len(work.x), u.shape[1], u.shape[2], strides, 2
            )
        launches.conv_silu(work.xz, *self.convs, u, work.z)

    def _scan(self, launches: _Launches, work: _MixerWork) -> None:
        tensors = *work.scanned, _kernels().parameters(*self.scan), work.y
        if launches.scan is None:
            launches.scan = _kernels().scan.of(*tensors)
        launches.scan(*tensors)


class _AttentionWork:
    def __init__(self, rows: _Rows, heads: tuple[int, int]) -> None:
        batch, seqlen, channels = rows.shape
        (self.qkv,) = rows.cut(3 * channels)
        views = self.qkv.view(batch, seqlen, 3, *heads).permute(2, 0, 3, 1, 4)
        self.q, self.k, self.v = views.unbind()


class _Attention(NamedTuple):
    qkv: tuple[Tensor, Tensor]
    proj: tuple[Tensor, Tensor]
    heads: tuple[int, int]

    @classmethod
    def of(cls, layer: Attention) -> _Attention:
        return cls(_linear(layer.qkv), _linear(layer.proj), (layer.num_heads, layer.head_dim))

    @property
    def width(self) -> int:
        return self.qkv[0].shape[1]

    def __call__(self, rows: _Rows) -> Tensor:
        work = rows.work(_AttentionWork, self.heads)
        weight, bias = self.qkv
        torch.addmm(bias, rows.normed, weight, out=work.qkv)
        y = F.scaled_dot_product_attention(work.q, work.k, work.v)
        weight, bias = self.proj
        torch.mm(y.transpose(1, 2).reshape(rows.y.shape), weight, out=rows.y)
        return bias


class _Mlp(NamedTuple):
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, layer: Any) -> _Mlp:
        return cls(_linear(layer.fc1), _linear(layer.fc2))

    @property
    def width(self) -> int:
        return self.fc1[0].shape[1]

    def __call__(self, rows: _Rows) -> Tensor:
        (x,) = rows.work(_Rows.cut, self.width)
        weight, bias = self.fc1
        torch._addmm_activation(bias, rows.normed, weight, use_gelu=True, out=x)  # as ops.mlp
        weight, bias = self.fc2
        torch.mm(x, weight, out=rows.y)
        return bias


def _linear(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight, transposed, and bias."""
    return layer.weight.t(), layer.bias

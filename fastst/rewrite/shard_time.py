"""Long clips over several ranks: each holds some of the frames, and fetches those it lacks.

Context parallelism along time. A sharded model is the same modules with the same parameters; what
reaches across time has been taught to exchange frames, statistics or sums with the other ranks of
a mesh, forward and backward. Parameters stay replicated, and their gradients are to be averaged
over the mesh, as ``DistributedDataParallel`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..backends.conv_pass import pad
from ..backends.ranks import Sum, ranks_of
from ..dispatch.without_trace import without_trace
from ..functional import conv3d
from ..nn.conv3d import Conv3d
from ..nn.layers import Conv2Plus1d, ParallelConv2Plus1d
from ..nn.sync_batch_norm import SyncBatchNorm, sync_batch_norm
from ..problem.geometry import left_padding
from .frames import Window, read_frames

__all__ = [
    "SyncBatchNorm",
    "gather_time",
    "shard_time",
    "split_time",
    "sync_batch_norm",
    "unshard_time",
]

# Leaves that treat every frame, or a clip's pooled features, by itself.
_FRAMEWISE = (
    nn.Linear, nn.Flatten, nn.Unflatten, nn.Identity, nn.LayerNorm, nn.RMSNorm, nn.Conv2d,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU,
    nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.Softplus,
)  # fmt: skip

# Of PyTorch's modules and of the layers those that leave what is done along time to their children.
_CONTAINERS = (
    nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, Conv2Plus1d, ParallelConv2Plus1d,
)  # fmt: skip


def split_time(x: Tensor, mesh: DeviceMesh, dim: int = 2) -> Tensor:
    """The frames of x that this rank holds: an equal share, in the order of the ranks.

    Args:
        x: the whole clip, (N, C, T, H, W), the same on every rank.
        mesh: one-dimensional.
        dim: of time.

    Raises:
        ValueError: the frames do not divide evenly.
    """
    group = _group("split_time", mesh)
    ranks = dist.get_world_size(group)
    if x.shape[dim] % ranks:
        raise ValueError(
            f"split_time: requires a number of frames that {ranks} ranks divide, got {x.shape[dim]}"
        )
    return x.chunk(ranks, dim)[dist.get_rank(group)]


def gather_time(x: Tensor, mesh: DeviceMesh, dim: int = 2) -> Tensor:
    """The whole of a tensor that is split along time, on every rank; carries no gradient.

    Args:
        x: this rank's frames, as many as every other rank's.
        mesh: one-dimensional.
        dim: of time.
    """
    group = _group("gather_time", mesh)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in ranks_of(group)]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return torch.cat(parts, dim)


def shard_time(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    sample: Tensor | None = None,
    framewise: Sequence[type[nn.Module]] = (),
) -> nn.Module:
    """Make a model take clips that are split over ranks along time, in place.

    Called on every rank of the mesh. Afterwards ``model(split_time(x, mesh))`` computes what
    ``model(x)`` did: outputs with frames are split alike, pooled ones are the same on every rank.
    A temporal convolution fetches from other ranks only the frames that its windows read, and sends
    their gradients back; batch norms in training take their statistics over all ranks; global
    pooling averages over them. Let every rank compute the loss of its own output, and average the
    gradients over the mesh (``DistributedDataParallel``): that is the gradient of the whole clip.

    The ranks' shares stay equal through the network: its number of frames must be divisible by the
    ranks times the product of the temporal strides, and temporal convolutions and pools must keep
    T, or divide it by their stride, as padded ones do.

    Only modules can be seen. What a ``forward`` does to time by itself (padding, slicing, a mean
    over frames) cannot: pass a ``sample`` to have the sharded model compared.

    Args:
        model: on the mesh's devices, with the same parameters on every rank.
        mesh: one-dimensional, for example ``init_device_mesh("cuda", (4,))["time"]``.
        sample: a whole clip, the same on every rank; the model before and after is run on it in
            eval mode.
        framewise: classes of further modules that treat every frame by itself.

    Returns:
        The model. ``unshard_time`` undoes it.

    Raises:
        ValueError: modules that reach across time in a way that cannot be split, by name; or the
            sharded model gave other results on the sample.
    """
    group = _group("shard_time", mesh)
    _refuse(model, tuple(framewise))
    expected = None if sample is None else _evaluate(model, sample)
    for module in model.modules():
        if isinstance(module, Conv2Plus1d | ParallelConv2Plus1d) and module.causal:
            _shard_causal(module, group)
    for module in model.modules():
        _shard(module, group)
    model.register_forward_pre_hook(_ShareCheck(group))
    if sample is not None and expected is not None:
        _compare(model, sample, expected, mesh)
    return model


def unshard_time(model: nn.Module) -> nn.Module:
    """Undo ``shard_time``, in place; the model takes whole clips again."""
    for module in model.modules():
        if isinstance(module, _TimeSharded):
            object.__setattr__(module, "__class__", module._time.original)
            del module._time
        elif "_time_causal" in module.__dict__:
            module.causal = module.__dict__.pop("_time_causal")
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _ShareCheck)]:
        del hooks[key]
    return model


# ---- what the modules of a sharded model are


class _Time(NamedTuple):
    """What a sharded module remembers."""

    group: Any
    original: type[nn.Module]
    before: int = 0  # frames of padding before the clip
    after: int = 0


class _TimeSharded:
    """Mark of a module that exchanges with other ranks."""

    _time: _Time


class TimeShardedConv3d(_TimeSharded, nn.Conv3d):
    """Convolution of this rank's frames and of those around them that its windows read."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        window = Window(
            self.kernel_size[0], self.stride[0], self.dilation[0], self._time.before,
            self._time.after, self.padding_mode,
        )  # fmt: skip
        x = read_frames(x, window, self._time.group)
        w = self._reversed_padding_repeated_twice  # of W, H, T
        padding = (0, w[2], w[0])
        if self.padding_mode != "zeros" or (w[2], w[0]) != (w[3], w[1]):
            x = pad(x, (0, 0, w[2], w[3], w[0], w[1]), self.padding_mode)
            padding = (0, 0, 0)
        return F.conv3d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class TimeShardedFusedConv3d(_TimeSharded, Conv3d):
    """The same of a layer whose norm and activation see this rank's frames before it."""

    def _advance(self, *args: Any) -> Any:
        raise ValueError("Conv3d: a layer under shard_time takes shares of clips, not streams")

    def _run(self, x: Tensor, residual: Tensor | None, **geometry: Any) -> Any:
        if x.dim() == 4:
            residual = None if residual is None else residual.unsqueeze(0)
            return self._run(x.unsqueeze(0), residual).squeeze(0)
        window = Window(
            self.kernel_size[0], self.stride[0], self.dilation[0], self._time.before,
            self._time.after, self._geometry().padding_mode[1],
        )  # fmt: skip
        z = read_frames(self._z_of(x), window, self._time.group)
        return conv3d(
            z, self.weight, self.bias, self.stride, self._sides(), self.dilation, self.groups,
            padding_mode=self.padding_mode, residual=residual, activation=self.activation,
            negative_slope=self.negative_slope,
        )  # fmt: skip


class TimeShardedMaxPool3d(_TimeSharded, nn.MaxPool3d):
    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, padding, dilation = map(
            _triple, (self.kernel_size, self.stride, self.padding, self.dilation)
        )
        # Rounding up reads that much further.
        before, after = padding[0], padding[0] + (stride[0] - 1 if self.ceil_mode else 0)
        window = Window(kernel[0], stride[0], dilation[0], before, after, "zeros", -torch.inf)
        x = read_frames(x, window, self._time.group)
        padding = (0, *padding[1:])
        return F.max_pool3d(x, kernel, stride, padding, dilation, self.ceil_mode)


class TimeShardedAvgPool3d(_TimeSharded, nn.AvgPool3d):
    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, padding = map(_triple, (self.kernel_size, self.stride, self.padding))
        window = Window(kernel[0], stride[0], 1, padding[0], padding[0], "zeros")
        x = read_frames(x, window, self._time.group)
        return F.avg_pool3d(
            x, kernel, stride, (0, *padding[1:]), self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )  # fmt: skip


class TimeShardedGlobalPool3d(_TimeSharded, nn.AdaptiveAvgPool3d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return Sum.apply(y, self._time.group) / dist.get_world_size(self._time.group)


def _shard(module: nn.Module, group: Any) -> None:
    """Give a module that reaches across time the class that exchanges."""
    sharded: type[nn.Module] | None = None
    before = after = 0
    if type(module) is nn.Conv3d:
        w = module._reversed_padding_repeated_twice
        before, after = w[4], w[5]
        if (module.kernel_size[0], module.stride[0], before, after) != (1, 1, 0, 0):
            sharded = TimeShardedConv3d
    elif type(module) is Conv3d:
        before, after = module._geometry().padding[:2]
        if (module.kernel_size[0], module.stride[0], before, after) != (1, 1, 0, 0):
            sharded = TimeShardedFusedConv3d
    elif type(module) in (nn.MaxPool3d, nn.AvgPool3d):
        moves = tuple(_triple(v)[0] for v in (module.kernel_size, module.stride, module.padding))
        if moves != (1, 1, 0):
            sharded = (
                TimeShardedMaxPool3d if isinstance(module, nn.MaxPool3d) else TimeShardedAvgPool3d
            )
    elif type(module) is nn.AdaptiveAvgPool3d and _triple(module.output_size)[0] == 1:
        sharded = TimeShardedGlobalPool3d
    elif type(module) in (nn.BatchNorm2d, nn.BatchNorm3d):
        sharded = TimeShardedBatchNorm
    if sharded is not None:
        made: Any = module
        made._time, made.__class__ = _Time(group, type(module), before, after), sharded


class TimeShardedBatchNorm(_TimeSharded, SyncBatchNorm):
    """Batch norm over the frames of all ranks."""

    @property
    def process_group(self) -> Any:
        return self._time.group


def _shard_causal(layer: Conv2Plus1d | ParallelConv2Plus1d, group: Any) -> None:
    """Hand the causal padding of a layer to its temporal convolution."""
    conv: Any = layer.temporal
    kernel, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
    before = left_padding(kernel, stride, dilation, layer.causal)
    if (kernel, stride, before) != (1, 1, 0):
        conv._time = _Time(group, type(conv), before, 0)
        conv.__class__ = TimeShardedConv3d
    vars(layer)["_time_causal"] = layer.causal
    layer.causal = False


def _refuse(model: nn.Module, framewise: tuple[type[nn.Module], ...]) -> None:
    problems = []
    for name, module in model.named_modules():
        why = None
        if isinstance(module, _TimeSharded):
            why = "is sharded already"
        elif not isinstance(module, framewise):
            why = _why_not(module)
        if why is not None:
            problems.append(f"{name or 'the model'} ({type(module).__name__}) {why}")
    if problems:
        raise ValueError(f"shard_time: cannot split along time: {'; '.join(problems)}")


def _why_not(module: nn.Module) -> str | None:
    """Why a module cannot run on a share of the frames, or None where it can."""
    kind = type(module)
    if kind in (nn.Conv3d, Conv3d, *_FRAMEWISE, nn.BatchNorm2d, nn.BatchNorm3d):
        return None
    if isinstance(module, nn.SyncBatchNorm | SyncBatchNorm):
        return None  # its group is the user's choice
    if kind is nn.MaxPool3d:
        return "returns indices, which would be the shares'" if module.return_indices else None
    if kind is nn.AvgPool3d:
        uneven = module.ceil_mode or (_triple(module.padding)[0] and not module.count_include_pad)
        return "averages over fewer frames at the ends" if uneven else None
    if kind is nn.AdaptiveAvgPool3d:
        frames = _triple(module.output_size)[0]
        return None if frames in (1, None) else f"pools to {frames} frames; only 1 can be split"
    if kind is nn.Upsample:
        factor = _triple(module.scale_factor)[0]
        whole = module.mode == "nearest" and factor is not None and factor == int(factor)
        return None if whole else "must be nearest and by a whole factor"
    if next(module.children(), None) is not None and _leaves_time_to_children(module):
        return None
    return "is of no class known to treat every frame by itself; name it in framewise= if it does"


def _leaves_time_to_children(module: nn.Module) -> bool:
    """Whether nothing shows that a module does more than call its children."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    layers = {
        base for base in type(module).__mro__
        if base.__module__.startswith(("torch.nn.modules.", "fastst.nn."))
    }  # fmt: skip
    return not own and layers <= {base for kind in _CONTAINERS for base in kind.__mro__}


class _ShareCheck:
    """Before every forward: all ranks must have come with a clip of the same shape."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        mine = torch.tensor(args[0].shape, device=args[0].device)
        parts = [torch.empty_like(mine) for _ in ranks_of(self.group)]
        dist.all_gather(parts, mine, group=self.group)
        shapes = [tuple(p.tolist()) for p in parts]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"a model under shard_time requires equal shares on all ranks, got {shapes}"
            )


def _evaluate(model: nn.Module, x: Tensor) -> Tensor:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad(), without_trace(model, x) as call:
        y: Tensor = call()
    for module, training in modes:
        module.training = training
    return y


def _compare(model: nn.Module, sample: Tensor, expected: Tensor, mesh: DeviceMesh) -> None:
    y = _evaluate(model, split_time(sample, mesh))
    if y.shape != expected.shape:
        expected = split_time(expected, mesh)
    # A frame that is missing or doubled is off by far more than any rounding.
    limit = torch.finfo(y.dtype).eps ** 0.5 * float(expected.abs().max())
    off = float((y - expected).abs().max()) if y.shape == expected.shape else torch.inf
    worst = torch.tensor([off], device=y.device)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=mesh.get_group())
    if not float(worst) <= limit:
        unshard_time(model)
        raise ValueError(
            "shard_time: a forward of the model reaches across time where no module shows it: on "
            f"the sample the outputs are off by up to {float(worst):.3g}, at most {limit:.3g} is "
            "rounding"
        )


def _triple(value: Any) -> tuple[Any, Any, Any]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * 3


def _group(what: str, mesh: DeviceMesh) -> Any:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{what}: mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f"{what}: mesh must be one-dimensional (take one dimension, as mesh['time']), got "
            f"{mesh.ndim} dimensions"
        )
    return mesh.get_group()

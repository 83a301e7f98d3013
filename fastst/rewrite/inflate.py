"""(2+1)D networks from 2D ones, equal to them frame by frame until they are trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch
from ..nn.layers import Conv2Plus1d
from ..nn.pair_of_modules import why_more_than_class
from ..problem import geometry
from .altered import why_altered

_TOLERANCE = 1e-9  # of float64 outputs, relative to the largest


def inflate(
    model: nn.Module,
    *,
    temporal_kernel: int = 3,
    depthwise: bool = False,
    example: Tensor | None = None,
) -> nn.Module:
    """A (2+1)D copy of a 2D network, or of an ``nn.Conv2d``, with a temporal identity.

    Each ``nn.Conv2d`` becomes a ``Conv2Plus1d`` without norm or activation inside: its spatial
    convolution has the weights of the 2D one, its temporal convolution passes every channel of the
    middle frame on (1 there, 0 elsewhere), and learns the rest. 1×1 convolutions become 1×1×1 ones.
    Batch norms, pools and dropout become their 3D forms, over space only; a global average pool
    averages over time, too.

    So features equal those of the 2D network frame by frame, and the logits of a linear head its
    logits averaged over the frames. That is checked before the copy is returned: on frames that
    differ, with the weights and buffers that there are and with random ones, in eval mode. Modules
    that are not PyTorch's are checked in training mode as well, where the 2D network returns a
    tensor then that is the same each time. (What is random is not drawn alike for frames and clips.
    PyTorch's modules stay in eval mode: a batch norm behind the pooling has other batches.) A plain
    number that hides something by being 0 is not seen through.

    Args:
        model: 2D network in the manner of torchvision's and timm's ResNets, or a convolution; left
            as it is.
        temporal_kernel: kt, odd.
        depthwise: temporal convolutions of single channels instead of all to all.
        example: (T, C, H, W) frames to check with; by default 2 random ones of 64 × 64. A random
            frame is added to frames that are all the same.

    Returns:
        A network from (N, C, T, H, W). Keys: ``x.weight`` becomes ``x.spatial.weight``, and
        ``x.temporal.weight`` comes in.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: an even or no kernel; a module without a 3D form, or that is hooked,
            parametrized, quantised, lazy or meta; a weight of a convolution that other modules read
            as well; or the copy is not equal to the 2D network.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"inflate: model must be an nn.Module, got {type(model).__name__}")
    geometry.triple("inflate: temporal_kernel", temporal_kernel, 1)
    if temporal_kernel % 2 == 0:
        raise ValueError(f"inflate: temporal_kernel must be odd, got {temporal_kernel}")
    _check_tied(model)
    inflated = _inflate(copy.deepcopy(model), temporal_kernel, depthwise)
    frames = _frames(model, example)
    _check(model, inflated, frames)
    # Norms, gates and scales that start at 0 hide what comes before them.
    drawn = _randomise_copy(model)
    deep = _inflate(copy.deepcopy(drawn), temporal_kernel, depthwise)
    _check(drawn, deep, frames)
    if any(not _is_of_torch(m) for m in model.modules()):
        _check(drawn, deep, frames, training=True)
    return inflated


def _inflate(model: nn.Module, temporal_kernel: int, depthwise: bool) -> nn.Module:
    """The model with its modules replaced."""
    replaced: dict[int, nn.Module] = {}  # by the 2D module, so that shared ones stay shared
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) not in replaced:
            replaced[id(module)] = _inflate_module(name, module, temporal_kernel, depthwise)
        new = replaced[id(module)]
        if new is module:
            continue
        if not name:
            model = new
        else:
            above, _, last = name.rpartition(".")
            setattr(model.get_submodule(above), last, new)
    return model


def _check_tied(model: nn.Module) -> None:
    """
    Raises:
        ValueError: a weight that becomes a 5-D one is that of another module, too.
    """
    convs: dict[int, str] = {}  # by weight
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d:
            convs[id(module.weight)] = f"{name}.weight" if name else "weight"
    for name, module in model.named_modules():
        for own, p in module.named_parameters(recurse=False):
            if id(p) in convs and (type(module) is not nn.Conv2d or own != "weight"):
                raise ValueError(
                    f"inflate: {convs[id(p)]} is also {name}.{own}, of a {type(module).__name__}"
                )


def _check_plain(name: str, module: nn.Module) -> None:
    """
    Raises:
        ValueError: a module whose replacement would lose hooks, or whose weights have no values.
    """
    why = why_altered({name: module}.__getitem__, [name])
    if why is None and _is_of_torch(module):
        more = why_more_than_class(module)
        why = more and f"{name or 'the model'} {more}"
    if why is not None:
        raise ValueError(f"inflate: {why}")


def _inflate_module(name: str, module: Any, kt: int, depthwise: bool) -> nn.Module:
    """The 3D form of a module; the module itself where it has nothing to do with space."""
    kind = type(module)
    spatial = any(base in _FORMS or base is nn.Conv2d for base in kind.__mro__)
    if spatial:
        _check_plain(name, module)
    if kind is nn.Conv2d:
        return _conv(module, kt, depthwise)
    make = _FORMS.get(kind)
    if make is not None:
        new = make(module)
        new._parameters, new._buffers = module._parameters, module._buffers
        return new.train(module.training)
    if spatial or (_is_of_torch(module) and kind.__name__.endswith("2d")):
        raise ValueError(
            f"inflate: {name or 'the model'} is a {kind.__name__}, of which no 3D form is known"
        )
    return module


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _conv(conv: Any, kt: int, depthwise: bool) -> nn.Module:
    where = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    stride, dilation = (1, *conv.stride), (1, *conv.dilation)
    space = (0, 0) if conv.padding == "valid" else conv.padding
    if conv.kernel_size == (1, 1):
        padding = space if isinstance(space, str) else (0, *space)
        new: Any = nn.Conv3d(
            conv.in_channels, conv.out_channels, 1, stride, padding, dilation, conv.groups,
            False, conv.padding_mode, **where,
        )  # fmt: skip
        spatial = new
    else:
        k = conv.out_channels
        new = Conv2Plus1d(
            conv.in_channels, k, (kt, *conv.kernel_size), stride,
            space if isinstance(space, str) else (kt // 2, *space), dilation,
            (conv.groups, k if depthwise else 1), False, (conv.padding_mode, "zeros"),
            mid_channels=k, activation=None, **where,
        )  # fmt: skip
        spatial = new.spatial
        nn.init.zeros_(new.temporal.weight)
        i = torch.arange(k)
        new.temporal.weight.data[i, 0 if depthwise else i, kt // 2] = 1.0
    if conv.weight.dim() == 4:  # it is the same parameter for all who share it
        conv.weight.data = conv.weight.data.unsqueeze(2)
    spatial.weight, spatial.bias = conv.weight, conv.bias
    return new.train(conv.training)


def _batch_norm(m: nn.BatchNorm2d) -> nn.Module:
    return nn.BatchNorm3d(m.num_features, m.eps, m.momentum, m.affine, m.track_running_stats)


def _max_pool(m: nn.MaxPool2d) -> nn.Module:
    return nn.MaxPool3d(
        _space(m.kernel_size, 1), _space(m.stride, 1), _space(m.padding, 0), _space(m.dilation, 1),
        m.return_indices, m.ceil_mode,
    )  # fmt: skip


def _avg_pool(m: nn.AvgPool2d) -> nn.Module:
    return nn.AvgPool3d(
        _space(m.kernel_size, 1), _space(m.stride, 1), _space(m.padding, 0), m.ceil_mode,
        m.count_include_pad, m.divisor_override,
    )  # fmt: skip


def _adaptive_avg_pool(m: nn.AdaptiveAvgPool2d) -> nn.Module:
    h, w = _pair(m.output_size)
    return nn.AdaptiveAvgPool3d((1 if (h, w) == (1, 1) else None, h, w))


_FORMS: dict[type, Callable[[Any], nn.Module]] = {
    nn.BatchNorm2d: _batch_norm,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive_avg_pool,
    nn.AdaptiveMaxPool2d: lambda m: nn.AdaptiveMaxPool3d((None, *_pair(m.output_size))),
    nn.Dropout2d: lambda m: nn.Dropout3d(m.p, m.inplace),
}


def _pair(v: Any) -> tuple[Any, Any]:
    return tuple(v) if isinstance(v, (tuple, list)) else (v, v)


def _space(v: Any, time: int) -> tuple[int, int, int]:
    return (time, *_pair(v))


def _frames(model: nn.Module, example: Tensor | None) -> Tensor:
    """The frames to check with, (T, C, H, W) in float64.

    Raises:
        ValueError: the example does not fit, or there is none and nothing says how many channels.
    """
    generator = torch.Generator().manual_seed(0)
    if example is None:
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        if not convs:
            raise ValueError("inflate: the model has no nn.Conv2d")
        example = torch.randn(2, convs[0].in_channels, 64, 64, generator=generator)
    if example.dim() != 4:
        raise ValueError(f"inflate: example must be (T, C, H, W), got {tuple(example.shape)}")
    frames = example.detach().cpu().double()
    if (frames == frames[:1]).all():
        other = torch.randn(frames[:1].shape, generator=generator, dtype=frames.dtype)
        frames = torch.cat([frames, 2 * other])
    return frames


def _randomise_copy(model: nn.Module) -> nn.Module:
    """A float64 copy with other parameters and buffers, none of which is 0."""
    model = copy.deepcopy(model).cpu().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (*model.parameters(), *model.buffers()):
            if p.is_floating_point():
                sign = torch.where(p < 0, -1.0, 1.0)  # a square root may be taken of a buffer
                fan_in = p[0].numel() if p.dim() > 1 else 1
                p.uniform_(0.5, 1.5, generator=generator).div_(fan_in**0.5)
                if isinstance(p, nn.Parameter) and p.dim() > 1:  # so that sums do not grow
                    sign.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
                p.mul_(sign)
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._NormBase):
                for statistics, low in ((m.running_mean, -0.5), (m.running_var, 0.5)):
                    if statistics is not None:
                        statistics.uniform_(low, low + 1, generator=generator)
    return model


def _check(model: nn.Module, inflated: nn.Module, frames: Tensor, training: bool = False) -> None:
    """
    Raises:
        ValueError: the inflated network is not equal to the 2D one frame by frame. In training mode
            that is only asked where the 2D network returns the same tensor twice.
    """
    flat, deep = (copy.deepcopy(m).cpu().double().eval() for m in (model, inflated))
    for m in (*flat.modules(), *deep.modules()):
        m.training = training and not _is_of_torch(m)
    with torch.no_grad(), dispatch.use_backend("reference"):
        try:
            wanted = flat(frames.clone())
            again = flat(frames.clone()) if training else wanted
        except Exception as error:  # whatever user code raises on frames that it cannot take
            if training:
                return
            raise ValueError(
                f"inflate: the 2D network does not run on frames of {tuple(frames.shape)}, give an "
                f"example that it runs on: {error}"
            ) from error
        if training and not (isinstance(wanted, Tensor) and torch.equal(wanted, again)):
            return
        try:
            y = deep(frames.clone().transpose(0, 1).unsqueeze(0))
        except Exception as error:  # whatever user code raises on a 5-D tensor
            raise ValueError(f"inflate: the inflated network does not run: {error}") from error
    if not isinstance(y, Tensor) or not isinstance(wanted, Tensor):
        raise ValueError(f"inflate: the model must return a tensor, got {type(wanted).__name__}")
    if y.shape == wanted[:1].shape:
        wanted = wanted.mean(0, keepdim=True)
    else:
        wanted = wanted.transpose(0, 1).unsqueeze(0)
    apart = (y - wanted).abs().max() if y.shape == wanted.shape else torch.inf
    if not apart <= _TOLERANCE * wanted.abs().max():  # NaN is no proof
        raise ValueError(
            "inflate: the inflated network is not equal to the 2D one frame by frame: its forward "
            "does something of its own along height and width"
        )

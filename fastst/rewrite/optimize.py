"""Models for inference only: norms folded into convolutions, pairs as single operations."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..dispatch import tune
from ..nn.layers import Conv2Plus1d
from ..nn.pair_of_modules import by_kind, why_composed
from .convert import revert
from .convert.converter import convert_for_inference, is_leaf
from .convert.match import why_altered
from .convert.trace import CannotTrace, is_watched, trace

_FORMATS = (torch.channels_last_3d, torch.contiguous_format)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def optimize_for_inference(
    model: nn.Module,
    *,
    memory_format: torch.memory_format | None = None,
    sample: Tensor | None = None,
    seconds: float = 2.0,
) -> nn.Module:
    """A copy of a model that computes the same in evaluation mode, faster.

    Batch norms are folded into the convolution before them wherever a trace shows that nothing
    else sees what lies between: the one inside a pair into its first convolution, the one after it
    into the second, that of a shortcut into its own. Pairs run as one operation, as after
    ``fastst.convert``, those of ``Conv2Plus1d`` layers as well; where a trace proves it safe, the
    sum that ends a residual block and the activation after it are part of the operation of the
    block's last pair.

    Weights are put in one memory format, so that nothing has to be rearranged between operations:
    with a sample in the one that is measured to be the faster, else by a rule.

    Folding changes weights by rounding: outputs agree with those of the original to the accuracy of
    its dtype, not bit by bit. The copy has no norms left to train.

    Args:
        model: left as it is, and in its mode.
        memory_format: of 5-D weights; what they read and write takes it too. None to choose.
        sample: what the model is called with: sizes, dtype, device and threads count.
        seconds: time for measuring with the sample.

    Returns:
        The copy, in evaluation mode, without gradients.

    Raises:
        TypeError: ``model`` is no module, ``sample`` no tensor.
        ValueError: ``model`` has lazy parameters; ``memory_format`` is none of 5-D tensors, or is
            given along with a sample; ``seconds`` is not positive.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"optimize_for_inference: model must be an nn.Module, got {type(model).__name__}"
        )
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(p):
            raise ValueError(
                f"optimize_for_inference: {name} is lazy: it has no values before the first call"
            )
    _check(memory_format, sample, seconds)
    with torch.no_grad():  # else those of TorchScript would be copied as results of a clone
        optimised = copy.deepcopy(model).eval()
    for p in optimised.parameters():
        p.requires_grad_(False)
    revert(optimised)
    _open_layers(optimised)
    fold_norms(optimised)
    convert_for_inference(optimised)
    if sample is not None:
        memory_format = _fastest_format(optimised, sample, seconds)
    _lay_out(optimised, memory_format or _usual_format(optimised))
    return optimised


def _check(
    memory_format: torch.memory_format | None, sample: Tensor | None, seconds: float
) -> None:
    if memory_format not in (None, *_FORMATS):
        raise ValueError(
            f"optimize_for_inference: memory_format must be one of {', '.join(map(str, _FORMATS))} "
            f"or None, got {memory_format}"
        )
    if sample is not None and not isinstance(sample, Tensor):
        raise TypeError(
            f"optimize_for_inference: sample must be a tensor, got {type(sample).__name__}"
        )
    if sample is not None and memory_format is not None:
        raise ValueError(
            "optimize_for_inference: takes a memory_format, or a sample to choose it by, not both"
        )
    if not seconds > 0:
        raise ValueError(f"optimize_for_inference: seconds must be positive, got {seconds}")


def _usual_format(model: nn.Module) -> torch.memory_format:
    """Channels-last where kernels read rows of channels; elsewhere PyTorch's own format.

    On GPUs those are Triton's and the tensor cores'. On CPUs it was the faster one on R(2+1)D-18 in
    float32, by a tenth, and 16 bits run as rows as well; there is no more to gain with float64.
    """
    weights = [p for p in model.parameters() if p.dim() == 5]
    rows = any(p.device.type in ("cpu", "cuda") and p.dtype != torch.float64 for p in weights)
    return torch.channels_last_3d if rows else torch.contiguous_format


def _fastest_format(model: nn.Module, sample: Tensor, seconds: float) -> torch.memory_format:
    """The memory format of weights with which a call takes the least time."""
    models = {fmt: copy.deepcopy(model) for fmt in _FORMATS}
    for fmt, m in models.items():
        _lay_out(m, fmt)

    def trial(m: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                m(sample)
            if sample.device.type == "cuda":
                torch.cuda.synchronize(sample.device)

        return run

    times = tune.race({fmt: trial(m) for fmt, m in models.items()}, seconds)
    return min(times, key=times.__getitem__)


def _lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    for p in model.parameters():
        if p.dim() == 5:
            p.data = p.data.contiguous(memory_format=memory_format)


class OpenedConv2Plus1d(Conv2Plus1d):
    """A layer with a forward that a trace can see through."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = by_kind(self.spatial, self.temporal, self.order)
        u = first(x)
        return second(self.activation(u if self.norm is None else self.norm(u)))


def _open_layers(model: nn.Module) -> None:
    """Make pairs to be converted of the layers, which have seen only themselves."""
    uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for m in model.modules():
        if type(m) is not Conv2Plus1d or m.causal or is_watched(m):
            continue
        first, second = by_kind(m.spatial, m.temporal, m.order)
        shared = any(uses[id(child)] > 1 for child in (first, m.norm, second))
        if not shared and why_composed(first, m.norm, m.activation, second, m.order) is None:
            m.__class__ = OpenedConv2Plus1d


def fold_norms(model: nn.Module) -> list[tuple[str, str]]:
    """Fold batch norms into the convolutions whose outputs only they read, in place.

    Args:
        model: in evaluation mode.

    Returns:
        Names of each convolution and of the norm that is an ``nn.Identity`` now.
    """
    names = {id(m): name for name, m in model.named_modules()}
    uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    folded = []
    for module in reversed(list(model.modules())):
        if is_leaf(module):
            continue
        try:
            graph = trace(module, is_leaf).graph
        except CannotTrace:
            continue
        times = Counter(n.target for n in graph.nodes if n.op == "call_module")
        for node in graph.nodes:
            pair = _conv_and_norm(module, node)
            if pair is None or any(times[n.target] > 1 for n in (node, *node.users)):
                continue
            conv, norm = pair
            if any(uses[id(m)] > 1 or is_watched(m) for m in pair):
                continue
            _fold(conv, norm)
            path, _, name = str(next(iter(node.users)).target).rpartition(".")
            setattr(module.get_submodule(path), name, nn.Identity())
            folded.append((names[id(conv)], names[id(norm)]))
    return folded


def _conv_and_norm(module: nn.Module, node: fx.Node) -> tuple[Any, Any] | None:
    """A plain convolution that a node calls, and the norm that alone reads its output."""
    users = list(node.users)
    if node.op != "call_module" or len(users) != 1 or users[0].op != "call_module":
        return None
    paths = str(node.target), str(users[0].target)
    conv, norm = map(module.get_submodule, paths)
    if type(conv) not in _CONVS or type(norm) not in _NORMS or norm.running_mean is None:
        return None
    return None if why_altered(module.get_submodule, paths) is not None else (conv, norm)


def _fold(conv: Any, norm: Any) -> None:
    """scale·conv(x) + shift as one convolution; computed in float64, rounded once."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias: Tensor = -norm.running_mean.double()
    if conv.bias is not None:
        bias = bias + conv.bias.double()
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = conv.weight.double() * scale.view(-1, *(1,) * (conv.weight.dim() - 1))
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad=False)

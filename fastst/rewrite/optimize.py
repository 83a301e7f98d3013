"""Models for inference only: pairs as single operations, weights laid out for them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..dispatch import tune
from ..dispatch.without_trace import copied, copied_arguments, keep_random_numbers
from ..machine import devices, served
from ..nn.conv3d import Conv3d
from ..nn.pair_of_modules import why_more_than_class
from .convert import convert
from .convert.converter import serve

_FORMATS = (torch.channels_last_3d, torch.contiguous_format)


def optimize_for_inference(
    model: nn.Module,
    *,
    memory_format: torch.memory_format | None = None,
    sample: Tensor | None = None,
    seconds: float = 2.0,
) -> nn.Module:
    """A copy of a model that computes the same in evaluation mode, faster.

    Pairs run as one operation, as after ``fastst.convert``. Nothing is folded in advance: norms
    reach the operation when it runs, so that the copy is right for every way in which its parts
    are called.

    Weights stay as they lie, and outputs have the strides that they have in the model. With a
    memory format, or a sample by which the faster one is measured, weights of convolutions are put
    in it, and outputs follow: less is rearranged between operations, and a ``view`` of an output
    may be refused. A format in which the sample does not run is not taken. What backends make of
    weights they keep until a version counter says that the weights have changed.

    Args:
        model: left as it is, and in its mode.
        memory_format: of the weights of 3D convolutions; what they write takes it too.
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
    optimised = copied(model).eval()
    for p in optimised.parameters():
        p.requires_grad_(False)
    convert(optimised)
    serve(optimised)
    if sample is not None:
        memory_format = _fastest_format(optimised, sample, seconds)
    if memory_format is not None:
        _lay_out(optimised, memory_format)
    served.serve(p for p in optimised.parameters() if p.dim() == 5)
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


def _fastest_format(model: nn.Module, sample: Tensor, seconds: float) -> torch.memory_format | None:
    """The memory format of weights with which a call takes the least time; None where it runs only
    with weights as they are."""
    models = {fmt: copy.deepcopy(model) for fmt in _FORMATS}
    for fmt, m in models.items():
        _lay_out(m, fmt)

    def trial(m: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                m(copied_arguments(sample))
            devices.wait_for(sample.device)

        return run

    with keep_random_numbers():
        trial(copy.deepcopy(model))()  # which says what is wrong with the sample
        trials = {fmt: trial(m) for fmt, m in models.items()}
        trials = {fmt: call for fmt, call in trials.items() if _runs(call)}
        times = tune.race(trials, seconds) if trials else {}
    return min(times, key=times.__getitem__, default=None)


def _runs(call: Callable[[], None]) -> bool:
    try:
        call()
    except RuntimeError:  # of a view that a memory format does not allow
        return False
    return True


def _lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Put the weights of convolutions that nobody else reads in a memory format."""
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for m in model.modules():
        weight = m._parameters.get("weight")
        if type(m) not in (nn.Conv3d, Conv3d) or weight is None or owners[id(weight)] > 1:
            continue
        if why_more_than_class(m) is None:
            weight.data = weight.data.contiguous(memory_format=memory_format)

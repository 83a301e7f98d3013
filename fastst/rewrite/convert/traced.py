"""Promises under ``torch.compile``: kept while the graph is lowered, by the rules of every call.

Dynamo writes ``convolution`` into its graph as it stands, with guards on all that it is given. What
lowers the graph (AOTAutograd, for Inductor and others) calls it and what follows, so that the pair
is one operation of the graph that is compiled; before PyTorch 2.13 it stays separate calls there.
``torch.export`` runs the module's own Python, and nothing has to be done for it.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Earlier ones read what a graph returns where its calls can no longer be lowered.
LOWERS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
CONVOLVE: Any = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}  # by rank
_known: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_keys = itertools.count()


def finds_convolutions() -> bool:
    """Whether nobody has replaced PyTorch's convolutions, in words that Dynamo guards."""
    return F.conv1d is torch.conv1d and F.conv2d is torch.conv2d and F.conv3d is torch.conv3d


def register(begins: Any) -> str:
    """A name by which a graph knows the ``Begins`` of a convolution: of a number that differs
    between two calls of the same code Dynamo makes a symbol."""
    key = str(next(_keys))
    _known[key] = begins
    return key


def convolution(
    key: str, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any,
    dilation: Any, groups: int, mode: str, widths: Any,
) -> Tensor:  # fmt: skip
    """What the convolution of that name answers with; to Dynamo, which asks for the shape, as
    PyTorch computes it."""
    begins = _known.get(key)
    if begins is None or type(x) is FakeTensor:
        if mode != "zeros":
            x, padding = F.pad(x, widths, mode), 0
        return CONVOLVE[weight.dim()](x, weight, bias, stride, padding, dilation, groups)
    how = stride, padding, dilation, groups
    answer: Tensor = begins.answer(x, weight, bias, how, mode, widths)
    return answer


def allow() -> None:
    """Let Dynamo take ``convolution`` as it stands. Runs while it traces: importing it is slow."""
    torch.compiler.allow_in_graph(convolution)


# A constant to the compiler: it runs while Dynamo traces.
vars(allow)["_dynamo_marked_constant"] = True


def can_hold(*numbers: Any) -> bool:
    """Whether a graph can hold the numbers of a convolution."""
    for n in numbers:
        if type(n) is tuple:
            for m in n:
                if type(m) is not int:
                    return False
        elif type(n) not in (int, str):
            return False
    return True

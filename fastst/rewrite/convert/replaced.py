"""Functions of PyTorch that somebody has replaced, as profilers and tools that tile do.

A module calls ``F.conv3d`` as it finds it, and a replaced one is to be called where PyTorch's was.
While one is replaced for which a chain may stand, convolutions promise nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F

from . import rules

# Those of ``F`` are made of those of ``torch`` of the same name.
_names = [n for n, f in vars(F).items() if isinstance(f, Hashable) and f in rules.RULES]
_functions: dict[str, Any] = vars(F)
_operators: dict[str, Any] = vars(torch)
_of_functions = itemgetter(*_names)
_of_operators = itemgetter(*[n for n in _names if n in _operators])
_known = _of_functions(_functions), _of_operators(_operators)


def are_pytorchs() -> bool:
    """Whether no function is replaced for which a chain may stand."""
    return bool((_of_functions(_functions), _of_operators(_operators)) == _known)


# A constant to the compiler: it runs while Dynamo traces.
vars(are_pytorchs)["_dynamo_marked_constant"] = True

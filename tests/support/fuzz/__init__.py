"""Random configurations of every function, and the check of a backend against float64.

The ground truth is composed here, of ``torch.nn.functional`` alone: nothing in this package knows
how fastst computes. ``check`` holds the output, every gradient and the running statistics to

    error ≤ 2 · (error of PyTorch's own operators in that dtype) + a few ulps

where errors are against float64, and outputs and workspaces of the library are filled with NaN
first. Environment: FASTST_SEED (first seed), FASTST_FUZZ (cases per test).
"""

from .config import ACTIVATIONS, DTYPES, KINKS, LAYOUTS, NAMES, SMALL, Config, Limits, random_config
from .conv3d import KINDS as CONV_NORMS
from .conv3d import NAMES as CONV_NAMES
from .conv3d import ConvConfig, ConvLimits, call_conv, compose_conv, make_conv, random_conv
from .rule import (
    CASES,
    KITS,
    SEED,
    VENDOR_BUG,
    call,
    check,
    complaints,
    error,
    fuzz,
    hold,
    no_rounding,
    poisoned,
    results,
    scales,
)
from .truth import act, compose, first_pass
from .values import clear_of_kinks, jumps_between_roundings, lay_out, make

__all__ = [
    "ACTIVATIONS", "CASES", "CONV_NAMES", "CONV_NORMS", "Config", "ConvConfig", "ConvLimits",
    "DTYPES", "KINKS", "KITS", "LAYOUTS", "Limits", "NAMES", "SEED", "SMALL", "VENDOR_BUG",
    "act", "call", "call_conv", "check", "clear_of_kinks", "complaints", "compose",
    "compose_conv", "error", "first_pass", "fuzz", "hold", "jumps_between_roundings", "lay_out",
    "make", "make_conv", "no_rounding", "poisoned", "random_config", "random_conv", "results",
    "scales",
]  # fmt: skip

"""Compiled kernels, executed. What CI runs of them, by compute capability."""

EXECUTED = {
    "8.0": ("small", "depthwise", "grouped", "parallel add"),
    "9.0": ("64-144-64", "stem", "64-144-64 half silu"),
}

"""Compiled kernels, executed. What CI runs of them, by compute capability."""

EXECUTED = {
    "8.0": ("small", "grouped"),
    "9.0": ("64-144-64", "stem"),
}

"""Compiled kernels, executed. What CI runs of them, as arguments of their drivers."""

EXECUTED = {
    "triton": (
        "--only",
        "8.0 (small|grouped|conv3d group)|9.0 (64-144-64|stem|conv3d past)",
    ),
    "cuda": (
        "--only", "8.0 (generic|depthwise|conv3d)|9.0 (forward half|backward)",
        "--fuzz", "2",
        "--instances",
        "9.0 (weight gradients 72|gradients of (the stem|depthwise 5 × 3² stride 2)).* in float16",
    ),
}  # fmt: skip

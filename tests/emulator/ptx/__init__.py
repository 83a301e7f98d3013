"""Compiled kernels, executed. What CI runs of them: a compute capability and a case."""

EXECUTED = {
    "triton": "8.0 (small|grouped)|9.0 (64-144-64|stem)",
    "cuda": "8.0 (generic|depthwise)|9.0 (forward half|backward)",
}

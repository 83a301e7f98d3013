"""Triton kernels only; imported by ``backends.triton`` when first needed, never by ``fastst``."""

"""Who runs a call, why, and what was measured or checked of it on this machine."""

from .selection import (
    AUTO,
    BACKENDS,
    BackendError,
    Decision,
    FallbackWarning,
    choose,
    choose_unrecorded,
    choose_with_statistics,
    fall_back,
    has_kernels,
    reasons,
    record_composed,
    recording,
    requested,
    strict,
    use_backend,
)

__all__ = [
    "AUTO",
    "BACKENDS",
    "BackendError",
    "Decision",
    "FallbackWarning",
    "choose",
    "choose_with_statistics",
    "choose_unrecorded",
    "fall_back",
    "has_kernels",
    "reasons",
    "record_composed",
    "recording",
    "requested",
    "strict",
    "use_backend",
]

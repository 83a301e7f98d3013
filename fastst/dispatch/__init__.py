"""Who runs a call, why, and what was measured or checked of it on this machine."""

from .selection import (
    AUTO,
    BACKENDS,
    BackendError,
    Call,
    FallbackWarning,
    choose,
    fall_back,
    giving_statistics,
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
    "Call",
    "FallbackWarning",
    "choose",
    "fall_back",
    "giving_statistics",
    "reasons",
    "record_composed",
    "recording",
    "requested",
    "strict",
    "use_backend",
]

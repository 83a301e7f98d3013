"""What the Triton backend does besides launching: no copies of x, but for dense contiguous ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastst.backends import triton as backend
from fastst.problem.spec import PairSpec, PairTensors, Problem

pytest.importorskip("triton", reason="Triton is not installed")

ALLOWED = {
    "empty", "empty_strided", "new_empty", "permute", "expand", "select", "slice", "view",
    "unsqueeze", "transpose", "detach",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Names of PyTorch's operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["none", "frozen", "batch"])
@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_nothing_is_copied(
    layout: str, groups: int, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.launch, "run", lambda *args, **meta: None)
    x = {
        "contiguous": torch.empty(2, 16, 4, 6, 6, device="meta"),
        "channels_last": torch.empty(2, 4, 6, 6, 16, device="meta").permute(0, 4, 1, 2, 3),
        "sliced": torch.empty(2, 18, 4, 8, 9, device="meta")[:, 1:17, :, 1:7, 2:8],
        "expanded": torch.empty(1, 16, 1, 6, 6, device="meta").expand(2, 16, 4, 6, 6),
    }[layout]
    c = 16 // groups
    weights = torch.empty(16, c, 1, 3, 3, device="meta"), torch.empty(16, c, 3, 1, 1, device="meta")
    vectors = [torch.empty(16, device="meta") for _ in range(6)]
    if norm != "frozen":
        vectors[4:] = [None, None]  # type: ignore[list-item]
    if norm == "none":
        vectors[2:4] = [None, None]  # type: ignore[list-item]
    tensors = PairTensors(x, *weights, *vectors, residual=x)
    spec = PairSpec(padding=(1,) * 6, groups=(groups, groups), norm=norm, outer_activation="relu")
    problem = Problem.of(tensors, spec)
    with Operators() as operators:
        for save in (False, True):
            backend.BACKEND.conv2plus1d(problem, tensors, save)
    assert "new_empty" in operators.seen  # or nothing was seen
    # What dense passes read in every tap has channels as neighbours: else it is copied, once.
    copies = {"clone"} if groups == 1 and x.stride(1) != 1 else set()
    assert operators.seen - ALLOWED == copies

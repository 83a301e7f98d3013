"""The end of a residual block as part of the op: outer_activation(pair + residual)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastst
from fastst.backends.contract import PairResult
from fastst.functional import BatchNorm, conv2plus1d
from fastst.ops import registered
from fastst.ops.schema import encode_spec
from fastst.problem import norms
from fastst.problem.spec import PairSpec, PairTensors, Problem
from tests.support import fuzz


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, spatial and temporal weight of a pair whose output has the shape of its input."""
    torch.manual_seed(0)
    shapes = ((2, 4, 3, 5, 6), (6, 4, 1, 3, 3), (4, 6, 3, 1, 1))
    return tuple(torch.randn(s, dtype=dtype) for s in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("grad", [False, True])
def test_shortcut_is_the_input(backend: str, grad: bool) -> None:
    """It may be x itself, is not written to, and gets its gradient."""
    x, ws, wt = tensors()
    x.requires_grad_(grad)
    before = x.detach().clone()
    with fastst.use_backend(backend):
        y = conv2plus1d(x, ws, wt, padding=1, residual=x, outer_activation="relu")
    wanted = F.relu(conv2plus1d(x, ws, wt, padding=1) + x)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    assert torch.equal(x, before)
    if grad:
        found, true = (torch.autograd.grad(t.square().sum(), x)[0] for t in (y, wanted))
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_with_a_norm(training: bool) -> None:
    x, ws, wt = tensors()
    residual = torch.randn_like(x)
    running = [(torch.zeros(6).double(), torch.ones(6).double()) for _ in range(2)]
    arguments: dict[str, Any] = dict(padding=1)
    y = conv2plus1d(
        x, ws, wt, norm=BatchNorm(*running[0], training=training), residual=residual,
        outer_activation="silu", **arguments,
    )  # fmt: skip
    bare = conv2plus1d(x, ws, wt, norm=BatchNorm(*running[1], training=training), **arguments)
    torch.testing.assert_close(y, F.silu(bare + residual))
    torch.testing.assert_close(running[0], running[1])
    assert torch.equal(running[0][0], torch.zeros(6).double()) != training


def test_unbatched() -> None:
    x, ws, wt = tensors()
    y = conv2plus1d(x[0], ws, wt, padding=1, residual=x[0], outer_activation="relu")
    wanted = conv2plus1d(x, ws, wt, padding=1, residual=x, outer_activation="relu")[0]
    torch.testing.assert_close(y, wanted)


def test_inference_is_one_op() -> None:
    """And so it is for the compiler, in one graph."""
    x, ws, wt = tensors(torch.float32)

    def run(x: Tensor, residual: Tensor) -> Tensor:
        return conv2plus1d(x, ws, wt, padding=1, residual=residual, outer_activation="relu")

    with torch.no_grad():
        wanted = run(x, x.flip(0))
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        calls.extend(
            str(n.target) for n in graph.graph.nodes if n.users and n.op.startswith("call")
        )
        return graph.forward

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, x.flip(0)), wanted)
    assert calls == ["fastst.conv2plus1d"]


def test_functorch_composes() -> None:
    x, ws, wt = tensors()
    run = lambda x: conv2plus1d(x, ws, wt, padding=1, residual=x, outer_activation="gelu")  # noqa: E731
    _, tangent = torch.func.jvp(run, (x,), (torch.ones_like(x),))
    numeric = (run(x + 1e-6) - run(x - 1e-6)) / 2e-6
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("residual", "error", "told"),
    [
        (torch.zeros(2, 4, 3, 5, 1).double(), ValueError, r"the output, \(2, 4, 3, 5, 6\), got"),
        (torch.zeros(1, 4, 3, 5, 6).double(), ValueError, r"got \(1, 4, 3, 5, 6\)"),
        (torch.zeros(2, 4, 3, 5, 6), TypeError, "residual must have the dtype of x"),
        (torch.zeros(2, 4, 3, 5, 6, device="meta").double(), ValueError, "on the device of x, cpu"),
        (1.0, TypeError, "residual must be a tensor, got float"),
    ],
)  # fmt: skip
def test_residual_that_does_not_fit(residual: Any, error: type[Exception], told: str) -> None:
    x, ws, wt = tensors()
    with pytest.raises(error, match=told):
        conv2plus1d(x, ws, wt, padding=1, residual=residual)


def test_unknown_activation() -> None:
    x, ws, wt = tensors()
    with pytest.raises(ValueError, match="outer_activation must be one of"):
        conv2plus1d(x, ws, wt, padding=1, outer_activation="softmax")


def test_training_op_refuses() -> None:
    """Its backward would leave them out."""
    x, ws, wt = tensors()
    spec = PairSpec(padding=(1,) * 6, outer_activation="relu")
    bare, table = spec._replace(outer_activation="none"), torch.ones(5, 4).double()
    for given, asked in (
        (PairTensors(x, ws, wt), spec),
        (PairTensors(x, ws, wt, residual=x), bare),
        (PairTensors(x, ws, wt, outer_table=table), bare._replace(outer_norm=True)),
    ):
        with pytest.raises(ValueError, match="no residual, no outer norm and no outer activation"):
            torch.ops.fastst.conv2plus1d_train(*given, *encode_spec(asked), "auto")


PLANTED: dict[str, Callable[[PairResult, Problem, PairTensors], Tensor]] = {
    "no norm": lambda r, p, t: r.y if t.residual is None else F.relu(r.y + t.residual),
    "norm last": lambda r, p, t: norms.apply_table(F.relu(r.y + t.residual), t.outer_table),  # type: ignore[arg-type, operator]
    "no residual": lambda r, p, t: F.relu(r.y) if p.spec.outer_activation == "relu" else r.y,  # type: ignore[union-attr]
    "activation first": lambda r, p, t: F.relu(r.y) + (0 if t.residual is None else t.residual),
    "into the residual": lambda r, p, t: (
        F.relu(r.y) if t.residual is None else t.residual.add_(r.y).relu_()
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_fuzz_sees_a_planted_bug(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    normed = "norm" in bug
    config = fuzz.Config(
        residual=True, outer_activation="relu", dtype=torch.float64, outer_norm=normed
    )
    fuzz.check(config, "aten", backward=False)
    monkeypatch.setattr(registered, "apply_ending", PLANTED[bug])
    with pytest.raises(AssertionError, match=r"y: error|residual was overwritten"):
        fuzz.check(config, "aten", backward=False)

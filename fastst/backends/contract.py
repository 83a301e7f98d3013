"""What a backend is: which functions it offers, what they take and what they leave.

``tensors`` may have any strides. y has the strides of ``problem.empty_output``; gradients may have
any, and a wider dtype: ``ops`` gives them those of their tensors. u is ``problem.mid_shape`` in the
dtype of x (channels beyond M are zeros); mean and var are (M,) in ``problem.accumulate_dtype``. u
is what leaves the first convolution, its bias included, before norm and activation. The mid tensor
is the same for all backends, so that forward and backward may run on different ones. With
``spec.group`` mean and var are those of all its ranks together (``backends.ranks``); gradients
are this rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..problem import activations, norms
from ..problem.conv3d import ConvProblem, ConvSpec, ConvTensors, problem_of
from ..problem.examples import of_kind, off_kinks
from ..problem.spec import (
    PairProblem,
    PairSpec,
    PairTensors,
    ParallelProblem,
    ParallelSpec,
    ParallelTensors,
    Problem,
)

Phase = Literal["forward", "backward"]
Gradients = Sequence[Tensor | None]


# What every backend honours, by name: a field that is added to a specification is in none of these,
# and so refused by all backends until each says that it knows it.
COMMON_PAIR_FIELDS = frozenset({
    "stride", "padding", "dilation", "groups", "padding_mode", "activation", "slope", "norm", "eps",
    "order", "recompute", "outer_activation",
})  # fmt: skip
COMMON_PARALLEL_FIELDS = frozenset({
    "stride", "padding", "dilation", "groups", "padding_mode", "branch_activation", "activation",
    "slope", "combine",
})  # fmt: skip
COMMON_CONV_FIELDS = frozenset({
    "stride", "padding", "dilation", "groups", "padding_mode", "input_activation", "norm",
    "activation", "slope", "eps", "norm_groups", "per_frame",
})  # fmt: skip


def by_name(tensors: Any, needs: Sequence[bool]) -> Any:
    """Whether the gradient of each tensor is asked for, by the tensor's name."""
    return type(tensors)(*needs)


class PairResult(NamedTuple):
    """What the forward pass of ``conv2plus1d`` leaves; the last three only where asked for."""

    y: Tensor
    u: Tensor | None = None  # with save and not spec.recompute
    mean: Tensor | None = None  # with norm="batch"
    var: Tensor | None = None  # with norm="batch": biased
    total: Tensor | None = None  # (), with spec.group: values per channel of all its ranks together
    outer: bool = False  # whether outer norm, residual and outer activation are in y
    out_mean: Tensor | None = None  # of y, with spec.output_statistics
    out_var: Tensor | None = None  # likewise, biased


class Begun(NamedTuple):
    """What the first pass leaves with norm="batch": fields as of ``PairResult``."""

    u: Tensor
    mean: Tensor
    var: Tensor
    total: Tensor | None = None


class ConvResult(NamedTuple):
    """What the forward pass of ``conv3d`` leaves."""

    y: Tensor
    mean: Tensor | None = None  # of x, of ``problem.statistics_shape``, where the norm takes one
    var: Tensor | None = None  # likewise: biased, or the mean of squares; None if given
    out_mean: Tensor | None = None  # of y, with spec.output_statistics
    out_var: Tensor | None = None  # likewise, biased


class ConvBackward(NamedTuple):
    """The arguments of ``conv3d_backward``."""

    problem: ConvProblem
    tensors: ConvTensors
    dy: Tensor
    mean: Tensor | None  # by which the norm has normalised x, whoever took them
    var: Tensor | None
    needs: Sequence[bool]  # of each of ``tensors``, whether its gradient is asked for

    @staticmethod
    def of(
        problem: ConvProblem,
        tensors: ConvTensors,
        result: ConvResult,
        dy: Tensor,
        needs: Sequence[bool] | None = None,
    ) -> ConvBackward:
        """Behind a forward pass; ``needs`` None: of all tensors but mean and var."""
        known = result if tensors.var is None else tensors
        if needs is None:
            given = tensors._asdict().items()
            needs = [t is not None and n not in ("mean", "var") for n, t in given]
        return ConvBackward(problem, tensors, dy, known.mean, known.var, needs)

    @property
    def need(self) -> Any:
        """``needs`` by the names of the tensors."""
        return by_name(self.tensors, self.needs)


class BatchSlice(NamedTuple):
    """What a backward call for some clips of a batch knows of the whole."""

    dx: Tensor | None  # where the gradient of x may be written, of any strides
    means: Tensor | None  # with norm="batch", (2, M): of dv and dv·(u − mean), over all ranks, too


@dataclass
class PairBackward:
    """The arguments of ``conv2plus1d_backward``."""

    problem: PairProblem
    tensors: PairTensors
    dy_owner: list[Tensor]  # [dy]: emptied once dy is read no more, so that its memory can serve
    u: Tensor | None  # None where it was not kept
    mean: Tensor | None  # with norm="batch"
    var: Tensor | None  # likewise, biased
    needs: Sequence[bool]  # of each of ``tensors``, whether its gradient is asked for
    slice: BatchSlice | None = None

    @property
    def need(self) -> Any:
        """``needs`` by the names of the tensors."""
        return by_name(self.tensors, self.needs)

    @property
    def means(self) -> Tensor | None:
        """Those of the whole batch, where this is a slice of it and they are known."""
        return None if self.slice is None else self.slice.means

    def statistics(self) -> tuple[Tensor | None, Tensor | None]:
        """Mean and variance that the norm took, if there is one."""
        if self.problem.spec.norm == "frozen":
            return self.tensors.mean, self.tensors.var
        return self.mean, self.var

    def empty_dx(self) -> Tensor:
        """Where the gradient of x is to be written."""
        if self.slice is None or self.slice.dx is None:
            return torch.empty_like(self.tensors.x)
        return self.slice.dx


class Example(NamedTuple):
    """A call to check a backend by, against float64."""

    spec: Any
    tensors: Any  # on the CPU
    run: Callable[[Any, Any], Sequence[Tensor]]  # of the problem and tensors where they are checked
    dy: Tensor | None = None  # with it, gradients are compared
    name: str = ""
    instances: Sequence[str] = ()  # kernels with their configurations, of those that it runs
    wanted: Sequence[str] | None = None  # gradients by their tensors; None: all


class Later(NamedTuple):
    """An example whose tensors are so large that they are drawn only when it is run."""

    name: str
    make: Callable[[], Example]
    instances: Sequence[str] = ()


def gradient_example(
    spec: Any,
    tensors: Any,
    gradients: Callable[[Any, Any, Tensor, Sequence[bool]], Gradients],
    name: str = "",
) -> Example:
    """An example of the gradients of all tensors but mean and var.

    Args:
        gradients: of (problem, tensors, dy, needs), an entry for each of the first tensors.
    """
    dy = problem_of(tensors, spec).empty_output(tensors.x)
    dy.copy_(torch.randn(dy.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu"))
    needs = [t is not None and n not in ("mean", "var") for n, t in tensors._asdict().items()]

    def run(problem: Any, t: Any) -> Sequence[Tensor]:
        found = gradients(problem, t, dy.to(t.x.device), needs)
        return [g for g, n in zip(found, needs, strict=False) if n and g is not None]

    return Example(spec, tensors, run, dy, name)


def no_reason(problem: Problem, phase: Phase) -> str | None:
    return None


def _no(problem: PairProblem) -> bool:
    return False


def _no_kinds(device: torch.device, dtype: torch.dtype) -> Sequence[str]:
    return ()


def no_instances(problem: Problem, phase: Phase, way: str | None = None) -> Sequence[str]:
    return ()


def _no_rehearsal(problem: Problem, phase: Phase, way: str | None) -> Sequence[Example | Later]:
    raise LookupError("what launches no kernels of its own has no rehearsal")


def _no_candidates(problem: Problem, phase: Phase) -> Sequence[str]:
    return ()


def _no_candidate(problem: Problem, phase: Phase, name: str, save: bool) -> Callable[[], object]:
    raise LookupError(f"no candidate {name!r}")


@dataclass(kw_only=True, eq=False)
class Backend:
    """One backend. None of its functions validates or chooses, and importing it fails nowhere.

    A field of a specification that a backend does not list in ``pair_fields``, ``parallel_fields``
    or ``conv_fields`` has its default value in every problem that it is given: dispatch refuses all
    others.

    Attributes:
        name: what users ask for.
        device: kind of device whose tensors "auto" offers to it, "cpu" or "gpu"; None for all.
        pair_fields: fields of ``PairSpec`` that it honours.
        parallel_fields: the same of ``ParallelSpec``.
        conv_fields: the same of ``ConvSpec``.
        why_not: why it cannot run a problem in a phase, as the end of "it …", or None.
        conv2plus1d: forward pass; the last argument: whether what backward needs is kept. With a
            residual, an outer norm or an outer activation nothing is, and the norm is none or
            frozen; a backend whose last kernel does not take them in says so in its result.
        first_pass, second_pass: ``conv2plus1d`` with norm="batch" in two calls. The first knows no
            more of the second convolution than a guess; u is kept. Both or none.
        conv2plus1d_backward: a gradient of each of the first seven tensors, None where it is not
            needed; of a batch slice those of parameters are to be added up, and stay wide.
        parallel_conv2plus1d: y.
        parallel_conv2plus1d_backward: the same of all tensors, from (problem, tensors, dy, needs).
        conv3d: forward pass; the last argument: whether a backward pass may follow, for which some
            backends round less.
        conv3d_backward: a gradient of each of ``ConvTensors`` but the residual, None where it is
            not needed.
        avoids: what of its own it does not use for a problem, and why; or None.
        why_not_auto: why "auto" passes it over although it could run the problem, or None.
        instances: kernels with their configurations, by name, that it launches for a phase of a
            problem in one of its ``candidates`` (None: in the one that calls take): each must have
            passed a self-check before "auto" takes it.
        rehearse: calls that run all of these, and as little else as may be.
        examples: the calls of a check without a problem, by its kind, dtype and device; None:
            ``usual_examples``.
        kinds: of such checks on a device in a dtype, for ``fastst.check``.
        forms_statistics: whether its ``conv3d`` gives those of y without reading y again.
        gives_output_statistics: whether it gives those of y without reading y again.
        norm_backward: gradients of y, weight and bias of v, the batch norm of y by its own
            statistics, from (dv, y, mean, var, weight, eps, needs); None where PyTorch's are as
            good.
        mid_tensors_alive: how many tensors as large as u its backward makes at once where u was not
            kept; None: the batch is never cut.
        candidates: names of the ways to run a problem among which ``tune`` may choose.
        candidate: a function that runs one of them once on random tensors, and waits for nothing;
            the last argument: whether a forward pass keeps what backward needs.
    """

    name: str
    device: str | None = None
    pair_fields: frozenset[str]
    parallel_fields: frozenset[str] = field(default_factory=frozenset)
    conv_fields: frozenset[str] = field(default_factory=frozenset)
    why_not: Callable[[Problem, Phase], str | None]
    conv2plus1d: Callable[[PairProblem, PairTensors, bool], PairResult]
    conv2plus1d_backward: Callable[[PairBackward], Gradients]
    first_pass: Callable[[PairProblem, PairTensors], Begun] | None = None
    second_pass: Callable[[PairProblem, PairTensors, Begun], PairResult] | None = None
    parallel_conv2plus1d: Callable[[ParallelProblem, ParallelTensors], Tensor] | None = None
    parallel_conv2plus1d_backward: (
        Callable[[ParallelProblem, ParallelTensors, Tensor, Sequence[bool]], Gradients] | None
    ) = None
    conv3d: Callable[[ConvProblem, ConvTensors, bool], ConvResult] | None = None
    conv3d_backward: Callable[[ConvBackward], Gradients] | None = None
    avoids: Callable[[Problem, Phase], str | None] = no_reason
    why_not_auto: Callable[[Problem, Phase], str | None] = no_reason
    instances: Callable[[Problem, Phase, str | None], Sequence[str]] = no_instances
    rehearse: Callable[[Problem, Phase, str | None], Sequence[Example | Later]] = _no_rehearsal
    examples: Callable[[str, torch.dtype, torch.device], Sequence[Example | Later]] | None = None
    kinds: Callable[[torch.device, torch.dtype], Sequence[str]] = _no_kinds
    forms_statistics: bool = False
    gives_output_statistics: Callable[[PairProblem], bool] = _no
    norm_backward: Callable[..., list[Tensor | None] | None] | None = None
    mid_tensors_alive: Callable[[PairProblem], int] | None = None
    candidates: Callable[[Problem, Phase], Sequence[str]] = _no_candidates
    candidate: Callable[[Problem, Phase, str, bool], Callable[[], object]] = _no_candidate

    def __post_init__(self) -> None:
        for spec, fields in (
            (PairSpec, self.pair_fields),
            (ParallelSpec, self.parallel_fields),
            (ConvSpec, self.conv_fields),
        ):
            if unknown := fields - set(spec._fields):
                raise TypeError(
                    f"backend {self.name!r} honours {', '.join(sorted(unknown))}, which are no "
                    f"fields of {spec.__name__}"
                )

    def usual_examples(self, kind: str, dtype: torch.dtype) -> list[Example]:
        """One call of a kind of ``problem.examples``; with " backward" behind it, its gradients."""
        kind, _, phase = kind.partition(" ")
        spec, tensors = of_kind(kind, dtype)
        if phase == "backward":
            return [gradient_example(spec, off_kinks(spec, tensors), self._gradients)]
        if kind == "conv3d":
            assert self.conv3d is not None
            conv3d = self.conv3d
            return [Example(spec, tensors, lambda p, t: [conv3d(p, t, False).y])]
        if kind == "parallel":
            assert self.parallel_conv2plus1d is not None
            parallel = self.parallel_conv2plus1d
            return [Example(spec, tensors, lambda p, t: [parallel(p, t)])]
        return [Example(spec, tensors, lambda p, t: [self.conv2plus1d(p, t, False).y])]

    def _gradients(
        self, problem: Any, tensors: Any, dy: Tensor, needs: Sequence[bool]
    ) -> Gradients:
        if isinstance(problem, ParallelProblem):
            assert self.parallel_conv2plus1d_backward is not None
            return self.parallel_conv2plus1d_backward(problem, tensors, dy, needs)
        if isinstance(problem, ConvProblem):
            assert self.conv3d is not None and self.conv3d_backward is not None
            result = self.conv3d(problem, tensors, True)
            return self.conv3d_backward(ConvBackward.of(problem, tensors, result, dy, needs))
        _, u, mean, var, *_ = self.conv2plus1d(problem, tensors, True)
        return self.conv2plus1d_backward(PairBackward(problem, tensors, [dy], u, mean, var, needs))

    def why_unhonoured(self, spec: PairSpec | ParallelSpec | ConvSpec) -> str | None:
        """Which setting of a specification it does not know, as the end of "it …", or None."""
        if isinstance(spec, ParallelSpec) and self.parallel_conv2plus1d is None:
            return "has no parallel_conv2plus1d"
        if isinstance(spec, ConvSpec) and self.conv3d is None:
            return "has no conv3d"
        honoured = self.pair_fields
        if not isinstance(spec, PairSpec):
            honoured = self.conv_fields if isinstance(spec, ConvSpec) else self.parallel_fields
        for name, value in spec._asdict().items():
            if name not in honoured and value != spec._field_defaults[name]:
                return f"does not know {name}={value!r}"
        return None


def apply_ending(result: PairResult, problem: PairProblem, tensors: PairTensors) -> Tensor:
    """y with what is to become of it, where the backend has not done it: the norm, and in place
    the residual and the outer activation."""
    y, spec = result.y, problem.spec
    if result.outer:
        return y
    if tensors.outer_table is not None:
        y = norms.apply_table(y, tensors.outer_table)
    if tensors.residual is not None:
        y = y.add_(tensors.residual)
    return activations.apply(spec.outer_activation, y, spec.slope, inplace=True)

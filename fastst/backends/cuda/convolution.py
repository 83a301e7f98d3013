"""``conv3d`` on the generic kernels: one pass, with taps in time, height and width.

z exists nowhere: norm and activation are computed as x is read, frames before x are read where they
lie, bias, residual and activation are of the kernel that writes y. Backward writes dv = act'(v)·dz
and then, in its place, the gradient of x.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...problem import norms
from ...problem.conv3d import ConvProblem, ConvTensors
from ..contract import ConvBackward, ConvResult, Gradients
from .library import Launcher, launching


def conv3d(problem: ConvProblem, tensors: ConvTensors, train: bool = False) -> ConvResult:
    spec, t = problem.spec, tensors
    with launching(problem) as k:
        mean, var = t.mean, t.var
        if spec.norm != "none" and var is None:
            mean, var = _moments(k, spec.norm_form, t.x)
        y = problem.empty_output(t.x)
        z = _Read(k, problem, t, mean, var).z(spec.input_activation, t.past)
        residual = None if t.residual is None else k.plain(t.residual)
        branch = k.branch(z, t.weight, t.bias, problem.conv)
        k.tap_conv([branch], [y], "forward", spec.activation, residual)
        out = k.statistics(y) if spec.output_statistics else ()
    taken = (mean, var) if t.var is None else (None, None)
    return ConvResult(y, *taken, *out)


def _moments(k: Launcher, norm: norms.Norm, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """As ``norms.moments``."""
    if norms.by_position(norm.kind):
        return k.position_moments(x, norms.is_centred(norm.kind))
    sets = norms.sets_of(norm, x.shape)
    return norms.of_sets(norm, *k.statistics_of_sets(x, sets.number), x.shape)


class _Read:
    """x as the convolution reads it."""

    def __init__(
        self, k: Launcher, problem: ConvProblem, t: ConvTensors, mean: Tensor | None,
        var: Tensor | None,
    ) -> None:  # fmt: skip
        self.k, self.x, self.channels = k, t.x, problem.in_channels
        self.norm = problem.spec.norm_form._replace(weight=t.norm_weight, bias=t.norm_bias)
        self.var, self.wide = var, problem.accumulate_dtype
        self.table: Tensor | None = None  # (5, C) of all sets, or of each
        self.positions: Tensor | None = None  # (2, N, T, H, W)
        if var is not None:
            self.table, self.positions = norms.tables(
                self.norm, self.channels, mean, var, self.wide
            )

    def z(self, activation: str, past: Tensor | None = None) -> Any:
        return self.k.norm_act(self.x, self.table, activation, self.positions, past)

    def norm_backward(self, dv: Tensor, dx: bool) -> tuple[Tensor, Tensor]:
        """Gradients of γ and β, and that of x, where it is asked for, in the place of dv."""
        by_position = norms.by_position(self.norm.kind)
        sets = norms.sets_of(self.norm, self.x.shape)
        sums = self.k.sums_of_sets(self.k.plain(dv), dv.shape, sets.number, self.z("none"))
        if not by_position:  # so far of what is not divided by the deviation
            sums[1] *= self._rstd()
        dbeta, dgamma = sums.sum(1)
        if dx:
            of_positions = self._position_table(dv) if by_position else None
            if self.norm.kind in ("batch", "group"):
                self._fill_table(sums, sets)
            read = self.k.norm_gradient(dv, self.x, self.table, of_positions)
            self.k.write_source(read, dv)
        return dgamma, dbeta

    def _rstd(self) -> Tensor:
        """(sets, C)."""
        assert self.var is not None
        r = norms.rstd(self.norm, self.var.to(self.wide), self.channels)
        return norms.of_channels(self.norm, r, self.channels).reshape(-1, self.channels)

    def _fill_table(self, sums: Tensor, sets: norms.Sets) -> None:
        """Fill p and q of the tables: dx = r·(γ·dv − mean of γ·dv − x̂·mean of γ·dv·x̂).

        Args:
            sums: (2, sets, C) of dv and dv·x̂.
        """
        assert self.table is not None
        groups = self.norm.groups if self.norm.kind == "group" else self.channels
        each = self.channels // groups
        weighted = sums if self.norm.weight is None else sums * self.norm.weight
        means = weighted.view(2, sets.number, groups, each).sum(-1) / (sets.length * each)
        centre, slope = means.repeat_interleave(each, -1)
        r, rows = self._rstd(), self.table.view(-1, 5, self.channels)
        rows[:, 3], rows[:, 4] = -r * r * slope, -r * centre

    def _position_table(self, dv: Tensor) -> Tensor:
        """(4, N, T, H, W): mean and factor, mean of γ·dv and mean of γ·dv·x̂ of each position."""
        assert self.positions is not None and self.var is not None
        means = self.k.position_sums(dv, self.z("none"), norms.is_centred(self.norm.kind))
        if self.norm.kind == "l2":  # where the norm is held at its least it is a constant
            means[1] *= self.var.to(self.wide).sqrt() >= self.norm.eps / math.sqrt(self.channels)
        return torch.cat((self.positions, means))


def conv3d_backward(call: ConvBackward) -> Gradients:
    problem, t, need = call.problem, call.tensors, call.need
    spec, frames = problem.spec, problem.size[0]
    dx = dw = db = dgamma = dbeta = dpast = None
    with launching(problem) as k:
        read, dy = _Read(k, problem, t, call.mean, call.var), k.plain(call.dy)
        if need.weight:
            z = read.z(spec.input_activation, t.past)
            positions = problem.batch * math.prod(problem.out_size)
            dw = k.weight_gradient(z, dy, problem.conv, t.weight, positions)
        if need.bias:
            db = k.sums(dy, call.dy.shape)[0]
        branch = [k.branch(dy, t.weight, None, problem.conv)]
        if need.past:
            assert t.past is not None
            dpast = torch.empty_like(t.past)
            k.tap_conv(branch, [dpast], transposed=True, around=(0, frames))
        if need.x or need.norm_weight or need.norm_bias:
            dx = torch.empty_like(t.x)  # dv, until it has gone through the norm
            k.tap_conv(
                branch, [dx], "norm_gradient", aux=read.z(spec.input_activation), transposed=True,
                around=(problem.past, 0),
            )  # fmt: skip
            if spec.norm != "none":
                dgamma, dbeta = read.norm_backward(dx, need.x)
    return dx, dw, db, dgamma, dbeta, None, None, dpast

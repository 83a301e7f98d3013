"""Batch norms whose statistics in training are those of all ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..backends.ranks import SyncedNorm, update_running
from ..machine import devices


class SyncBatchNorm(_BatchNorm):
    """Batch norm with training statistics over all ranks of ``process_group`` together.

    ``nn.SyncBatchNorm`` for any device (PyTorch's own refuses the CPU). Ranks may hold different
    numbers of values. Outside of a process group, alone in one, and in evaluation, it is a plain
    batch norm.

    Raises:
        ValueError: in training, one value per channel in all ranks together.
    """

    process_group: Any = None  # None: the whole world

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm requires (N, C, ...), got {tuple(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not group_name(self):
            return super().forward(x)
        self._check_input_dim(x)
        group = self.process_group or dist.group.WORLD
        y, mean, var, n = SyncedNorm.apply(x, self.weight, self.bias, self.eps, group)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        update_running(self.running_mean, self.running_var, mean, var, n, momentum)
        return y


def sync_batch_norm(model: nn.Module, group: Any = None) -> nn.Module:
    """Let every batch norm of a model take its training statistics over all ranks, in place.

    As ``nn.SyncBatchNorm.convert_sync_batchnorm``, but on the CPU too, and modules and parameters
    stay the same objects. On a GPU the class is PyTorch's, which has kernels of its own there.

    Args:
        group: process group; None for the whole world.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            on_gpu = module.weight is not None and devices.is_gpu(module.weight.device)
            kind = nn.SyncBatchNorm if on_gpu else SyncBatchNorm
            object.__setattr__(module, "__class__", kind)
            module.process_group = group
    return model


def group_name(norm: nn.Module) -> str:
    """Name of the process group over which a norm takes its statistics; "" if over its own batch.

    The name is plain data that an op can be told; ``resolve`` gives the group back.
    """
    if not isinstance(norm, nn.SyncBatchNorm | SyncBatchNorm) or not norm.training:
        return ""
    if not dist.is_available() or not dist.is_initialized():
        return ""
    group: Any = norm.process_group or dist.group.WORLD
    return str(group.group_name) if dist.get_world_size(group) > 1 else ""

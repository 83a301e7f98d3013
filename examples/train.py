"""Train a network of ``fastst.models`` on videos: on one device, or several under ``torchrun``.

    python examples/train.py kinetics --model r2plus1d_18         # kinetics/{train,val}/CLASS/FILE
    python examples/train.py videos --train-list trainlist01.txt --val-list testlist01.txt
    torchrun --nproc-per-node 8 examples/train.py kinetics --amp bf16 --sync-bn
    python examples/train.py                                      # without videos: moving digits

A run that was stopped goes on with ``--resume`` as if it had not been: the same losses follow.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import videos
from checkpoints import CheckpointError, read_checkpoint, write_checkpoint
from options import AMP, OptionError, Options
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import fastst
from fastst import models
from fastst.distributed import sync_batch_norm

MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # of Kinetics-400


class Data(NamedTuple):
    """Data sets as ``videos.Clips``, and what evaluation counts."""

    train: Dataset[dict[str, Any]]
    val: Dataset[dict[str, Any]]
    classes: list[str]
    # Of probabilities (N, classes) and labels (N,): whether each video counts, (N,) bool.
    scores: dict[str, Callable[[Tensor, Tensor], Tensor]]


def top(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    def among(probabilities: Tensor, labels: Tensor) -> Tensor:
        best = probabilities.topk(min(k, probabilities.shape[1])).indices
        return (best == labels[:, None]).any(1)

    return among


def load_data(options: Options) -> Data:
    """The data sets that the options name.

    Raises:
        videos.DataError: one cannot be used.
    """
    lists = options.train_list, options.val_list
    if options.data is None and (*lists, options.classes) != (None, None, None):
        raise videos.DataError("--train-list, --val-list and --classes require the folder DATA")
    if options.classes is not None and None in lists:
        raise videos.DataError("--classes requires --train-list and --val-list")
    if options.data is None:
        from digits import MovingDigits, same_direction

        sizes = options.frames, options.size
        train = MovingDigits(1536, *sizes, train=True, seed=options.seed)
        val = MovingDigits(384, *sizes, train=False)
        return Data(train, val, train.classes, {"top1": top(1), "direction": same_direction})
    classes = None if options.classes is None else videos.read_classes(options.classes)
    if options.train_list is not None and options.val_list is not None:
        train_listing = videos.read_list(options.train_list, options.data, classes)
        val_listing = videos.read_list(
            options.val_list, options.data, classes or train_listing.classes
        )
    elif options.train_list is None and options.val_list is None:
        train_listing = videos.read_folder(options.data / "train")
        val_listing = videos.read_folder(options.data / "val")
        if train_listing.classes != val_listing.classes:
            odd = sorted(set(train_listing.classes) ^ set(val_listing.classes))
            raise videos.DataError(
                f"{options.data}: train and val must have the same classes, {len(odd)} are in one "
                f"only, for example {odd[0]!r}"
            )
    else:
        raise videos.DataError("requires --train-list and --val-list, or neither of them")
    sizes = options.frames, options.step, options.size
    return Data(
        videos.Clips(train_listing, *sizes, True, flip=options.flip, seed=options.seed),
        videos.Clips(val_listing, *sizes, False, clips=options.clips),
        train_listing.classes,
        {"top1": top(1), "top5": top(5)},
    )


class World(NamedTuple):
    """This process among those that ``torchrun`` started."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> World:
        """
        Raises:
            OptionError: there is no such device here.
        """
        ranked = "RANK" in os.environ
        own = f":{os.environ['LOCAL_RANK']}" if ranked and device == "cuda" else ""
        try:
            local = torch.device(device + own)
            torch.zeros(1, device=local).item()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise OptionError(f"--device {device} cannot be used here: {reason}") from error
        if not ranked:
            return cls(0, 1, local)
        if device == "cuda":
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), local)

    def sum(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: set[str]) -> set[str]:
        if self.size == 1:
            return values
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, values)
        return set().union(*parts)


def build_model(options: Options, classes: list[str]) -> nn.Module:
    """The network, with weights where given.

    Raises:
        OptionError: it does not take clips of this size.
        CheckpointError: the weights are of other classes or another network.
    """
    kwargs = {} if options.width is None else {"width": options.width}
    clips = options.batch, 3, options.frames, options.size, options.size
    with torch.device("meta"):  # shapes alone
        trial = models.NETWORKS[options.model](len(classes), **kwargs)
        try:
            trial.train(not options.sync_bn)(torch.empty(clips))
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise OptionError(
                f"{options.model} does not take clips of {clips}: {reason}"
            ) from error
    model = models.NETWORKS[options.model](len(classes), **kwargs)
    if options.weights is not None:
        found = read_checkpoint(options.weights)
        state = found.get("model", found)
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise CheckpointError(f"{options.weights} has no state_dict")
        if options.new_classifier:
            last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
            own = {k: t for k, t in model.state_dict().items() if k.rpartition(".")[0] == last}
            state = {**state, **own}
        elif "classes" in found:
            check_classes(options.weights, found["classes"], classes)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = shorten(str(error), 300)
            raise CheckpointError(
                f"{options.weights} does not fit {options.model}: {reason}"
            ) from error
    return model


def check_classes(path: Path, found: list[str], wanted: list[str]) -> None:
    if found != wanted:
        odd = next((pair for pair in zip(found, wanted) if pair[0] != pair[1]), None)  # noqa: B905
        detail = f"{odd[0]!r} there is {odd[1]!r} here" if odd else "the rest are equal"
        raise CheckpointError(
            f"{path} was trained on {len(found)} classes, the data has {len(wanted)}: {detail}; "
            "--new-classifier with --weights starts on other classes"
        )


def parallelise(model: nn.Module, options: Options, world: World) -> nn.Module:
    """The model on its device, as one of the processes' replicas or shards."""
    model = model.to(world.device)
    if options.sync_bn:
        sync_batch_norm(model)
    if options.convert:
        fastst.convert(model)
    if world.size == 1:
        return model
    if options.parallel == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients_stay(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Within it gradients are only exchanged for the last of the accumulated batches."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def to_input(clips: Tensor, device: torch.device) -> Tensor:
    """Normalised float32 of (..., 3, T, H, W) bytes."""
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1, 1) for v in (MEAN, STD))
    return (clips.to(device, non_blocking=True).float() / 255 - mean) / std


class Trainer:
    """A run: the model, its optimiser, the data, and how far it has come."""

    def __init__(self, options: Options, data: Data, model: nn.Module, world: World) -> None:
        self.options, self.data, self.world = options, data, world
        self.model = parallelise(model, options, world)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), options.lr, options.momentum,
            weight_decay=options.weight_decay, nesterov=options.momentum > 0,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.amp == "fp16")
        share = options.batch * options.accumulate
        self.train_share = videos.Shares(
            len(data.train), world.rank, world.size, share, seed=options.seed  # type: ignore[arg-type]
        )  # fmt: skip
        self.steps = len(self.train_share) // share  # of an epoch
        if not self.steps:
            raise videos.DataError(
                f"{len(data.train)} training videos are too few for one step of {share} clips on "  # type: ignore[arg-type]
                f"each of {world.size} devices"
            )
        self.epoch, self.step = 0, 0  # step within the epoch
        self.history: list[dict[str, float]] = []  # of each epoch
        self.losses: list[float] = []  # of this process' life, one per entry in the log
        self.unusable: set[str] = set()
        self.best = -1.0

    # ---- checkpoints

    def save(self, name: str) -> None:
        """Write a checkpoint; the one before is there until the new one is complete."""
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = {
            "model": get_model_state_dict(self.model, options=full),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=full),
            "scaler": self.scaler.state_dict(),
            "network": [self.options.model, self.options.width],
            "classes": self.data.classes,
            "epoch": self.epoch, "step": self.step, "steps": self.steps,
            "history": self.history, "best": self.best, "unusable": sorted(self.unusable),
        }  # fmt: skip
        if self.world.rank == 0:
            write_checkpoint(self.options.out / name, state)

    def load(self, path: Path) -> None:
        """Go on where a checkpoint was written.

        Raises:
            CheckpointError: it is damaged, or of another run.
        """
        found = read_checkpoint(path)
        if not found.keys() >= {
            "model", "optimizer", "scaler", "network", "classes", "epoch", "step", "steps",
            "history", "best", "unusable",
        }:  # fmt: skip
            raise CheckpointError(f"{path} is no checkpoint of a run; --weights takes a state_dict")
        network = [self.options.model, self.options.width]
        if found["network"] != network:
            raise CheckpointError(f"{path} is of {found['network']}, this run is of {network}")
        check_classes(path, found["classes"], self.data.classes)
        if found["step"] and found["steps"] != self.steps:
            raise CheckpointError(
                f"{path} stopped within an epoch of {found['steps']} steps, this run's have "
                f"{self.steps}: resume with the same batch, accumulation and number of processes"
            )
        full = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, found["model"], options=full)
        set_optimizer_state_dict(self.model, self.optimizer, found["optimizer"], options=full)
        self.scaler.load_state_dict(found["scaler"])
        self.epoch, self.step, self.best = found["epoch"], found["step"], found["best"]
        self.history, self.unusable = found["history"], set(found["unusable"])

    # ---- training

    def run(self) -> list[dict[str, float]]:
        """All epochs that are left; the figures of every epoch."""
        options, first = self.options, self.world.rank == 0
        log = SummaryWriter(str(options.out)) if first else None
        for _ in range(self.epoch, options.epochs):
            loss = self.train_epoch(log)
            figures = {"loss": loss, **self.evaluate()}
            self.epoch, self.step = self.epoch + 1, 0
            self.history.append(figures)
            if log is not None:
                for name, value in figures.items():
                    log.add_scalar(f"epoch/{name}", value, self.epoch)
                log.add_scalar("epoch/unusable files", len(self.unusable), self.epoch)
                log.flush()
                shown = ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
                tqdm.write(f"epoch {self.epoch}/{options.epochs}: {shown}")
            if figures["top1"] > self.best:
                self.best = figures["top1"]
                self.save("best.pt")
            self.save("last.pt")
        if log is not None:
            log.close()
            if self.unusable:
                tqdm.write(f"{len(self.unusable)} files could not be used:")
                tqdm.write("\n".join(sorted(self.unusable)))
        return self.history

    def train_epoch(self, log: SummaryWriter | None) -> float:
        """Mean loss over the steps of the epoch that were run."""
        options, world = self.options, self.world
        self.model.train()
        batches = self.batches(self.data.train, self.train_share)
        sums = torch.zeros(3, device=world.device)  # of the epoch's losses; steps; since the log
        bar = tqdm(
            total=self.steps, initial=self.step, desc=f"epoch {self.epoch + 1}", leave=False,
            disable=world.rank != 0 or None,
        )  # fmt: skip
        while self.step < self.steps:
            # What a step draws depends on its place alone, not on what ran before.
            place = (options.seed, self.epoch, self.step, world.rank)
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
            rate = self.learning_rate()
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            for i in range(options.accumulate):
                clips, labels = next(batches)
                with gradients_stay(self.model, last=i == options.accumulate - 1):
                    loss = F.cross_entropy(self.forward(clips[:, 0]), labels)
                    self.scaler.scale(loss / options.accumulate).backward()
                sums += torch.stack((loss.detach(), loss.new_ones(()), loss.detach()))
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            bar.update()
            if self.step % options.log_every == 0:
                recent = sums[2].clone() / (options.log_every * options.accumulate)
                self.losses.append(float(world.sum(recent)) / world.size)
                sums[2] = 0
                bar.set_postfix(loss=f"{self.losses[-1]:.4f}", lr=f"{rate:.2e}")
                if log is not None:
                    at = self.epoch * self.steps + self.step
                    log.add_scalar("step/loss", self.losses[-1], at)
                    log.add_scalar("step/learning rate", rate, at)
            if (
                options.save_every
                and self.step % options.save_every == 0
                and self.step < self.steps
            ):
                self.save("last.pt")
        bar.close()
        world.sum(sums)
        return float(sums[0] / sums[1].clamp(min=1))

    def learning_rate(self) -> float:
        """Linear warm-up, then half a cosine."""
        options = self.options
        epoch = self.epoch + (self.step + 1) / self.steps
        if epoch < options.warmup:
            return options.lr * epoch / options.warmup
        left = max(options.epochs - options.warmup, 1e-9)
        return options.lr * (1 + float(np.cos(np.pi * (epoch - options.warmup) / left))) / 2

    def forward(self, clips: Tensor) -> Tensor:
        """Logits in float32."""
        dtype = AMP[self.options.amp]
        with torch.autocast(self.world.device.type, dtype, enabled=dtype is not None):
            return self.model(to_input(clips, self.world.device)).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Shares of the evaluation videos that count, by name of the score."""
        self.model.eval()
        share = videos.Shares(
            len(self.data.val), self.world.rank, self.world.size, self.options.batch  # type: ignore[arg-type]
        )  # fmt: skip
        sums = torch.zeros(1 + len(self.data.scores), device=self.world.device)
        for clips, labels in self.batches(self.data.val, share):
            # As many clips at a time as in training; the same number of calls on every rank.
            chunks = clips.flatten(0, 1).split(self.options.batch)
            p = torch.cat([self.forward(c).softmax(1) for c in chunks])
            p = p.view(*clips.shape[:2], -1).mean(1)
            valid = labels != videos.NO_LABEL
            sums[0] += valid.sum()
            for i, score in enumerate(self.data.scores.values(), 1):
                sums[i] += score(p[valid], labels[valid]).sum()
        self.world.sum(sums)
        if not sums[0]:
            raise videos.DataError("none of the evaluation videos can be used")
        return {
            name: float(s / sums[0]) for name, s in zip(self.data.scores, sums[1:], strict=True)
        }

    def batches(
        self, data: Dataset[dict[str, Any]], share: videos.Shares
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Clips and labels on the device; notes files that could not be used."""
        share.epoch = data.epoch = self.epoch  # type: ignore[attr-defined]
        if share is self.train_share:
            share.start = self.step * self.options.batch * self.options.accumulate
        device = self.world.device
        loader = DataLoader(
            data, self.options.batch, sampler=share, num_workers=self.options.workers,
            pin_memory=device.type == "cuda",
        )  # fmt: skip
        for batch in videos.iterate(loader):
            found = {line for text in batch["unusable"] for line in text.splitlines()}
            for line in sorted(found - self.unusable):
                tqdm.write(f"skipped {line}", file=sys.stderr)
            self.unusable |= found
            yield batch["clips"].to(device, non_blocking=True), batch["label"].to(device)
        self.unusable = self.world.gather(self.unusable)


def train(options: Options, data: Data | None = None) -> Trainer:
    """Run what the options say.

    Raises:
        OptionError, videos.DataError, CheckpointError: settings, data or checkpoints that cannot be
            used.
        OSError: of the folder of the run.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    world = World.join(options.device)
    data = load_data(options) if data is None else data
    last = options.out / "last.pt"
    if last.exists() and not options.resume:
        raise CheckpointError(f"{last} exists: --resume goes on from it, another --out starts anew")
    torch.manual_seed(options.seed)
    trainer = Trainer(options, data, build_model(options, data.classes), world)
    if options.resume:
        trainer.load(last)
    trainer.run()
    return trainer


def main(arguments: list[str] | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):  # no name of a file or class ends a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        train(Options.parse(__doc__, arguments))
    except (OptionError, videos.DataError, CheckpointError, OSError) as error:
        sys.exit(f"train: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

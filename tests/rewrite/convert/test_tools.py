"""What other tools do to models, before and after conversion, gives what it gives without it."""

from __future__ import annotations

import copy
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import fastst
from tests.support.peers import peft
from tests.support.ranks import SIZE, Ranks

DTYPE = torch.float64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.space = nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.norm = nn.BatchNorm3d(6)
        self.relu = nn.ReLU(inplace=True)
        self.time = nn.Conv3d(6, 4, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.time(self.relu(self.norm(self.space(x))))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3, 4)))


def network() -> Network:
    torch.manual_seed(0)
    model = Network().to(DTYPE)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm3d):
            nn.init.normal_(m.bias)
    return model


def clip(n: int = 2) -> Tensor:
    return torch.randn(n, 4, 4, 6, 5, generator=torch.Generator().manual_seed(1), dtype=DTYPE)


def pairs(call: Callable[[], Any]) -> int:
    """How many pairs a call runs as one operation."""
    with fastst.dispatch.recording() as calls:
        call()
    return sum(c.what == "conv2plus1d" and c.phase == "forward" for c in calls)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of a training step."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads, **dict(model.named_buffers())}


def assert_same(plain: nn.Module, converted: nn.Module) -> None:
    """A training step and then inference, by both."""
    a, b = step(plain, clip()), step(converted, clip())
    assert list(a) == list(b)
    for name, t in a.items():
        torch.testing.assert_close(b[name], t, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m)
    with torch.no_grad():
        ours, true = converted.eval()(clip()), plain.eval()(clip())
    torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-9)


def convs(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (m, n) for m in model.modules() for n, c in m.named_children() if isinstance(c, nn.Conv3d)
    ]


# ---- tools that change modules


class Lora(nn.Module):
    """A low-rank term beside a frozen convolution."""

    def __init__(self, base: nn.Conv3d, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv3d(
            base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False
        ).to(base.weight)
        self.up = nn.Conv3d(rank, base.out_channels, 1, bias=False).to(base.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Conv3d:
        delta = torch.einsum("ki,icthw->kcthw", self.up.weight[:, :, 0, 0, 0], self.down.weight)
        with torch.no_grad():
            self.base.weight += delta
        return self.base


def lora(model: nn.Module) -> None:
    torch.manual_seed(3)
    for parent, name in convs(model):
        setattr(parent, name, Lora(getattr(parent, name)))


def merged_lora(model: nn.Module) -> None:
    lora(model)
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, Lora):
                setattr(parent, name, child.merged())


def peft_lora(model: nn.Module) -> None:
    library = peft()
    torch.manual_seed(3)
    found = library.get_peft_model(
        model, library.LoraConfig(r=2, target_modules=["space", "time"], init_lora_weights=False)
    )
    assert found.get_base_model() is model


def pruned(model: nn.Module) -> None:
    for parent, name in convs(model):
        prune.l1_unstructured(getattr(parent, name), "weight", 0.5)


def pruned_for_good(model: nn.Module) -> None:
    pruned(model)
    for parent, name in convs(model):
        prune.remove(getattr(parent, name), "weight")


def weight_norm(model: nn.Module) -> None:
    for parent, name in convs(model):
        parametrizations.weight_norm(getattr(parent, name))


def older_weight_norm(model: nn.Module) -> None:
    for parent, name in convs(model):
        nn.utils.weight_norm(getattr(parent, name))


def weight_norm_removed(model: nn.Module) -> None:
    weight_norm(model)
    for parent, name in convs(model):
        nn.utils.parametrize.remove_parametrizations(getattr(parent, name), "weight")


def spectral_norm(model: nn.Module) -> None:
    torch.manual_seed(4)
    for parent, name in convs(model):
        parametrizations.spectral_norm(getattr(parent, name))


def replaced_modules(model: nn.Module) -> None:
    torch.manual_seed(5)
    for m in model.modules():
        if isinstance(m, Block):
            m.relu, m.norm = nn.SiLU(), nn.BatchNorm3d(6, eps=0.1).to(DTYPE)
            m.time = nn.Conv3d(6, 4, (5, 1, 1), padding=(2, 0, 0)).to(DTYPE)


def replaced_weights(model: nn.Module) -> None:
    for parent, name in convs(model):
        conv = getattr(parent, name)
        conv.weight = nn.Parameter(0.7 * conv.weight.detach())


def loaded(model: nn.Module) -> None:
    model.load_state_dict({n: 0.9 * t for n, t in model.state_dict().items()}, assign=True)


def frozen(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm3d):
            m.eval().requires_grad_(False)


def gradient_hooks(model: nn.Module) -> None:
    def doubles(p: Tensor) -> None:
        p.grad.mul_(2.0)  # type: ignore[union-attr]

    for p in model.parameters():
        p.register_hook(lambda g: 0.25 * g)
        p.register_post_accumulate_grad_hook(doubles)


def scaled_forward(model: nn.Module) -> None:
    for parent, name in convs(model):
        getattr(parent, name).register_forward_hook(lambda m, args, y: 1.5 * y)


CHANGES = {
    f.__name__: f
    for f in (
        lora, merged_lora, peft_lora, pruned, pruned_for_good, weight_norm, older_weight_norm,
        weight_norm_removed, spectral_norm, replaced_modules, replaced_weights, loaded, frozen,
        gradient_hooks, scaled_forward,
    )
}  # fmt: skip


@pytest.mark.parametrize("order", ["before", "after", "between"])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::fastst.FallbackWarning")
def test_tools_that_change_modules(name: str, order: str) -> None:
    """Before conversion, after it, or after it has run."""
    plain, converted = network(), network()
    if order == "between":
        for model in (plain, converted):
            model.eval()(clip())
            model.train()
        fastst.convert(converted)
        step(converted, clip())
        step(plain, clip())
        for model in (plain, converted):
            model.zero_grad()
    for model in (plain, converted):
        if model is converted and order == "after":
            fastst.convert(converted)
        CHANGES[name](model)
        if model is converted and order == "before":
            fastst.convert(converted)
    assert_same(plain, converted)


def test_pairs_run_again_when_a_tool_is_done() -> None:
    for change in (pruned_for_good, weight_norm_removed, merged_lora, replaced_weights, loaded):
        model = network()
        fastst.convert(model)
        change(model)
        assert pairs(lambda m=model: m(clip())) == 2, change.__name__
    assert pairs(lambda: network()(clip())) == 0


# ---- tools that copy models


def test_averaged_models_and_teachers() -> None:
    """An average of weights is taken of converted models, and read after it has moved on."""
    outputs = []
    for convert in (False, True):
        student = network().blocks
        if convert:
            fastst.convert(student)
        teacher: Any = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        optimizer = torch.optim.SGD(student.parameters(), 0.01)
        seen = []
        for _ in range(3):
            with torch.no_grad():
                target = teacher.module[0].time(teacher.module[0].space(clip()))
            loss = F.mse_loss(student(clip()), clip())
            loss.backward()
            optimizer.step()
            teacher.update_parameters(student)
            seen.append(target.sum() + (target * loss.detach()).mean())
        outputs.append(torch.stack([*seen, teacher(clip()).sum()]))
        if convert:
            assert pairs(lambda t=teacher: t(clip())) == 2
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)


def test_classes_by_name_and_type() -> None:
    """accelerate, FSDP's policies, quantisation and FLOP tables look modules up by class."""
    model = network()
    before = [(n, type(m), type(m).__name__, m.forward.__func__) for n, m in model.named_modules()]
    fastst.convert(model)
    model(clip())
    after = [(n, type(m), type(m).__name__, m.forward.__func__) for n, m in model.named_modules()]
    assert before == after
    assert {type(m) for m in model.modules()} >= {Block, nn.Conv3d, nn.BatchNorm3d}


def test_quantisation_fuses_norms_and_observes() -> None:
    outputs = []
    for convert in (False, True):
        model = network().float().eval()
        if convert:
            fastst.convert(model)
            model(clip().float())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for block in model.blocks:
                torch.ao.quantization.fuse_modules(block, [["space", "norm", "relu"]], inplace=True)
            fused = model(clip().float())
            model.qconfig = torch.ao.quantization.default_qconfig  # type: ignore[assignment]
            torch.ao.quantization.prepare(model, inplace=True)
            observed = model(clip().float())
        scales = [
            m.activation_post_process.min_val
            for m in model.modules() if hasattr(m, "activation_post_process")
        ]  # fmt: skip
        assert len(scales) >= 4
        outputs.append(torch.cat([fused.flatten(), observed.flatten(), torch.stack(scales)]))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_flop_counters_count_what_they_counted(training: bool) -> None:
    counts = []
    for convert in (False, True):
        model = network().train(training)
        if convert:
            fastst.convert(model)
        with FlopCounterMode(display=False) as counter:
            y = model(clip().requires_grad_())
            if training:
                y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_modes_see_the_functions_that_they_saw() -> None:
    class Log(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    logs = []
    model, x = network(), clip()
    for convert in (False, True):
        if convert:
            fastst.convert(model)
        seen: list[Any] = []
        u = model.blocks[0].space(x)
        with Log():
            model.blocks[0].relu(u)
            model(x)
        logs.append(seen)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("target", ["space", "norm", "relu", "time"])
def test_class_activation_maps(target: str) -> None:
    """Grad-CAM keeps a module's output and the gradient of it, by hooks."""
    maps = []
    for convert in (False, True):
        model, kept = network().eval(), {}
        if convert:
            fastst.convert(model)
            model(clip())
        module = getattr(model.blocks[0], target)
        if target == "norm":
            model.blocks[0].relu = nn.ReLU()  # a backward hook forbids writing to its output

        def keep(m: nn.Module, args: Any, y: Tensor, kept: dict[str, Any] = kept) -> None:
            kept["y"] = y
            y.register_hook(lambda g: kept.update(dy=g))

        module.register_forward_hook(keep)
        module.register_full_backward_hook(lambda m, dx, dy, k=kept: k.update(full=dy[0]))
        if target in ("space", "relu"):
            model.blocks[0].relu.inplace = False
        model(clip().requires_grad_())[:, 1].sum().backward()
        assert torch.equal(kept["dy"], kept["full"])
        maps.append(torch.relu((kept["y"] * kept["dy"].mean((2, 3, 4), keepdim=True)).sum(1)))
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-9, atol=1e-12)
    assert maps[0].any()


# ---- threads and interruptions


def test_threads_convert_and_call() -> None:
    """One thread converts and reverts while others call: a call is plain or converted, or both."""
    model, other = network().eval(), network().eval()
    fastst.convert(other)
    with torch.no_grad():
        expected = model(clip())
    wrong: list[Any] = []
    stop = threading.Event()

    def call(m: nn.Module) -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    y = m(clip())
                if not torch.allclose(y, expected, rtol=1e-9, atol=1e-9):
                    wrong.append((y - expected).abs().max())
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=call, args=(m,)) for m in (model, other, other)]
    for t in threads:
        t.start()
    for _ in range(20):
        fastst.convert(model)
        fastst.revert(model)
    stop.set()
    for t in threads:
        t.join()
    assert not wrong


def test_a_promise_crosses_threads() -> None:
    block, x = network().blocks[0], clip()
    fastst.convert(block)
    first = block.space(x)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(block.time(first)))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], block.time(block.space(x) + 0))


class Stopped(BaseException):
    """As a KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("sample", [False, True])
def test_conversion_may_be_stopped_anywhere(sample: bool) -> None:
    """Ctrl-C at any line of this library's conversion leaves a model that works."""
    plain = network()
    expected, x = step(plain, clip()), clip()
    package = fastst.rewrite.convert.__name__
    points = set(range(0, 400, 7))
    for point in sorted(points):
        model, lines = network(), [0]

        def trace(
            frame: Any, event: str, arg: Any, lines: list[int] = lines, point: int = point
        ) -> Any:
            if not frame.f_globals.get("__name__", "").startswith(package):
                return None
            if event == "line":
                lines[0] += 1
                if lines[0] > point:
                    raise Stopped
            return trace

        sys.settrace(trace)
        try:
            fastst.convert(model, x.clone() if sample else None)
            stopped = False
        except Stopped:
            stopped = True
        finally:
            sys.settrace(None)
        fastst.convert(model)
        for name, t in step(model, clip()).items():
            torch.testing.assert_close(t, expected[name], rtol=1e-9, atol=1e-9)
        assert pairs(lambda m=model: m(clip())) == 2
        if not stopped:
            break


def test_a_signal_during_conversion() -> None:
    def stop(*_: Any) -> None:
        raise Stopped

    before = signal.signal(signal.SIGALRM, stop)
    try:
        for i in range(20):
            model = network()
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0002 + 0.0001 * i)
                fastst.convert(model)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Stopped:
                pass
            assert nn.Linear(2, 2)(torch.ones(1, 2)).shape == (1, 2)
            assert_same(network(), model)
    finally:
        signal.signal(signal.SIGALRM, before)


# ---- several processes


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


def _no_batch_statistics(model: nn.Module) -> nn.Module:
    frozen(model)
    return model


def distributed(rank: int, how: str) -> None:
    x = clip(2 * SIZE)
    whole = _no_batch_statistics(network())
    whole(x).square().mean().backward()
    model: Any = _no_batch_statistics(network())
    if how.endswith("convert first"):
        fastst.convert(model)
    if how.startswith("ddp"):
        wrapped: Any = DistributedDataParallel(model, find_unused_parameters="unused" in how)
    else:
        mesh = init_device_mesh("cpu", (SIZE,))
        units = [*model.blocks, model]
        if "convolutions" in how:  # each frees its weights when its forward returns
            units = [m for m in model.modules() if isinstance(m, nn.Conv3d)] + [model]
        for unit in units:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        wrapped = model
    if not how.endswith("convert first"):
        fastst.convert(model)
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(x.chunk(SIZE)[rank]).square().mean().backward()
    want = dict(whole.named_parameters())
    for name, p in model.named_parameters():
        grad = None if p.grad is None else getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
        torch.testing.assert_close(
            grad, want[name].grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def beside_a_sharded_model(rank: int) -> None:
    """Clones hold the weights of all others: one is written to before its promise is kept."""
    sharded = network()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (SIZE,)))
    sharded(clip())
    block = network().blocks[0]
    with torch.no_grad():
        wanted = block.space(clip())
        fastst.convert(block)
        promised = block.space(clip())
        block.space.weight.data.mul_(2)
        torch.testing.assert_close(promised * 1, wanted)


def test_a_model_beside_a_sharded_one(ranks: Ranks) -> None:
    ranks.run(beside_a_sharded_model)


@pytest.mark.parametrize("order", ["convert first", "convert last"])
@pytest.mark.parametrize("how", ["ddp", "ddp, unused", "fsdp of blocks", "fsdp of convolutions"])
def test_data_parallel_training(ranks: Ranks, how: str, order: str) -> None:
    ranks.run(distributed, f"{how}, {order}")


@pytest.mark.slow
def test_copies_of_copies() -> None:
    model = network()
    fastst.convert(model)
    twin = copy.deepcopy(copy.deepcopy(model))
    for p in model.parameters():
        p.data.zero_()
    assert_same(network(), twin)
    assert pairs(lambda: twin(clip())) == 2


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_copies_of_parametrized_convolutions(norm: str) -> None:
    """Their class copies attributes by hand."""
    make = getattr(nn.utils.parametrizations, norm)
    model = nn.Sequential(make(nn.Conv3d(2, 3, (1, 3, 3))), make(nn.Conv3d(3, 2, (3, 1, 1)))).eval()
    fastst.convert(model)
    x = torch.randn(1, 2, 4, 6, 6)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), model(x))
    for conv, other in zip(model, copied, strict=True):
        assert vars(other)["_conv_forward"].conv is other
        assert vars(conv)["_conv_forward"].conv is conv

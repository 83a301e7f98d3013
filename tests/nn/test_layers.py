"""The modules: what replaces nn.Conv3d must behave as the modules it consists of."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastst
from fastst import Conv2Plus1d, ParallelConv2Plus1d
from fastst.problem.spec import default_mid_channels

FLOAT = dict(rtol=1e-4, atol=1e-5)
BN = nn.BatchNorm3d


def eager(layer: Conv2Plus1d, x: Tensor) -> Tensor:
    """The children one after the other."""
    norm = layer.norm or nn.Identity()
    if layer.order == "spatial-first":
        return layer.temporal(layer.activation(norm(layer.spatial(x))))
    return layer.spatial(layer.activation(norm(layer.temporal(x))))


def step(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of a call, and afterwards the buffers of the layer."""
    x = x.detach().requires_grad_()
    y = call(x)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad((y * weight).sum(), wanted)
    return [y.detach(), *grads, *(b.clone() for b in layer.buffers())]


def compare(layer: Conv2Plus1d, x: Tensor, steps: int = 1, **tolerance: Any) -> None:
    """``steps`` training steps' worth of forward and backward, next to the eager composition."""
    layer = layer.double()
    twin = copy.deepcopy(layer)
    for _ in range(steps):
        ours = step(layer, layer, x.double())
        peer = step(lambda t: eager(twin, t), twin, x.double())
        for a, b in zip(ours, peer, strict=True):
            torch.testing.assert_close(a, b, **(tolerance or dict(rtol=1e-9, atol=1e-9)))


# ---- migration


def test_signature_begins_as_conv3d() -> None:
    """Changing the class name is the whole migration."""
    ours = inspect.signature(Conv2Plus1d).parameters
    theirs = inspect.signature(nn.Conv3d).parameters
    positional = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [n for n in theirs if n not in ("device", "dtype")]
    assert set(theirs) <= set(ours)
    for name in theirs:
        assert ours[name].default == theirs[name].default, name
    parallel = inspect.signature(ParallelConv2Plus1d).parameters
    assert list(parallel)[: len(positional)] == positional


@pytest.mark.parametrize("kind", [Conv2Plus1d, ParallelConv2Plus1d])
@pytest.mark.parametrize(
    "args",
    [
        (4, 8, 3),
        (4, 8, 3, 2, 1),
        (4, 8, (3, 5, 1), (2, 1, 3), (1, 2, 0)),
        (4, 8, 3, 1, "same", 2),
        (4, 8, 3, 1, 1, 1, 2, False),
        (4, 8, 3, 1, 1, 1, 1, True, "replicate"),
    ],
)
def test_shape_as_conv3d(kind: Any, args: tuple[Any, ...]) -> None:
    if kind is ParallelConv2Plus1d and args[4:5] in ((), (0,)):
        args = (*args[:3], 1, 1)
    x = torch.randn(2, 4, 7, 12, 12)
    assert kind(*args)(x).shape == nn.Conv3d(*args)(x).shape


def test_children_are_what_people_expect() -> None:
    layer = Conv2Plus1d(4, 6, 3, norm="batch")
    assert [n for n, _ in layer.named_children()] == ["spatial", "norm", "activation", "temporal"]
    assert type(layer.spatial) is type(layer.temporal) is nn.Conv3d and type(layer.norm) is BN
    assert list(layer.state_dict()) == [
        "spatial.weight", "spatial.bias", "norm.weight", "norm.bias", "norm.running_mean",
        "norm.running_var", "norm.num_batches_tracked", "temporal.weight", "temporal.bias",
    ]  # fmt: skip
    assert "norm.weight" not in Conv2Plus1d(4, 6, 3).state_dict()
    seen = []
    layer.apply(lambda m: seen.append(type(m)))
    assert seen.count(nn.Conv3d) == 2


@pytest.mark.parametrize(
    ("c", "k", "m"),
    [
        (64, 64, 144), (64, 128, 230), (128, 128, 288), (128, 256, 460), (256, 256, 576),
        (256, 512, 921), (512, 512, 1152),
    ],
)  # fmt: skip
def test_mid_channels_match_the_parameters_of_conv3d(c: int, k: int, m: int) -> None:
    """The numbers of arXiv 1711.11248."""
    assert default_mid_channels(c, k, (3, 3, 3)) == m
    layer = Conv2Plus1d(c, k, 3, bias=False, device="meta")
    assert layer.mid_channels == layer.spatial.out_channels == m
    full = 27 * c * k
    assert full * 0.97 < sum(p.numel() for p in layer.parameters()) <= full
    assert Conv2Plus1d(3, 64, (3, 7, 7), mid_channels=45).spatial.out_channels == 45


def test_device_and_dtype_arguments() -> None:
    layer = Conv2Plus1d(4, 6, 3, norm="batch", device="meta", dtype=torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in layer.parameters())
    layer = Conv2Plus1d(4, 6, 3, dtype=torch.float64)
    assert layer(torch.randn(1, 4, 3, 4, 4).double()).dtype == torch.float64


@pytest.mark.parametrize("kind", [Conv2Plus1d, ParallelConv2Plus1d])
def test_reset_parameters_draws_again(kind: Any) -> None:
    layer = kind(4, 6, 3, norm="batch")
    before = copy.deepcopy(layer.state_dict())
    layer.norm.running_mean.fill_(3)
    layer.reset_parameters()
    assert not torch.equal(layer.spatial.weight, before["spatial.weight"])
    assert not layer.norm.running_mean.any()


# ---- the same numbers as the children


@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(activation=None),
        dict(activation=nn.LeakyReLU(0.3)),
        dict(activation=nn.GELU(approximate="tanh")),
        dict(activation=nn.ReLU(inplace=True), norm="batch"),
        dict(norm="batch", stride=(2, 1, 2), dilation=(1, 2, 1), padding=2),
        dict(norm="batch", recompute=True, padding="same", kernel_size=(2, 3, 4)),
        dict(groups=2, mid_channels=6, norm="batch"),
        dict(groups=(4, 1), mid_channels=4, bias=False),
        dict(padding_mode=("reflect", "circular"), padding=1),
    ],
    ids=lambda s: ",".join(s) or "plain",
)
def test_as_the_sequence_of_children(settings: dict[str, Any], order: str) -> None:
    layer = Conv2Plus1d(4, 4, order=order, **({"kernel_size": 3, "padding": 1} | settings))
    compare(layer, torch.randn(2, 4, 5, 6, 7), steps=2)
    compare(layer.eval(), torch.randn(2, 4, 5, 6, 7))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "eps and momentum of its own": lambda: BN(5, eps=0.1, momentum=0.3),
    "momentum None": lambda: BN(5, momentum=None),
    "momentum 0": lambda: BN(5, momentum=0.0),
    "no affine": lambda: BN(5, affine=False),
    "no running statistics": lambda: BN(5, track_running_stats=False),
    "neither": lambda: BN(5, affine=False, track_running_stats=False),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("recompute", [False, True])
def test_batch_norm_in_all_its_ways(norm: str, recompute: bool) -> None:
    """Three steps of training, then evaluation: outputs, gradients, buffers, the counter."""
    layer = Conv2Plus1d(3, 4, 3, padding=1, mid_channels=5, norm=NORMS[norm](), recompute=recompute)
    x = torch.randn(2, 3, 4, 5, 5)
    compare(layer, x, steps=3)
    twin = copy.deepcopy(layer)
    for _ in range(3):
        layer(x.double())
        eager(twin, x.double())
    for a, b in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    compare(layer.eval(), x)


def test_frozen_inside_a_training_model() -> None:
    layer = Conv2Plus1d(3, 4, 3, norm="batch", mid_channels=5)
    nn.init.normal_(layer.norm.running_mean)
    layer.train()
    layer.norm.eval()
    before = [b.clone() for b in layer.buffers()]
    compare(layer, torch.randn(2, 3, 4, 5, 5))
    assert all(torch.equal(a, b.double()) for a, b in zip(layer.buffers(), before, strict=True))
    assert layer.training


def test_counter_under_no_grad_and_inference() -> None:
    layer = Conv2Plus1d(3, 4, 3, norm="batch")
    with torch.no_grad():
        layer(torch.randn(2, 3, 4, 5, 5))
    assert layer.norm.num_batches_tracked == 1
    layer.eval()(torch.randn(2, 3, 4, 5, 5))
    assert layer.norm.num_batches_tracked == 1


def test_running_statistics_survive_a_refusal() -> None:
    layer = Conv2Plus1d(3, 4, 3, norm="batch")
    with pytest.raises(ValueError, match="channels"):
        layer(torch.randn(2, 5, 4, 5, 5))
    assert layer.norm.num_batches_tracked == 0 and not layer.norm.running_mean.any()


def test_checkpointing_updates_the_statistics_once() -> None:
    """Where the composition, whose norm runs again for backward, counts every batch twice."""
    layer = Conv2Plus1d(3, 4, 3, norm="batch").double()
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 3, 4, 5, 5).double()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    twin(x)
    for a, b in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(dtype: torch.dtype, training: bool) -> None:
    layer = Conv2Plus1d(4, 4, 3, padding=1, norm="batch").train(training)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 4, 4, 8, 8)
    with torch.autocast("cpu", dtype):
        ours, peer = step(layer, layer, x), step(lambda t: eager(twin, t), twin, x)
    names = ["y", "x", *(n for n, _ in layer.named_parameters())]
    for name, a, b in zip(names, ours, peer, strict=False):
        assert a.dtype == b.dtype, name
        if not (training and name == "spatial.bias"):  # its gradient is 0 and what rounding left
            bound = 16 * torch.finfo(dtype).eps * float(b.abs().max())
            assert float((a - b).abs().max()) <= bound, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moving_to_another_dtype(dtype: torch.dtype) -> None:
    layer = Conv2Plus1d(4, 4, 3, norm="batch").to(dtype)
    y = layer(torch.randn(1, 4, 4, 8, 8, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in layer.parameters())


def test_half_model_with_float32_norm() -> None:
    layer = Conv2Plus1d(4, 4, 3, norm="batch").bfloat16()
    layer.norm.float()
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 4, 4, 8, 8, dtype=torch.bfloat16)
    for a, b in zip(step(layer, layer, x), step(lambda t: eager(twin, t), twin, x), strict=True):
        assert a.dtype == b.dtype


# ---- copies, files, tools that walk modules


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", [Conv2Plus1d, ParallelConv2Plus1d])
def test_copies(kind: Any, how: str) -> None:
    layer = kind(4, 4, 3, padding=1, norm="batch")
    x = torch.randn(2, 4, 4, 5, 5)
    layer(x)
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert not set(map(id, layer.parameters())) & set(map(id, twin.parameters()))
    torch.testing.assert_close(twin.eval()(x), layer.eval()(x), rtol=0, atol=0)
    twin.load_state_dict(layer.state_dict(), strict=True)


def test_state_dict_of_the_plain_modules() -> None:
    """A checkpoint of the modules it replaces loads, and the other way round."""
    layer = Conv2Plus1d(4, 4, 3, norm="batch")
    plain = nn.ModuleDict({n: copy.deepcopy(m) for n, m in layer.named_children()})
    assert plain.state_dict().keys() == layer.state_dict().keys()
    plain.load_state_dict(layer.state_dict())
    layer.load_state_dict(plain.state_dict())


def test_optimiser_moving_average_and_functional_call() -> None:
    layer = Conv2Plus1d(4, 4, 3, norm="batch")
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 4, 4, 5, 5)
    for call, module in ((layer, layer), (lambda t: eager(twin, t), twin)):
        optimiser = torch.optim.AdamW(module.parameters(), lr=0.01)
        average = torch.optim.swa_utils.AveragedModel(module)
        for _ in range(3):
            optimiser.zero_grad()
            call(x).square().mean().backward()
            optimiser.step()
            average.update_parameters(module)
    for (name, a), b in zip(layer.named_parameters(), twin.parameters(), strict=True):
        if name != "spatial.bias":  # Adam divides the rounding of a gradient of 0 by itself
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    zeros = {n: torch.zeros_like(p) for n, p in layer.named_parameters()}
    assert not torch.func.functional_call(layer.eval(), zeros, x).any()


def test_two_threads_on_one_layer() -> None:
    layer = Conv2Plus1d(4, 4, 3, padding=1, norm="batch").eval()
    xs = torch.randn(4, 1, 4, 4, 6, 6)
    expected = [layer(x).detach() for x in xs]
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(20):
            x = xs[i].clone().requires_grad_()
            y = layer(x)
            torch.autograd.grad(y.sum(), x)
            if not torch.equal(y.detach(), expected[i]):
                wrong.append(f"thread {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_unbatched() -> None:
    for layer in (Conv2Plus1d(4, 6, 3, norm="batch"), ParallelConv2Plus1d(4, 6, 3, padding=1)):
        layer.eval()
        x = torch.randn(4, 4, 6, 6)
        torch.testing.assert_close(layer(x), layer(x[None])[0])


# ---- the parallel layer


@pytest.mark.parametrize(
    "settings",
    [
        dict(norm=nn.GroupNorm(2, 6)),
        dict(norm=nn.GroupNorm(2, 6), combine="cat"),
        dict(activation=nn.Softmax(1)),
        dict(norm="batch"),
        dict(branch_norm="batch", branch_activation="relu"),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_unbatched_branches(settings: dict[str, Any], training: bool) -> None:
    layer = ParallelConv2Plus1d(4, 6, 3, padding=1, **settings).train(training)
    x = torch.randn(4, 4, 6, 6)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


def test_branches_have_norms_of_their_own() -> None:
    with pytest.raises(TypeError, match="one for each branch, got the module BatchNorm3d"):
        ParallelConv2Plus1d(4, 6, 3, branch_norm=nn.BatchNorm3d(6))  # type: ignore[arg-type]
    layer = ParallelConv2Plus1d(4, 6, 3, branch_norm=nn.BatchNorm3d)
    assert layer.spatial_norm is not layer.temporal_norm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(combine="cat", split=3),
        dict(norm="batch", activation="relu"),
        dict(norm="batch", activation="relu", combine="cat"),
        dict(branch_norm="batch", branch_activation="silu"),
        dict(branch_norm="batch", norm="batch", activation="gelu", combine="cat", bias=False),
        dict(branch_activation="leaky_relu", norm="batch"),
        dict(stride=(2, 2, 1), groups=2),
        dict(causal=True, padding=(0, 1, 1), norm="batch"),
    ],
    ids=lambda s: ",".join(s) or "plain",
)
@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
def test_parallel_as_its_children(settings: dict[str, Any], training: bool) -> None:
    layer = ParallelConv2Plus1d(4, 8, 3, **({"padding": 1} | settings)).double()
    for m in layer.modules():
        if isinstance(m, BN):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    layer.train(training)
    twin = copy.deepcopy(layer)

    def peer(x: Tensor) -> Tensor:
        left = 2 if layer.causal else 0
        a = twin.spatial(x)
        b = twin.temporal(F.pad(x, (0, 0, 0, 0, left, 0)))
        a, b = (
            twin.branch_activation(t if norm is None else norm(t))
            for t, norm in ((a, twin.spatial_norm), (b, twin.temporal_norm))
        )
        y = a + b if layer.combine == "add" else torch.cat((a, b), 1)
        return twin.activation(y if twin.norm is None else twin.norm(y))

    x = torch.randn(2, 4, 5, 6, 6).double()
    for a, b in zip(step(layer, layer, x), step(peer, twin, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ---- norms and activations as classes, and errors in the words of the layer


def test_classes_are_called_as_torchvision_calls_them() -> None:
    layer = Conv2Plus1d(4, 4, 3, mid_channels=6, norm=nn.BatchNorm3d, activation=nn.SiLU)
    assert isinstance(layer.norm, nn.BatchNorm3d) and layer.norm.num_features == 6
    assert isinstance(layer.activation, nn.SiLU)
    half = Conv2Plus1d(4, 4, 3, norm=nn.BatchNorm3d, dtype=torch.float64)
    assert half.norm is not None and half.norm.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("norm", "told"),
    [
        (nn.BatchNorm3d(3), "norm must have num_features=18, the channels that it reads, got"),
        (nn.GroupNorm(2, 4), "norm must have num_channels=18"),
    ],
)
def test_a_norm_of_another_width_is_refused_at_construction(norm: nn.Module, told: str) -> None:
    with pytest.raises(ValueError, match=f"Conv2Plus1d: {told}"):
        Conv2Plus1d(8, 8, 3, norm=norm, mid_channels=18)


def test_what_is_no_norm_is_refused() -> None:
    with pytest.raises(TypeError, match="norm must be None, 'batch', a module or a class of modu"):
        Conv2Plus1d(8, 8, 3, norm=lambda channels: channels)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [Conv2Plus1d, ParallelConv2Plus1d])
def test_errors_name_the_layer_and_its_argument(layer: Any) -> None:
    with pytest.raises(ValueError, match=rf"{layer.__name__}: x of shape .* this layer has in_ch"):
        layer(8, 8, 3, padding=1)(torch.randn(1, 2, 3, 9, 9))
    images = r"is taken as one unbatched clip \(C, T, H, W\) with 2 channels; this layer has in_ch"
    with pytest.raises(ValueError, match=images):
        layer(8, 8, 3, padding=1)(torch.randn(2, 8, 10, 10))
    with pytest.raises(TypeError, match=rf"{layer.__name__}: x must be a tensor, got list"):
        layer(8, 8, 3, padding=1)([1.0])
    dtype = rf"{layer.__name__}: spatial\.weight must have the dtype of x, torch.float16, got torch"
    with pytest.raises(TypeError, match=dtype):
        layer(8, 8, 3, padding=1)(torch.randn(1, 8, 3, 9, 9).half())
    with pytest.raises(ValueError, match=rf"{layer.__name__}: time of 2 with padding 0 \+ 0 must"):
        layer(8, 8, 3, padding=(0, 1, 1))(torch.randn(1, 8, 2, 9, 9))


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        (dict(split=8), ValueError, "0 < split < out_channels"),
        (dict(split=2.5), TypeError, "split must be an int, got 2.5"),
        (dict(out_channels=1), ValueError, r"0 < split < out_channels \(1\), got 1"),
        (dict(split=4, combine="add"), ValueError, "split requires combine='cat'"),
    ],
)
def test_each_branch_has_channels(settings: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=f"ParallelConv2Plus1d: .*{told}"):
        ParallelConv2Plus1d(
            **dict(in_channels=4, out_channels=8, kernel_size=3, combine="cat") | settings
        )


def test_errors_of_other_peoples_modules_stay_as_they_are() -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise failed

    failed = ValueError("conv2plus1d of another kind, with a spatial_weight")
    with (
        pytest.warns(fastst.FallbackWarning, match="which no kernel knows"),
        pytest.raises(ValueError, match="of another kind, with a spatial_weight") as told,
    ):
        Conv2Plus1d(8, 8, 3, padding=1, norm=Refuses())(torch.randn(1, 8, 3, 9, 9))
    assert told.value is failed


def test_sizes_of_any_type_of_integers() -> None:
    """As nn.Conv3d takes them: they come from arrays."""
    four, three = np.int64(4), np.int32(3)
    layer = Conv2Plus1d(four, four, (three, three, three), padding=(1, 1, 1))
    assert [type(n) for n in (layer.in_channels, *layer.kernel_size)] == [int] * 4
    with pytest.raises(TypeError, match="in_channels must be an int, got True"):
        Conv2Plus1d(True, 4, 3)
    for groups in (0, 3):
        with pytest.raises(ValueError, match=f"groups must .* divide .* got {groups}"):
            Conv2Plus1d(4, 4, 3, groups=groups)

"""One exception, before any work, that says what was required and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastst
from fastst import Conv2Plus1d, ParallelConv2Plus1d
from fastst.functional import BatchNorm, conv2plus1d, parallel_conv2plus1d

R = torch.randn


def pair(x: Any = None, ws: Any = None, wt: Any = None, *biases: Any, **settings: Any) -> Tensor:
    x = R(1, 4, 5, 6, 6) if x is None else x
    ws = R(6, 4, 1, 3, 3) if ws is None else ws
    wt = R(8, 6, 3, 1, 1) if wt is None else wt
    return conv2plus1d(x, ws, wt, *biases, **settings)


def parallel(x: Any = None, ws: Any = None, wt: Any = None, **settings: Any) -> Tensor:
    x = R(1, 4, 5, 6, 6) if x is None else x
    ws = R(6, 4, 1, 3, 3) if ws is None else ws
    wt = R(6, 4, 3, 1, 1) if wt is None else wt
    return parallel_conv2plus1d(x, ws, wt, **({"padding": 1} | settings))


Case = tuple[Callable[[], Any], type[Exception], str, str]

# What is called, what it raises, what was required and what came, as the message has them.
CASES: dict[str, Case] = {
    # ---- the input
    "x no tensor": (
        lambda: pair([1.0]),
        TypeError, "x must be a tensor", "list",
    ),
    "x of integers": (
        lambda: pair(torch.ones(1, 4, 5, 6, 6, dtype=torch.int32)),
        TypeError, "float16, bfloat16, float32 or float64", "torch.int32",
    ),
    "x complex": (
        lambda: pair(R(1, 4, 5, 6, 6, dtype=torch.complex64)),
        TypeError, "x must be float16", "torch.complex64",
    ),
    "x of rank 3": (
        lambda: pair(R(4, 6, 6)),
        ValueError, "(N, C, T, H, W) or (C, T, H, W)", "(4, 6, 6)",
    ),
    "x of rank 6": (
        lambda: pair(R(1, 1, 4, 5, 6, 6)),
        ValueError, "(N, C, T, H, W)", "(1, 1, 4, 5, 6, 6)",
    ),
    "channels of x": (
        lambda: pair(R(1, 3, 5, 6, 6)),
        ValueError, "x of shape (1, 3, 5, 6, 6) has 3 channels", "takes 4",
    ),
    "channels between": (
        lambda: pair(wt=R(8, 7, 3, 1, 1)),
        ValueError, "gives 6", "takes 7",
    ),
    "order decides what chains": (
        lambda: pair(order="temporal-first"),
        ValueError, "the temporal weight takes 6", "has 4 channels",
    ),
    "dtype of a weight": (
        lambda: pair(ws=R(6, 4, 1, 3, 3).double()),
        TypeError, "spatial_weight must have the dtype of x, torch.float32", "torch.float64",
    ),
    "dtype of a bias": (
        lambda: pair(None, None, None, R(6).half()),
        TypeError, "spatial_bias must have the dtype of x, torch.float32", "torch.float16",
    ),
    "device of a weight": (
        lambda: pair(wt=R(8, 6, 3, 1, 1, device="meta")),
        ValueError, "temporal_weight must be on the device of x, cpu", "meta",
    ),
    "device of a bias": (
        lambda: pair(None, None, None, None, R(8, device="meta")),
        ValueError, "temporal_bias must be on the device of x, cpu", "meta",
    ),
    # ---- weights
    "weight no tensor": (
        lambda: pair(ws="w"),
        TypeError, "spatial_weight must be a tensor", "str",
    ),
    "spatial weight with time": (
        lambda: pair(ws=R(6, 4, 3, 3, 3)),
        ValueError, "(out, in/groups, 1, kh, kw)", "(6, 4, 3, 3, 3)",
    ),
    "temporal weight with space": (
        lambda: pair(wt=R(8, 6, 3, 3, 1)),
        ValueError, "(out, in/groups, kt, 1, 1)", "(8, 6, 3, 3, 1)",
    ),
    "weight of rank 4": (
        lambda: pair(ws=R(6, 4, 3, 3)),
        ValueError, "(out, in/groups, 1, kh, kw)", "(6, 4, 3, 3)",
    ),
    "empty weight": (
        lambda: pair(ws=R(0, 4, 1, 3, 3)),
        ValueError, "(out, in/groups, 1, kh, kw)", "(0, 4, 1, 3, 3)",
    ),
    "length of a bias": (
        lambda: pair(None, None, None, R(5)),
        ValueError, "spatial_bias must be (6,)", "(5,)",
    ),
    "rank of a bias": (
        lambda: pair(None, None, None, None, R(8, 1)),
        ValueError, "temporal_bias must be (8,)", "(8, 1)",
    ),
    "bias no tensor": (
        lambda: pair(None, None, None, True),
        TypeError, "spatial_bias must be a tensor or None", "bool",
    ),
    # ---- geometry
    "groups of 0": (
        lambda: pair(groups=0),
        ValueError, "at least 1", "got 0",
    ),
    "groups that do not divide": (
        lambda: pair(groups=4),
        ValueError, "divide the 6 output channels", "got 4",
    ),
    "groups as a float": (
        lambda: pair(groups=1.0),
        TypeError, "one int or two", "1.0",
    ),
    "three groups": (
        lambda: pair(groups=(1, 1, 1)),
        TypeError, "one int or two (spatial, temporal)", "(1, 1, 1)",
    ),
    "two strides": (
        lambda: pair(stride=(1, 2)),
        ValueError, "(t, h, w)", "(1, 2)",
    ),
    "four dilations": (
        lambda: pair(dilation=(1, 2, 1, 1)),
        ValueError, "(t, h, w)", "(1, 2, 1, 1)",
    ),
    "stride of 0": (
        lambda: pair(stride=(1, 0, 1)),
        ValueError, "each at least 1", "(1, 0, 1)",
    ),
    "stride as a float": (
        lambda: pair(stride=1.5),
        TypeError, "an int or three ints", "1.5",
    ),
    "stride as a bool": (
        lambda: pair(stride=True),
        TypeError, "an int or three ints", "True",
    ),
    "stride as a word": (
        lambda: pair(stride="same"),
        TypeError, "an int or three ints", "'same'",
    ),
    "negative padding": (
        lambda: pair(padding=-1),
        ValueError, "each at least 0", "-1",
    ),
    "padding of floats": (
        lambda: pair(padding=(1.0, 1, 1)),
        TypeError, "ints", "(1.0, 1, 1)",
    ),
    "padding word": (
        lambda: pair(padding="full"),
        ValueError, "'same', 'valid'", "'full'",
    ),
    "same with a stride": (
        lambda: pair(padding="same", stride=2),
        ValueError, "requires stride 1", "(2, 2, 2)",
    ),
    "dilation of 0": (
        lambda: pair(dilation=0),
        ValueError, "each at least 1", "got 0",
    ),
    "kernel larger than x": (
        lambda: pair(R(1, 4, 2, 6, 6)),
        ValueError, "time of 2", "extent of 3",
    ),
    "dilated kernel larger": (
        lambda: pair(dilation=(1, 4, 1)),
        ValueError, "height of 6", "extent of 9",
    ),
    "reflect beyond x": (
        lambda: pair(padding=(0, 6, 0), padding_mode="reflect"),
        ValueError, "at most 5 for a height of 6", "got 6",
    ),
    "circular beyond x": (
        lambda: pair(padding=(0, 0, 7), padding_mode="circular"),
        ValueError, "at most 6 for a width of 6", "got 7",
    ),
    # ---- names
    "padding mode": (
        lambda: pair(padding_mode="mirror"),
        ValueError, "'zeros', 'replicate', 'reflect', 'circular'", "'mirror'",
    ),
    "activation": (
        lambda: pair(activation="tanh"),
        ValueError, "'relu', 'silu'", "'tanh'",
    ),
    "activation as a module": (
        lambda: pair(activation=nn.ReLU()),
        ValueError, "activation must be one of", "ReLU()",
    ),
    "order": (
        lambda: pair(order="time-first"),
        ValueError, "'spatial-first', 'temporal-first'", "'time-first'",
    ),
    "causal": (
        lambda: pair(causal="yes"),
        ValueError, "False, True or 'strided'", "'yes'",
    ),
    "causal with reflect": (
        lambda: pair(causal=True, padding_mode="reflect"),
        ValueError, "'zeros' or 'replicate'", "'reflect'",
    ),
    "causal with circular time": (
        lambda: pair(causal=True, padding_mode=("zeros", "circular")),
        ValueError, "'zeros' or 'replicate'", "'circular'",
    ),
    "causal with padding in time": (
        lambda: pair(causal=True, padding=1),
        ValueError, "temporal padding of 0", "got padding 1",
    ),
    "strided padding below 0": (
        lambda: pair(causal="strided", stride=(4, 1, 1)),
        ValueError, "stride of at most 3", "got 4",
    ),
    # ---- the norm
    "norm as a word": (
        lambda: pair(norm="batch"),
        TypeError, "fastst.functional.BatchNorm or None", "str",
    ),
    "norm as a module": (
        lambda: pair(norm=nn.BatchNorm3d(6)),
        TypeError, "BatchNorm or None", "BatchNorm3d",
    ),
    "eval without statistics": (
        lambda: pair(norm=BatchNorm(None, None)),
        ValueError, "requires running_mean and running_var", "None",
    ),
    "length of gamma": (
        lambda: pair(norm=BatchNorm(None, None, R(8), training=True)),
        ValueError, "norm.weight must be (6,)", "(8,)",
    ),
    "length of a statistic": (
        lambda: pair(norm=BatchNorm(R(8), R(8))),
        ValueError, "norm.running_mean must be (6,)", "(8,)",
    ),
    "device of gamma": (
        lambda: pair(norm=BatchNorm(None, None, R(6, device="meta"), training=True)),
        ValueError, "device of x, cpu", "meta",
    ),
    "one value per channel": (
        lambda: pair(
            R(1, 4, 1, 3, 3), padding=(1, 0, 0), norm=BatchNorm(None, None, training=True)
        ),
        ValueError, "more than 1 value per channel", "(1, 6, 1, 1, 1)",
    ),
    # ---- the parallel function
    "combine": (
        lambda: parallel(combine="mul"),
        ValueError, "'add', 'cat'", "'mul'",
    ),
    "branches of other sizes": (
        lambda: parallel(padding=0),
        ValueError, "same output size", "(5, 4, 4)",
    ),
    "branches of other channels": (
        lambda: parallel(wt=R(5, 4, 3, 1, 1)),
        ValueError, "equal channels", "5 (temporal)",
    ),
    "channels of a branch": (
        lambda: parallel(wt=R(6, 3, 3, 1, 1)),
        ValueError, "takes 3 channels", "x has 4",
    ),
    "activation of a branch": (
        lambda: parallel(branch_activation="elu"),
        ValueError, "branch_activation must be one of", "'elu'",
    ),
    "dtype of a branch": (
        lambda: parallel(wt=R(6, 4, 3, 1, 1).double()),
        TypeError, "dtype of x, torch.float32", "torch.float64",
    ),
    # ---- the layers, at construction
    "layer: channels": (
        lambda: Conv2Plus1d(0, 4, 3),
        ValueError, "in_channels must be at least 1", "got 0",
    ),
    "layer: channels as a float": (
        lambda: Conv2Plus1d(4, 4.0, 3),
        TypeError, "out_channels must be an int", "4.0",
    ),
    "layer: mid channels": (
        lambda: Conv2Plus1d(4, 4, 3, mid_channels=-1),
        ValueError, "mid_channels must be at least 1", "-1",
    ),
    "layer: kernel": (
        lambda: Conv2Plus1d(4, 4, (3, 3)),
        ValueError, "(t, h, w)", "(3, 3)",
    ),
    "layer: kernel of 0": (
        lambda: Conv2Plus1d(4, 4, 0),
        ValueError, "each at least 1", "got 0",
    ),
    "layer: groups": (
        lambda: Conv2Plus1d(4, 4, 3, groups=3),
        ValueError, "divide", "got 3",
    ),
    "layer: norm": (
        lambda: Conv2Plus1d(4, 4, 3, norm="layer"),
        ValueError, "None, 'batch', a module or a class", "'layer'",
    ),
    "layer: activation": (
        lambda: Conv2Plus1d(4, 4, 3, activation="mish"),
        ValueError, "'relu'", "'mish'",
    ),
    "layer: order": (
        lambda: Conv2Plus1d(4, 4, 3, order=None),
        ValueError, "'spatial-first'", "None",
    ),
    "layer: causal and padding": (
        lambda: Conv2Plus1d(4, 4, 3, padding=1, causal=True),
        ValueError, "temporal padding of 0", "got padding 1",
    ),
    "layer: x": (
        lambda: Conv2Plus1d(4, 4, 3)(R(2, 5, 3, 4, 4)),
        ValueError, "in_channels=4", "has 5 channels",
    ),
    "layer: dtype of x": (
        lambda: Conv2Plus1d(4, 4, 3)(R(2, 4, 3, 4, 4).double()),
        TypeError, "dtype of x, torch.float64", "torch.float32",
    ),
    "parallel layer: split": (
        lambda: ParallelConv2Plus1d(4, 4, 3, split=2),
        ValueError, "split requires combine='cat'", "combine='add'",
    ),
    "parallel layer: split of all": (
        lambda: ParallelConv2Plus1d(4, 4, 3, combine="cat", split=4),
        ValueError, "0 < split < out_channels (4)", "got 4",
    ),
    "parallel layer: combine": (
        lambda: ParallelConv2Plus1d(4, 4, 3, combine="sum"),
        ValueError, "'add', 'cat'", "'sum'",
    ),
    "backend": (
        lambda: fastst.use_backend("gpu"),
        ValueError, "expected one of 'auto'", "'gpu'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_telling_message(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, kind, required, came = CASES[case]
    for name in ("conv2plus1d", "parallel_conv2plus1d"):
        monkeypatch.setattr(fastst.ops, name, lambda *_, **__: pytest.fail("it worked"))
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert required in message, message
    assert came in message, message
    assert "\n" not in message
    # Which function or layer complains, first of all.
    assert re.match(r"(\w+: |unknown backend|stream: )", message), message


def test_nothing_is_updated_before_the_refusal() -> None:
    mean, var = torch.zeros(6), torch.ones(6)
    with pytest.raises(ValueError, match="temporal kernel"):
        pair(R(1, 4, 2, 6, 6), norm=BatchNorm(mean, var, training=True))
    assert not mean.any()


@pytest.mark.parametrize("sequence", [list, tuple, torch.Size])
def test_any_sequence_of_three_will_do(sequence: Any) -> None:
    y = pair(stride=sequence((1, 2, 2)), padding=sequence((1, 0, 1)), dilation=sequence((1, 1, 1)))
    assert y.shape == (1, 8, 5, 2, 3)


def test_mixed_dtypes_are_never_cast() -> None:
    """Also not for a layer within a model: neither up nor down, with or without gradients."""
    layer = Conv2Plus1d(4, 4, 3, norm="batch").half()
    for x in (R(1, 4, 3, 4, 4), R(1, 4, 3, 4, 4).bfloat16()):
        with pytest.raises(TypeError, match="must have the dtype of x"):
            layer(x)
        with torch.no_grad(), pytest.raises(TypeError, match="must have the dtype of x"):
            layer(x)

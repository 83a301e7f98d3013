"""What ``conv3d`` refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastst.functional import BatchNorm, Norm, Statistics, conv3d

X, W = torch.randn(2, 4, 5, 6, 7), torch.randn(6, 4, 3, 3, 3)
FOUR, SIX = torch.ones(4), torch.ones(6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x="clip"), "x must be a tensor, got str"),
        (dict(x=X.to_sparse()), "x must be dense, with strides, got torch.sparse_coo"),
        (dict(x=X.long()), "x must be float16, bfloat16, float32 or float64"),
        (dict(x=X[0, 0]), r"x must be \(N, C, T, H, W\) or \(C, T, H, W\), got \(5, 6, 7\)"),
        (dict(weight=None), "weight must be a tensor, got NoneType"),
        (dict(weight=W[0]), r"weight must be \(out, in/groups, kt, kh, kw\)"),
        (dict(weight=W[:, :3]), "has 4 channels; the weight takes 3"),
        (dict(weight=W.double()), "weight must have the dtype of x"),
        (dict(weight=W.to("meta")), "weight must be on the device of x"),
        (dict(bias=FOUR), r"bias must be \(6,\), got \(4,\)"),
        (dict(groups=4), "divide the 6 output channels"),
        (dict(groups=2.0), "groups must be an int"),
        (dict(stride=(1, 1)), "stride must be an int or"),
        (dict(padding=(1, (1, 2, 3), 1)), "padding before and after each axis"),
        (dict(padding="full"), "padding as a string must be one of"),
        (dict(padding_mode="mirror"), "padding_mode must be one of"),
        (
            dict(padding=7, padding_mode="reflect"),
            "a padding of at most 4 for a time of 5",
        ),
        (dict(padding=(1, 1, 7), padding_mode=("reflect", "zeros")), "at most 6 for a width of 7"),
        (dict(dilation=4), "must be at least the kernel's extent of 9"),
        (dict(causal=1.5), "causal must be False, True or 'strided'"),
        (dict(causal=True, padding=1), "requires a temporal padding of 0"),
        (dict(causal=True, padding_mode="circular"), "requires a temporal padding_mode of"),
        (dict(activation="sigmoid"), "activation must be one of"),
        (dict(input_activation="sigmoid"), "input_activation must be one of"),
        (dict(past=3), "past must be a tensor or None"),
        (dict(past=X[:, :3]), r"past must be \(2, 4, P, 6, 7\), got \(2, 3, 5, 6, 7\)"),
        (dict(past=X, causal=True), "takes a past of at most 2 frames, got 5"),
        (dict(past=X.double()), "past must have the dtype of x"),
        (dict(residual=X), r"residual must have the shape of the output, \(2, 6, 3, 4, 5\)"),
        (dict(residual=4), "residual must be a tensor"),
        (dict(input_norm="batch"), "input_norm must be a fastst.functional.BatchNorm"),
        (dict(input_norm=Norm("power")), "kind of the input_norm must be one of"),
        (dict(input_norm=Norm("group", groups=3)), "divide the 4 channels of x, got 3"),
        (dict(input_norm=Norm("rms", SIX)), r"input_norm.weight must be \(4,\), got \(6,\)"),
        (dict(input_norm=BatchNorm(None, None)), "requires running_mean and running_var"),
        (dict(input_norm=BatchNorm(SIX, SIX)), r"input_norm.running_mean must be \(4,\)"),
        (dict(input_norm=BatchNorm(None, None, training=True, group="0")), "over ranks"),
        (dict(input_statistics=Statistics(FOUR, FOUR)), "input_statistics requires an input_norm"),
        (
            dict(input_statistics=Statistics(FOUR, FOUR), input_norm=Norm("rms")),
            "requires an input_norm that is a BatchNorm in training",
        ),
        (dict(output_statistics=True, activation="relu"), "y without residual and activation"),
        (
            dict(output_statistics=True, output_norm=BatchNorm(SIX, SIX)),
            "a y without output_norm",
        ),
        (dict(output_norm=BatchNorm(FOUR, FOUR)), r"output_norm.running_mean must be \(6,\)"),
        (
            dict(x=X[:1, :, :1, :1, :1], padding=1, input_norm=Norm("instance")),
            "requires more than 1 value for each",
        ),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        conv3d(**(dict(x=X, weight=W) | changes))


def test_says_what_an_unbatched_clip_is() -> None:
    with pytest.raises(ValueError, match="taken as one unbatched clip"):
        conv3d(X[0, :3], W)

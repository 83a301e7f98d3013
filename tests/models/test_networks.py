"""The networks of the papers: their counts, their peers', and what can be done with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastst
from fastst import models
from fastst.models.__main__ import ROWS, Row, clip_parameters, count, page
from tests.support import ROOT
from tests.support.peers import torchvision_video

# arXiv 1711.11248, Table 2, 8 frames of 112×112 (batch norms left out): the exact count of
# convolutions and classifier in thousands, and GFLOPs as published.
PAPER = {
    "fr2d_18": (11_372, 13.8),
    "r2d_18": (11_438, 1.9),
    "r3d_18": (33_362, 20.3),
    "mc2_18": (11_391, 14.3),
    "mc3_18": (11_686, 21.7),
    "mc4_18": (12_718, 20.0),
    "mc5_18": (16_847, 20.0),
    "rmc2_18": (33_343, 19.9),
    "rmc3_18": (33_048, 12.5),
    "rmc4_18": (32_016, 14.5),
    "rmc5_18": (27_887, 15.4),
    "r2plus1d_18": (33_345, 20.7),
}
# With torchvision's rules, batch norms included; GFLOPs at 16×112².
TORCHVISION = {
    "r3d_18": (33_371_472, 40.7),
    "mc3_18": (11_695_440, 43.3),
    "r2plus1d_18": (31_505_325, 40.5),
}
# Others' counts of the same networks.
ELSEWHERE = {
    "r2plus1d_34": 63_697_175,  # 63.7 M as its authors publish it
    "i3d": 12_697_264,
    "cnn_lstm": 11_176_512 + 4 * (2 * 512 * 512 + 2 * 512) + 401 * 512 - 112,  # ResNet-18, LSTM
    "c3d": 27_655_936 + 8193 * 4096 + 4097 * 4096 + 4097 * 400,
}

# One of each kind, small enough to run: factory, arguments, shape of the input.
SMALL = {
    name: (getattr(models, name), {"width": 8}, (2, 3, 4, 32, 32))
    for name in ("fr2d_18", "r3d_18", "mc3_18", "rmc3_18", "r2plus1d_18", "r2plus1d_50", "cnn_lstm")
}
SMALL["r2d_18"] = (models.r2d_18, {"width": 8, "frames": 4}, (2, 3, 4, 32, 32))
SMALL["i3d"] = (models.i3d, {}, (1, 3, 8, 32, 32))
SMALL["eco_lite, add"] = (models.eco_lite, {}, (1, 3, 4, 32, 32))
SMALL["eco_lite, cat"] = (models.eco_lite, {"conv": "cat"}, (1, 3, 4, 32, 32))
SMALL["on flow"] = (models.r2plus1d_18, {"in_channels": 2, "width": 8}, (2, 2, 4, 32, 32))
SMALL["paper's mids"] = (models.r2plus1d_18, {"mids": "paper", "width": 8}, (2, 3, 4, 32, 32))


# One of each kind of block, for what takes seconds and sees no more of a network than its blocks.
THOROUGH = pytest.mark.thorough
KINDS = (
    "r2plus1d_18", pytest.param("r2plus1d_50", marks=THOROUGH),
    pytest.param("eco_lite, add", marks=THOROUGH), "cnn_lstm",
)  # fmt: skip


def small(name: str) -> tuple[nn.Module, Tensor]:
    factory, arguments, shape = SMALL[name]
    torch.manual_seed(0)
    return factory(5, **arguments).eval(), torch.randn(shape)


@pytest.mark.parametrize("name", PAPER)
def test_counts_of_the_paper(name: str) -> None:
    arguments = (("mids", "paper"),) if name == "r2plus1d_18" else ()
    row = Row(name, 3, (8, 112, 112), "", arguments)
    parameters, multiplications = count(row)
    with torch.device("meta"):
        norms = [m for m in row.build().modules() if isinstance(m, nn.BatchNorm3d)]
    parameters -= sum(p.numel() for m in norms for p in m.parameters())
    # Table 2 of the paper rounds to one digit; R(2+1)D's 20.7 is 20.65 here.
    assert (parameters + 500) // 1000 == PAPER[name][0]
    assert multiplications / 1e9 == pytest.approx(PAPER[name][1], abs=0.055)


@pytest.mark.parametrize("name", TORCHVISION)
def test_counts_of_torchvision(name: str) -> None:
    parameters, multiplications = count(Row(name, 3, (16, 112, 112), ""))
    assert (parameters, round(multiplications / 1e9, 1)) == TORCHVISION[name]


def test_r2d_reads_sixteen_frames_with_a_wider_stem() -> None:
    eight = count(Row("r2d_18", 3, (8, 112, 112), ""))[0]
    sixteen = count(Row("r2d_18", 3, (16, 112, 112), "", (("frames", 16),)))[0]
    assert sixteen - eight == 64 * 3 * 8 * 49
    with pytest.raises(ValueError, match="requires 8 frames, got 9"):
        models.r2d_18(5, width=8)(torch.zeros(1, 3, 9, 32, 32))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_counts_of_others(name: str) -> None:
    assert count(next(r for r in ROWS if r.name == name))[0] == ELSEWHERE[name]


def test_the_4d_path_takes_four_and_two_ninths_of_the_parameters() -> None:
    three = clip_parameters("3d")
    assert clip_parameters("add") * 27 == three * (9 + 3)
    assert clip_parameters("cat") * 27 == three * (9 + 3) / 2


@pytest.mark.slow
def test_page_of_the_documentation_is_up_to_date() -> None:
    written = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert written == page(), "run python -m fastst.models > docs/models.md"


@pytest.mark.slow
def test_docstrings_state_the_size() -> None:
    first = {row.name: row for row in reversed(ROWS)}
    assert first.keys() == {*models.NETWORKS, "causal_autoencoder"}
    for name, row in first.items():
        parameters, multiplications = count(row)
        size = f"{row.size[0]}×{row.size[1]}²"
        said = " ".join((inspect.getdoc(getattr(models, name)) or "").split())
        assert f"{parameters:,} parameters, {multiplications / 1e9:.1f} GFLOPs at {size}." in said


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_same_as_torchvision(name: str) -> None:
    peer = getattr(torchvision_video(), name)
    torch.manual_seed(0)
    theirs = peer(num_classes=7)
    torch.manual_seed(0)
    ours = getattr(models, name)(7)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(1, 3, 4, 24, 24)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
@pytest.mark.parametrize("name", SMALL)
def test_converts(name: str) -> None:
    model, x = small(name)
    with torch.no_grad():
        before = model(x)
        assert before.shape == (len(x), 5)
        report = fastst.convert(model)
        pairs = sum(isinstance(m, nn.Conv3d) and m.kernel_size[1:] == (1, 1) and
                    m.kernel_size[0] > 1 for m in model.modules())  # fmt: skip
        if name.startswith(("r2plus1d", "on flow", "paper")):
            assert len(report.replaced) == pairs > 0
        torch.testing.assert_close(model(x), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
@pytest.mark.parametrize("name", KINDS)
def test_exports(name: str) -> None:
    model, x = small(name)
    fastst.convert(model)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_compiles_without_breaks(name: str) -> None:
    model, x = small(name)
    fastst.convert(model)
    torch._dynamo.reset()
    # PyTorch breaks graphs at an LSTM unless told otherwise.
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def test_c3d_has_its_shape() -> None:
    with torch.device("meta"):
        assert models.c3d(7)(torch.empty(2, 3, 16, 112, 112)).shape == (2, 7)


def test_two_streams_average_probabilities() -> None:
    torch.manual_seed(0)
    rgb, flow = torch.randn(2, 3, 4, 32, 32), torch.randn(2, 2, 4, 32, 32)
    a, b = models.mc3_18(5, width=8).eval(), models.mc3_18(5, width=8, in_channels=2).eval()
    fused = models.TwoStream(a, b, motion_weight=0.3)
    expected = 0.7 * a(rgb).softmax(1) + 0.3 * b(flow).softmax(1)
    torch.testing.assert_close(fused(rgb, flow).exp(), expected)
    with pytest.raises(ValueError, match="within"):
        models.TwoStream(a, b, motion_weight=1.0)


def autoencoder() -> models.CausalAutoencoder:
    torch.manual_seed(0)
    return models.causal_autoencoder(3, width=4).double()


@pytest.mark.parametrize("cuts", [[1] * 12, [5, 3, 4], [2, 9, 1], [12]])
def test_autoencoder_streams(cuts: list[int]) -> None:
    model = autoencoder()
    x = torch.randn(2, 3, 12, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        state, parts = None, []
        for chunk in x.split(cuts, 2):
            y, state = model.stream(chunk, state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 2), model(x), rtol=1e-10, atol=1e-12)


def two_streams() -> tuple[nn.Module, tuple[Tensor, ...]]:
    streams = [models.mc3_18(5, width=8, in_channels=c) for c in (3, 2)]
    return models.TwoStream(*streams), tuple(torch.randn(2, c, 4, 32, 32) for c in (3, 2))


def causal_pair() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return autoencoder(), (torch.randn(1, 3, 4, 8, 8, dtype=torch.float64),)


def clips_of_full_size() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return models.c3d(5), (torch.randn(1, 3, 16, 112, 112),)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [causal_pair, two_streams, pytest.param(clips_of_full_size, marks=THOROUGH)]
)
def test_the_rest_converts_exports_and_compiles(
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]],
) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    with torch.no_grad():
        before = model(*inputs)
        fastst.convert(model)
        torch.testing.assert_close(model(*inputs), before)
        program = torch.export.export(model, inputs, strict=False)
        torch.testing.assert_close(program.module()(*inputs), before)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), before)


def test_autoencoder_is_causal() -> None:
    model = autoencoder()
    x = torch.randn(1, 3, 12, 8, 8, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 6:] += 1
    with torch.no_grad():
        a, b = model(x), model(changed)
    assert torch.equal(a[:, :, :6], b[:, :, :6])
    assert not torch.equal(a[:, :, 8:], b[:, :, 8:])
    assert model.encode(x).shape == (1, 3, 3, 2, 2)
    with pytest.raises(ValueError, match="divisible by 4"):
        model(x[:, :, :10])
    with pytest.raises(ValueError, match="divisible by 4"):
        model.stream(x[..., :6])


@pytest.mark.parametrize("factory", [models.r3d_18, models.c3d, models.i3d, models.eco_lite])
def test_bad_arguments(factory: type) -> None:
    for bad in (0, -1, 2.0, True, "400"):
        with pytest.raises(ValueError, match="num_classes must be a positive int"):
            factory(bad)
    with pytest.raises(ValueError, match="in_channels must be a positive int"):
        factory(5, in_channels=0)


def test_unknown_kinds() -> None:
    with pytest.raises(ValueError, match="mids must be one of"):
        models.r2plus1d_18(5, mids="other")
    with pytest.raises(ValueError, match="conv must be 'add', 'cat' or '3d', got '2d'"):
        models.eco_lite(5, conv="2d")
    with pytest.raises(ValueError, match="frames must be a positive int"):
        models.r2d_18(5, frames=0)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(models.mc2_18(5, width=8).state_dict(), tmp_path / "weights.pt")
    again = models.mc2_18(5, width=8, weights=tmp_path / "weights.pt")
    assert isinstance(again, models.VideoResNet)
    with pytest.raises(ValueError, match="is no checkpoint of this VideoResNet"):
        models.mc3_18(5, width=8, weights=tmp_path / "weights.pt")

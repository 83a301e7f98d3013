"""Video models of diffusers with random weights, converted: ``python -m benchmarks.video_models``.

Prints a table: how many of a model's 3D convolutions ran as one operation, what these took in, and
how far the numbers are from those of the model as it was. Needs diffusers, which is installed by
hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastst
from fastst.dispatch import recording
from fastst.problem.conv3d import ConvProblem


class Model(NamedTuple):
    """A class of diffusers in a small configuration, and what it is called with."""

    name: str
    settings: dict[str, Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    tiles: bool = False  # also tiled


def _clip(frames: int, size: int, channels: int = 3) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(1, channels, frames, size, size),)


_WAN = dict(
    base_dim=16, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, attn_scales=[],
    temperal_downsample=[False, True],
)  # fmt: skip
MODELS = (
    Model("AutoencoderKLWan", _WAN, _clip(9, 32), True),
    Model("AutoencoderKLQwenImage", _WAN, _clip(1, 32)),
    Model(
        "AutoencoderKLHunyuanVideo",
        dict(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_add_attention=False,
        ),
        _clip(9, 32),
    ),
    Model(
        "AutoencoderKLCogVideoX",
        dict(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
        ),
        _clip(8, 32),
    ),
    Model(
        "AutoencoderKLMochi",
        dict(
            latent_channels=4,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            add_attention_block=(False,) * 5,
        ),
        _clip(7, 16),
    ),
    Model(
        "AutoencoderKLLTXVideo",
        dict(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        ),
        _clip(9, 64),
    ),
    Model(
        "AutoencoderKLCosmos",
        dict(
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            num_layers=1,
            latent_channels=4,
            attention_resolutions=(),
            resolution=64,
        ),
        _clip(9, 32),
    ),
    Model(
        "AutoencoderKLTemporalDecoder",
        dict(block_out_channels=(32,), layers_per_block=1, latent_channels=4),
        lambda: (torch.randn(3, 3, 16, 16),),
    ),
    Model(
        "UNet3DConditionModel",
        dict(
            block_out_channels=(8, 8),
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=2,
            sample_size=16,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        ),
        lambda: (torch.randn(1, 4, 4, 16, 16), torch.tensor([10]), torch.randn(1, 3, 8)),
    ),
    Model(
        "UNetSpatioTemporalConditionModel",
        dict(
            block_out_channels=(32, 64),
            cross_attention_dim=8,
            num_attention_heads=(2, 4),
            sample_size=16,
            layers_per_block=1,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        ),
        lambda: (
            torch.randn(1, 3, 8, 16, 16),
            torch.tensor([10]),
            torch.randn(1, 1, 8),
            torch.rand(1, 3),
        ),
    ),
)


def _diffusers() -> Any:
    # torchvision's wheel for GPUs, where it is installed, asks for operators that are not there.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import diffusers  # type: ignore[import-not-found]

    return diffusers, library


def _call(name: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    torch.manual_seed(1)  # of what a model draws
    extra = {"num_frames": 3} if name == "AutoencoderKLTemporalDecoder" else {}
    with torch.no_grad():
        y: Tensor = model(*inputs, **extra).sample
        return y + 0.0


def row(diffusers: Any, model: Model) -> str:
    """A row of the table.

    Raises:
        AssertionError: keys have changed.
    """
    torch.manual_seed(0)
    original = getattr(diffusers, model.name)(**model.settings).eval()
    inputs = model.inputs()
    y = _call(model.name, original, inputs)
    converted = copy.deepcopy(original)
    fastst.convert(converted)
    assert list(converted.state_dict()) == list(original.state_dict())
    with recording() as calls:
        z = _call(model.name, converted, inputs)
    difference = (y - z).abs().max().item() / y.abs().max().item()
    if model.tiles:
        for m in (original, converted):
            m.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16)
        tiled = _call(model.name, original, inputs) - _call(model.name, converted, inputs)
        difference = max(difference, tiled.abs().max().item() / y.abs().max().item())
    convs = sum(isinstance(m, nn.Conv3d) for m in original.modules())
    ran = [c.problem for c in calls if c.problem is not None]
    alone = [p for p in ran if isinstance(p, ConvProblem)]
    numbers = (
        convs, len(alone), sum(p.spec.norm != "none" for p in alone),
        sum(p.past > 0 for p in alone), sum(p.residual for p in alone), len(ran) - len(alone),
    )  # fmt: skip
    return f"| `{model.name}` | {' | '.join(map(str, numbers))} | {difference:.0e} |"


def main() -> None:
    diffusers, _library = _diffusers()
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}\n")
    print(
        "| model | 3D convolutions | calls of `conv3d` | with a norm | with cached frames "
        "| with the residual | calls of `conv2plus1d` | largest difference |"
    )
    print("|---|" + "---:|" * 7)
    for model in MODELS:
        try:
            print(row(diffusers, model), flush=True)
        except (TypeError, ValueError, RuntimeError) as error:
            print(f"| `{model.name}` | not run: {error} |", flush=True)


if __name__ == "__main__":
    main()

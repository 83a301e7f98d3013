"""Video and volume models with random weights, converted: ``python -m benchmarks.video_models``.

Prints a table: how many of a model's 3D convolutions ran as one operation, what these took in, and
how far the numbers are from those of the model as it was. Needs diffusers, pytorchvideo, MONAI and
nnU-Net's dynamic-network-architectures, which are installed by hand; a row says what is missing.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastst
from fastst.dispatch import recording
from fastst.problem.conv3d import ConvProblem


class Model(NamedTuple):
    """A class in a small configuration, or what makes a model, and what it is called with."""

    name: str
    settings: dict[str, Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    tiles: bool = False  # also tiled
    module: str = "diffusers"  # that it is of
    part: str = ""  # the class of the modules that are converted, each by itself; else the model

    @property
    def label(self) -> str:
        package = self.module.split(".")[0]
        which = f" ({package})" if package != "diffusers" else ""
        return f"`{self.name}`" + which + (f", each `{self.part}`" if self.part else "")

    def convert(self, model: nn.Module) -> None:
        for module in model.modules():
            if type(module).__name__ == (self.part or type(model).__name__):
                fastst.convert(module)


def _clip(frames: int, size: int, channels: int = 3) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(1, channels, frames, size, size),)


_WAN = dict(
    base_dim=16, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, attn_scales=[],
    temperal_downsample=[False, True],
)  # fmt: skip
_NNUNETS = "dynamic_network_architectures.architectures.unet"
_NNUNET = dict(
    input_channels=1, n_stages=3, features_per_stage=[16, 32, 64], conv_op=nn.Conv3d,
    kernel_sizes=[3, 3, 3], strides=[1, 2, 2], num_classes=2, n_conv_per_stage_decoder=[2, 2],
    conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
    nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, n_conv_per_stage=[2, 2, 2],
)  # fmt: skip
_NNUNET_RESIDUAL = {n: v for n, v in _NNUNET.items() if n != "n_conv_per_stage"} | {
    "n_blocks_per_stage": [1, 1, 1]
}
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
    Model("r3d_18", {}, _clip(16, 112), module="fastst.models"),
    Model("mc3_18", {}, _clip(16, 112), module="fastst.models"),
    Model("c3d", {}, _clip(16, 112), module="fastst.models"),
    Model("i3d", {}, _clip(16, 112), module="fastst.models"),
    Model(
        "create_x3d",
        dict(input_clip_length=4, input_crop_size=96),
        _clip(4, 96),
        module="pytorchvideo.models.x3d",
    ),
    Model(
        "BasicUNet",
        dict(spatial_dims=3, in_channels=1, features=(16, 16, 32, 64, 128, 16)),
        _clip(32, 32, 1),
        module="monai.networks.nets",
    ),
    Model(
        "DynUNet",
        dict(
            spatial_dims=3,
            in_channels=1,
            out_channels=2,
            kernel_size=[3, 3, 3],
            strides=[1, 2, 2],
            upsample_kernel_size=[2, 2],
            filters=[16, 32, 64],
            res_block=True,
        ),
        _clip(16, 32, 1),
        module="monai.networks.nets",
    ),
    Model("PlainConvUNet", _NNUNET, _clip(16, 32, 1), module=_NNUNETS),
    Model("ResidualEncoderUNet", _NNUNET_RESIDUAL, _clip(16, 32, 1), module=_NNUNETS),
)


_BLOCKS = {
    "AutoencoderKLTemporalDecoder": "TemporalResnetBlock",
    "UNet3DConditionModel": "TemporalConvLayer",
    "UNetSpatioTemporalConditionModel": "TemporalResnetBlock",
}


def _let_torchvision_load() -> Any:
    # Its wheel for GPUs, where it is installed, asks for operators that are not there.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _call(name: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    torch.manual_seed(1)  # of what a model draws
    extra = {"num_frames": 3} if name == "AutoencoderKLTemporalDecoder" else {}
    with torch.no_grad():
        y = model(*inputs, **extra)
        z: Tensor = y if isinstance(y, Tensor) else y.sample
        return z + 0.0


def row(model: Model) -> str:
    """A row of the table.

    Raises:
        AssertionError: keys have changed.
    """
    torch.manual_seed(0)
    make = getattr(importlib.import_module(model.module), model.name)
    original = make(**model.settings).eval()
    inputs = model.inputs()
    y = _call(model.name, original, inputs)
    converted = copy.deepcopy(original)
    model.convert(converted)
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
    return f"| {model.label} | {' | '.join(map(str, numbers))} | {difference:.0e} |"


def main() -> None:
    _library = _let_torchvision_load()
    print(f"torch {torch.__version__}\n")
    print(
        "| model | 3D convolutions | calls of `conv3d` | with a norm | with cached frames "
        "| with the residual | calls of `conv2plus1d` | largest difference |"
    )
    print("|---|" + "---:|" * 7)
    parts = [m._replace(part=_BLOCKS[m.name]) for m in MODELS if m.name in _BLOCKS]
    for model in (*MODELS, *parts):
        try:
            print(row(model), flush=True)
        except (ImportError, TypeError, ValueError, RuntimeError) as error:
            print(f"| {model.label} | not run: {error} |", flush=True)


if __name__ == "__main__":
    main()

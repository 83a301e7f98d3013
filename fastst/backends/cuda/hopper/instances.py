"""The tiles that the Hopper kernels are compiled for: the one list, for Python and for C++.

``setup.py`` and ``emulator/build.py`` write ``header()`` to ``hopper_instances.h``, from which the
kernels in ``csrc/cuda/hopper/`` take their instances. So nothing here is imported.
"""

# (columns, warpgroups that share a tile, blocks of 64 rows that each has of it). wgmma takes any
# multiple of 8 columns, so these fit 45 mid channels (48), 144, 288, 576 and 1,152 (144, 192), 230,
# 460 and 921 (232) and powers of two (64, 128) with at most 1% to spare, 45 apart, and 320 with 5%
# (112). 2 × 144 sums take 144 of a thread's 232 registers, beside which 2 × 160 spilled; 1 × 232
# take 116, and 256 spilled. A tile of one warpgroup is written while the other multiplies its own;
# it reads the weights for half as many places, which single taps, 64 and 96 columns and strides
# cannot afford.
SPATIAL = (
    (48, 1, 2),
    (64, 2, 2),
    (96, 2, 2),
    (112, 1, 2),
    (128, 2, 2),
    (128, 1, 2),
    (144, 2, 2),
    (144, 1, 2),
    (192, 2, 1),
    (232, 2, 1),
)
# (columns, output frames, stride): 128 registers of sums, or 64. More frames read u fewer times: 6
# for 4, 4 for 2, 3 for 1. Layers of stride 2 have 128 output channels and more.
TEMPORAL = ((64, 4, 1), (128, 2, 1), (128, 2, 2), (128, 1, 1), (128, 1, 2))
# (columns, output frames, stride) as an input gradient. These fit mid channels: no registers hold
# A, so 2 × 144 sums have room; of stride 2, whose frames come in pairs, 2 × 120 do with the
# derivative's operands, which fit 230, 460 and 921 with at most 4% to spare.
TEMPORAL_GRADIENT = ((64, 4, 1), (120, 2, 2), (128, 2, 1), (144, 2, 1), (232, 1, 1))
# (columns, outputs of a cell): 128 sums of a thread, or 64. Through a stride of 2 × 2 a cell has 4
# outputs. Halves of tiles are for layers that leave multiprocessors without one.
SPATIAL_GRADIENT = ((64, 2), (64, 4), (128, 1), (128, 2))
# (columns, units): a warpgroup has as many 64 × columns sums, of 152 registers a thread, and 3 × 72
# take all of them. 48, 72, 96 and 144 fit 45, 144, 288, 576 and 1,152 mid channels, 64 the powers
# of two, and 80 fits 230, 460 and 921 with at most 4% to spare; with products of 232 columns ptxas
# wants more registers than a block of 512 threads starts with.
WEIGHT_GRADIENT = ((48, 3), (64, 3), (72, 3), (80, 2), (96, 2), (144, 1))


def header() -> str:
    """The lists in C++."""
    lines = ["// The lists of fastst/backends/cuda/hopper/instances.py.", "#pragma once", ""]
    lines += ["#include <array>", "#include <cstdint>", "", "namespace fastst::instances {", ""]
    for name, tiles in globals().items():
        if name.isupper():
            row = f"std::array<int64_t, {len(tiles[0])}>"
            rows = ", ".join("{" + ", ".join(map(str, tile)) + "}" for tile in tiles)
            lines.append(
                f"inline constexpr std::array<{row}, {len(tiles)}> {name.lower()}{{{{{rows}}}}};"
            )
    return "\n".join([*lines, "", "}  // namespace fastst::instances", ""])

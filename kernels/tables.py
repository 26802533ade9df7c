"""Launch tables: architecture -> kernel -> largest width -> configuration. Written by `tune.py`.

An architecture that is not in MEASURED holds the start values of that file, which no device has confirmed.
"""

from __future__ import annotations

from .launch import LaunchConfig

# Device and versions behind each table.
MEASURED: dict[str, str] = {}

TABLES: dict[str, dict[str, dict[int, LaunchConfig]]] = {
    "sm80": {
        "residual_forward": {
            128: LaunchConfig(block_t=16, num_warps=4, programs=1728, split=False),
            256: LaunchConfig(block_t=8, num_warps=4, programs=1728, split=False),
            384: LaunchConfig(block_t=8, num_warps=4, programs=1728, split=True),
            512: LaunchConfig(block_t=4, num_warps=4, programs=1728, split=False),
            768: LaunchConfig(block_t=4, num_warps=4, programs=1728, split=True),
            1024: LaunchConfig(block_t=2, num_warps=4, programs=1728, split=False),
            1536: LaunchConfig(block_t=2, num_warps=4, programs=1728, split=True),
            2048: LaunchConfig(block_t=2, num_warps=8, programs=864, split=False),
            3072: LaunchConfig(block_t=2, num_warps=8, programs=864, split=True),
            4096: LaunchConfig(block_t=2, num_warps=16, programs=432, split=False),
            6144: LaunchConfig(block_t=2, num_warps=16, programs=432, split=True),
            8192: LaunchConfig(block_t=1, num_warps=16, programs=432, split=False),
        },
        "residual_backward": {
            128: LaunchConfig(block_t=8, num_warps=4, programs=864, split=False),
            256: LaunchConfig(block_t=4, num_warps=4, programs=864, split=False),
            384: LaunchConfig(block_t=4, num_warps=4, programs=864, split=True),
            512: LaunchConfig(block_t=2, num_warps=4, programs=864, split=False),
            768: LaunchConfig(block_t=2, num_warps=4, programs=864, split=True),
            1024: LaunchConfig(block_t=1, num_warps=4, programs=864, split=False),
            1536: LaunchConfig(block_t=1, num_warps=4, programs=864, split=True),
            2048: LaunchConfig(block_t=1, num_warps=8, programs=432, split=False),
            3072: LaunchConfig(block_t=1, num_warps=8, programs=432, split=True),
            4096: LaunchConfig(block_t=1, num_warps=16, programs=216, split=False),
            6144: LaunchConfig(block_t=1, num_warps=16, programs=216, split=True),
            8192: LaunchConfig(block_t=1, num_warps=16, programs=216, split=False),
        },
        "masked_mean": {
            8192: LaunchConfig(block_t=32, num_warps=4, programs=864, split=False),
        },
        "velocity_delta": {
            128: LaunchConfig(block_t=16, num_warps=4, programs=864, split=False),
            256: LaunchConfig(block_t=8, num_warps=4, programs=864, split=False),
            1024: LaunchConfig(block_t=2, num_warps=4, programs=864, split=False),
            8192: LaunchConfig(block_t=1, num_warps=16, programs=864, split=False),
        },
    },
    "sm90": {
        "residual_forward": {
            128: LaunchConfig(block_t=16, num_warps=4, programs=2112, split=False),
            256: LaunchConfig(block_t=8, num_warps=4, programs=2112, split=False),
            384: LaunchConfig(block_t=8, num_warps=4, programs=2112, split=True),
            512: LaunchConfig(block_t=4, num_warps=4, programs=2112, split=False),
            768: LaunchConfig(block_t=4, num_warps=4, programs=2112, split=True),
            1024: LaunchConfig(block_t=2, num_warps=4, programs=2112, split=False),
            1536: LaunchConfig(block_t=2, num_warps=4, programs=2112, split=True),
            2048: LaunchConfig(block_t=2, num_warps=8, programs=1056, split=False),
            3072: LaunchConfig(block_t=2, num_warps=8, programs=1056, split=True),
            4096: LaunchConfig(block_t=2, num_warps=16, programs=528, split=False),
            6144: LaunchConfig(block_t=2, num_warps=16, programs=528, split=True),
            8192: LaunchConfig(block_t=1, num_warps=16, programs=528, split=False),
        },
        "residual_backward": {
            128: LaunchConfig(block_t=8, num_warps=4, programs=1056, split=False),
            256: LaunchConfig(block_t=4, num_warps=4, programs=1056, split=False),
            384: LaunchConfig(block_t=4, num_warps=4, programs=1056, split=True),
            512: LaunchConfig(block_t=2, num_warps=4, programs=1056, split=False),
            768: LaunchConfig(block_t=2, num_warps=4, programs=1056, split=True),
            1024: LaunchConfig(block_t=1, num_warps=4, programs=1056, split=False),
            1536: LaunchConfig(block_t=1, num_warps=4, programs=1056, split=True),
            2048: LaunchConfig(block_t=1, num_warps=8, programs=528, split=False),
            3072: LaunchConfig(block_t=1, num_warps=8, programs=528, split=True),
            4096: LaunchConfig(block_t=1, num_warps=16, programs=264, split=False),
            6144: LaunchConfig(block_t=1, num_warps=16, programs=264, split=True),
            8192: LaunchConfig(block_t=1, num_warps=16, programs=264, split=False),
        },
        "masked_mean": {
            8192: LaunchConfig(block_t=32, num_warps=4, programs=1056, split=False),
        },
        "velocity_delta": {
            128: LaunchConfig(block_t=16, num_warps=4, programs=1056, split=False),
            256: LaunchConfig(block_t=8, num_warps=4, programs=1056, split=False),
            1024: LaunchConfig(block_t=2, num_warps=4, programs=1056, split=False),
            8192: LaunchConfig(block_t=1, num_warps=16, programs=1056, split=False),
        },
    },
    "sm100": {
        "residual_forward": {
            128: LaunchConfig(block_t=16, num_warps=4, programs=2368, split=False),
            256: LaunchConfig(block_t=8, num_warps=4, programs=2368, split=False),
            384: LaunchConfig(block_t=8, num_warps=4, programs=2368, split=True),
            512: LaunchConfig(block_t=4, num_warps=4, programs=2368, split=False),
            768: LaunchConfig(block_t=4, num_warps=4, programs=2368, split=True),
            1024: LaunchConfig(block_t=2, num_warps=4, programs=2368, split=False),
            1536: LaunchConfig(block_t=2, num_warps=4, programs=2368, split=True),
            2048: LaunchConfig(block_t=2, num_warps=8, programs=1184, split=False),
            3072: LaunchConfig(block_t=2, num_warps=8, programs=1184, split=True),
            4096: LaunchConfig(block_t=2, num_warps=16, programs=592, split=False),
            6144: LaunchConfig(block_t=2, num_warps=16, programs=592, split=True),
            8192: LaunchConfig(block_t=1, num_warps=16, programs=592, split=False),
        },
        "residual_backward": {
            128: LaunchConfig(block_t=8, num_warps=4, programs=1184, split=False),
            256: LaunchConfig(block_t=4, num_warps=4, programs=1184, split=False),
            384: LaunchConfig(block_t=4, num_warps=4, programs=1184, split=True),
            512: LaunchConfig(block_t=2, num_warps=4, programs=1184, split=False),
            768: LaunchConfig(block_t=2, num_warps=4, programs=1184, split=True),
            1024: LaunchConfig(block_t=1, num_warps=4, programs=1184, split=False),
            1536: LaunchConfig(block_t=1, num_warps=4, programs=1184, split=True),
            2048: LaunchConfig(block_t=1, num_warps=8, programs=592, split=False),
            3072: LaunchConfig(block_t=1, num_warps=8, programs=592, split=True),
            4096: LaunchConfig(block_t=1, num_warps=16, programs=296, split=False),
            6144: LaunchConfig(block_t=1, num_warps=16, programs=296, split=True),
            8192: LaunchConfig(block_t=1, num_warps=16, programs=296, split=False),
        },
        "masked_mean": {
            8192: LaunchConfig(block_t=32, num_warps=4, programs=1184, split=False),
        },
        "velocity_delta": {
            128: LaunchConfig(block_t=16, num_warps=4, programs=1184, split=False),
            256: LaunchConfig(block_t=8, num_warps=4, programs=1184, split=False),
            1024: LaunchConfig(block_t=2, num_warps=4, programs=1184, split=False),
            8192: LaunchConfig(block_t=1, num_warps=16, programs=1184, split=False),
        },
    },
    "portable": {
        "residual_forward": {
            128: LaunchConfig(block_t=16, num_warps=4, programs=2048, split=False),
            256: LaunchConfig(block_t=8, num_warps=4, programs=2048, split=False),
            384: LaunchConfig(block_t=8, num_warps=4, programs=2048, split=True),
            512: LaunchConfig(block_t=4, num_warps=4, programs=2048, split=False),
            768: LaunchConfig(block_t=4, num_warps=4, programs=2048, split=True),
            1024: LaunchConfig(block_t=2, num_warps=4, programs=2048, split=False),
            1536: LaunchConfig(block_t=2, num_warps=4, programs=2048, split=True),
            2048: LaunchConfig(block_t=2, num_warps=8, programs=1024, split=False),
            3072: LaunchConfig(block_t=2, num_warps=8, programs=1024, split=True),
            4096: LaunchConfig(block_t=2, num_warps=16, programs=512, split=False),
            6144: LaunchConfig(block_t=2, num_warps=16, programs=512, split=True),
            8192: LaunchConfig(block_t=1, num_warps=16, programs=512, split=False),
        },
        "residual_backward": {
            128: LaunchConfig(block_t=8, num_warps=4, programs=1024, split=False),
            256: LaunchConfig(block_t=4, num_warps=4, programs=1024, split=False),
            384: LaunchConfig(block_t=4, num_warps=4, programs=1024, split=True),
            512: LaunchConfig(block_t=2, num_warps=4, programs=1024, split=False),
            768: LaunchConfig(block_t=2, num_warps=4, programs=1024, split=True),
            1024: LaunchConfig(block_t=1, num_warps=4, programs=1024, split=False),
            1536: LaunchConfig(block_t=1, num_warps=4, programs=1024, split=True),
            2048: LaunchConfig(block_t=1, num_warps=8, programs=512, split=False),
            3072: LaunchConfig(block_t=1, num_warps=8, programs=512, split=True),
            4096: LaunchConfig(block_t=1, num_warps=16, programs=256, split=False),
            6144: LaunchConfig(block_t=1, num_warps=16, programs=256, split=True),
            8192: LaunchConfig(block_t=1, num_warps=16, programs=256, split=False),
        },
        "masked_mean": {
            8192: LaunchConfig(block_t=32, num_warps=4, programs=1024, split=False),
        },
        "velocity_delta": {
            128: LaunchConfig(block_t=16, num_warps=4, programs=1024, split=False),
            256: LaunchConfig(block_t=8, num_warps=4, programs=1024, split=False),
            1024: LaunchConfig(block_t=2, num_warps=4, programs=1024, split=False),
            8192: LaunchConfig(block_t=1, num_warps=16, programs=1024, split=False),
        },
    },
}

"""The peak numbers of accelerators, and the time that a computation takes at least on one (roofline). No jax."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Dense bfloat16 FLOP/s, and bytes a second of the device's memory; None where unknown."""

    flops: float | None
    bandwidth: float | None

    def least_seconds(self, flops: float, num_bytes: float) -> float | None:
        """The longer of the times that FLOPs and bytes take at these peaks; None if a peak is unknown."""
        if self.flops is None or self.bandwidth is None:
            return None
        return max(flops / self.flops, num_bytes / self.bandwidth)


# Patterns of `jax.Device.device_kind` -> TFLOP/s, GB/s; the first match applies. From NVIDIA's data sheets (dense; SXM parts
# unless named; the T4 has float16 alone) and the TPU pages of Google Cloud's documentation.
_TABLE = (
    (r"\bB200\b", 2250, 8000),
    (r"\bH200\b", 989, 4800),
    (r"\bH100 NVL\b", 835, 3900),
    (r"\bH100 PCIe\b", 756, 2000),
    (r"\bH100\b", 989, 3350),
    (r"\bA100-PCIE-40GB\b", 312, 1555),
    (r"\bA100 80GB PCIe\b", 312, 1935),
    (r"\bA100\b.*40GB", 312, 1555),
    (r"\bA100\b", 312, 2039),
    (r"\bL40S\b", 362, 864),
    (r"\bL40\b", 181, 864),
    (r"\bL4\b", 121, 300),
    (r"\bA10G?\b", 125, 600),
    (r"\bT4\b", 65, 320),
    (r"\bRTX 4090\b", 165, 1008),
    (r"\bTPU v6", 918, 1640),
    (r"\bTPU v5 ?(lite|e)", 197, 819),
    (r"\bTPU v5", 459, 2765),
    (r"\bTPU v4", 275, 1228),
)
COMPARED = {"H100": "NVIDIA H100 80GB HBM3", "v5e": "TPU v5 lite"}
"""Accelerators whose limits every table has, beside those of the device that was measured."""


def peaks_of(kind: str) -> Peaks:
    """The peaks of a device of this kind."""
    for pattern, tera, giga in _TABLE:
        if re.search(pattern, kind, re.IGNORECASE):
            return Peaks(tera * 1e12, giga * 1e9)
    return Peaks(None, None)

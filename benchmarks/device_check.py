"""What this checkout does on an accelerator: kernels, prefill, decode, hand-off, agents, training, start; in minutes.

    python benchmarks/device_check.py [--parts NAME ...] [--models NAME ...] [--minutes 8] [--json FILE] [--tiny]
    python benchmarks/device_check.py --table docs/device/CARD.json

Needs no network and no installation, and beside JAX, flax, optax and jaxtyping no package. docs/benchmarks.md describes the
parts (benchmarks/device/, a module each).
"""

import os
import sys
from pathlib import Path

# Run as a file, Python looks for modules beside it; and this checkout comes before an installed one.
sys.path[:1] = [str(Path(__file__).resolve().parents[1])]
# XLA takes three quarters of a GPU's memory by default.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

from benchmarks.device.absent import stand_in  # noqa: E402

stand_in()

from benchmarks.device.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())

"""The command's malloc options: freed arrays go back to the system."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.host

SCRIPT = """
import sys
import numpy as np
from pshare_jax.training.cli import unmap_freed_arrays

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

if sys.argv[1] == "unmapped":
    unmap_freed_arrays()
# Freeing this raises glibc's own threshold, below which it keeps freed blocks.
np.ones(30 << 20, np.int8)
before = resident()
arrays, between = [], []
for _ in range(100):
    arrays.append(np.ones(4 << 20, np.int8))
    between.append(np.ones(64 << 10, np.int8))
arrays.clear()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such option")
def test_freed_arrays_are_unmapped():
    def resident(how: str) -> float:
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        return float(done.stdout)

    # 6 MiB are still in use.
    assert resident("unmapped") < 30
    # The control.
    assert resident("kept") > 300

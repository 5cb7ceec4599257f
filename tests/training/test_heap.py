"""What a training process frees is the system's again."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.host

SCRIPT = """
import sys
import numpy as np
from pshare_jax.training.heap import return_freed_arrays

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

if sys.argv[1] == "returned":
    return_freed_arrays()
# From here on glibc by itself keeps what is smaller.
np.ones(30 << 20, np.int8)
before = resident()
arrays, between = [], []
for _ in range(100):
    arrays.append(np.ones(4 << 20, np.int8))
    between.append(np.ones(64 << 10, np.int8))
arrays.clear()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps them")
def test_freed_arrays_do_not_stay():
    def stays(how: str) -> float:
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        return float(done.stdout)

    # 6 MiB are still in use.
    assert stays("returned") < 30
    # Without it this test would show nothing.
    assert stays("kept") > 300

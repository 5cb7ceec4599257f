"""budget.py: pages that fit devices of known memory, who shares what, and the table."""

from types import SimpleNamespace

import pytest

from pshare_jax.engine.kv.budget import MIB, Holdings, PoolNeed, pages_that_fit, rooms, table
from pshare_jax.errors import PshareError

pytestmark = pytest.mark.host
GIB = 2**30


class Device:
    def __init__(self, index, limit=None, used=0, platform="gpu"):
        self.id, self.platform = index, platform
        self.stats = None if limit is None else {"bytes_limit": limit, "bytes_in_use": used}

    def memory_stats(self):
        return self.stats


def no_host():
    raise AssertionError("accelerators have memory of their own")


def pages(needs, temporaries=0, least=3, most=10**9, free_host=no_host):
    return pages_that_fit(needs, rooms(needs, temporaries, free_host), least, most)


def coarse(number):
    """A number of four binary digits, and zeros."""
    digits = f"{number:b}"
    return int(digits[:4].ljust(len(digits), "0"), 2)


def test_a_pool_is_nine_tenths_of_what_is_left():
    device = Device(0, 80 * GIB, 16 * GIB)
    alone = PoolNeed("pool", (device,), 2 * MIB, 0)
    assert pages([alone], temporaries=4 * GIB) == {"pool": coarse(int(60 * GIB * 0.9) // (2 * MIB))}
    sends = PoolNeed("pool", (device,), 2 * MIB, 512)
    assert pages([sends], temporaries=4 * GIB) == {"pool": coarse(int(59 * GIB * 0.9) // (2 * MIB))}


def test_every_device_of_a_pool_must_have_room_and_pools_divide_a_device():
    free, full = Device(0, 100 * MIB), Device(1, 100 * MIB, 50 * MIB)
    assert pages([PoolNeed("wide", (free, full), MIB, 0)]) == {"wide": coarse(45)}
    needs = [PoolNeed("a", (free,), MIB, 0), PoolNeed("b", (free,), MIB, 0), PoolNeed("c", (full,), MIB, 0)]
    assert pages(needs) == dict.fromkeys("abc", coarse(45))
    # A device of two pools with pages of different size (two meshes of different degree) has as many of either.
    assert pages([PoolNeed("a", (free,), 2 * MIB, 0), PoolNeed("b", (free,), MIB, 0)]) == {"a": 30, "b": 30}


def test_cpu_devices_share_a_quarter_of_what_the_machine_has_left():
    first, second = Device(0, platform="cpu"), Device(1, platform="cpu")
    needs = [PoolNeed("prefill", (first,), MIB, 512), PoolNeed("decode", (second,), MIB, 512)]
    assert pages(needs, free_host=lambda: 800 * MIB) == dict.fromkeys(("prefill", "decode"), coarse(100))
    assert pages(needs, free_host=lambda: 800 * MIB, most=64) == {"prefill": 64, "decode": 64}


def test_too_little_room_is_one_sentence_with_numbers():
    needs = [PoolNeed("decode pool 0", (Device(3, 100 * MIB, 90 * MIB),), MIB, 2)]
    with pytest.raises(PshareError, match=r"^[^\n]*$") as caught:
        pages(needs, temporaries=3 * MIB, least=34)
    facts = (
        "decode pool 0",
        "4 KV pages",
        "1,048,576 bytes",
        "at least 34",
        "gpu 3",
        "100 MiB",
        "90 MiB",
        "3 MiB",
        "2 MiB",
    )
    assert all(fact in str(caught.value) for fact in facts), str(caught.value)
    with pytest.raises(PshareError, match="0 KV pages"):
        pages(needs, temporaries=GIB)
    with pytest.raises(PshareError, match="8 MiB of this machine's memory are free"):
        pages([PoolNeed("pool", (Device(0, platform="cpu"),), MIB, 0)], free_host=lambda: 8 * MIB)


def array(mib, *names):
    """An array with so many MiB on each of the devices of these names."""
    devices = {DEVICES[name] for name in names}
    sharding = SimpleNamespace(device_set=devices, shard_shape=lambda shape: (mib, MIB // 4))
    return SimpleNamespace(sharding=sharding, shape=(), dtype=SimpleNamespace(itemsize=4))


DEVICES = {"a": Device(0, 100 * MIB, 70 * MIB), "b": Device(1, 200 * MIB, 20 * MIB), "cpu": Device(0, platform="cpu")}


def cells(line):
    return [cell.strip() for cell in (line[:14], *(line[14 + 11 * i : 25 + 11 * i] for i in range(7)))]


def test_the_table_counts_an_array_once():
    base, full, pool = array(5, "a", "b"), array(20, "a"), array(10, "a")
    holdings = Holdings([base, base], [base, full, full], [pool])
    needs = [PoolNeed("pool", (DEVICES["b"], DEVICES["a"]), MIB, 4)]
    lines = [cells(line) for line in table(holdings, needs, 6 * MIB, no_host)]
    assert lines[1:] == [
        ["gpu 0", "100", "5", "20", "10", "6", "4", "20"],
        ["gpu 1", "200", "5", "0", "0", "6", "4", "170"],
    ]
    assert lines[0] == ["memory in MiB", "limit", "base", "tasks", "pools", "programs", "transfers", "free"]


def test_the_table_says_of_a_cpu_what_is_known():
    holdings = Holdings([array(30, "cpu")], [], [array(7, "cpu")])
    lines = table(holdings, [PoolNeed("pool", (DEVICES["cpu"],), MIB, 0)], None, lambda: 900 * MIB)
    assert [cells(line) for line in lines[1:]] == [
        ["cpu 0", "-", "30", "0", "7", "-", "0", "-"],
        ["the machine", "-", "30", "0", "7", "-", "0", "900"],
    ]

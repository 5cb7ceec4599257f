"""host_memory.py on the files of machines: without limits, in cgroups of both versions, in a container, without /proc."""

import pytest

from pshare_jax.host_memory import free_host_memory

pytestmark = pytest.mark.host
GIB = 2**30


@pytest.fixture
def machine(tmp_path):
    """Writes files below a root; 8 GiB are available."""

    def write(files):
        for name, text in {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {8 * 2**20} kB\n", **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def version2(folder, limit, usage, cache):
    stat = f"anon 5\ninactive_file {cache}\n"
    return {f"{folder}/memory.max": f"{limit}\n", f"{folder}/memory.current": str(usage), f"{folder}/memory.stat": stat}


def version1(folder, limit, usage, cache):
    files = {
        "limit_in_bytes": limit,
        "usage_in_bytes": usage,
        "stat": f"inactive_file 1\ntotal_inactive_file {cache}\n",
    }
    return {f"{folder}/memory.{name}": str(value) for name, value in files.items()}


def test_a_machine_without_limits(machine):
    assert free_host_memory(machine({})) == 8 * GIB
    unlimited = {"proc/self/cgroup": "0::/user\n", **version2("sys/fs/cgroup/user", "max", 5, 0)}
    assert free_host_memory(machine(unlimited)) == 8 * GIB


def test_the_narrowest_cgroup_above_the_process_counts(machine):
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        **version2("sys/fs/cgroup/a", 4 * GIB, 3 * GIB, GIB),
        **version2("sys/fs/cgroup/a/b", 6 * GIB, GIB, 0),
        **version2("sys/fs/cgroup/other", 10, 10, 0),
    }
    assert free_host_memory(machine(files)) == 2 * GIB


def test_version_1_and_a_path_that_only_the_host_has(machine):
    files = {
        "proc/self/cgroup": "5:cpu:/x\n9:memory:/docker/5\n0::/\n",
        **version1("sys/fs/cgroup/memory", 4 * GIB, 2 * GIB, GIB // 2),
        **version1("sys/fs/cgroup/cpu/x", 1, 1, 0),
    }
    assert free_host_memory(machine(files)) == 2.5 * GIB
    full = version1("sys/fs/cgroup/memory", GIB, 2 * GIB, 0)
    assert free_host_memory(machine(files | full)) == 0


def test_without_proc_it_is_all_memory(tmp_path):
    assert free_host_memory(tmp_path) > 2**28

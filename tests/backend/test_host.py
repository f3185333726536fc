"""Free memory of the machine and of the container of this process."""

import pytest

from keras_gemma.backend import host

GB = 1 << 30


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Returns a function that writes the files of a machine with 8 GB free and its groups."""
    monkeypatch.setattr(host, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host, "GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(host, "GROUPS", tmp_path / "groups")

    def lay_out(group, files, meminfo=f"MemTotal: 1 kB\nMemAvailable: {8 * GB >> 10} kB\n"):
        (tmp_path / "meminfo").write_text(meminfo)
        (tmp_path / "cgroup").write_text(group)
        for name, text in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return lay_out


def test_no_groups(machine):
    machine("", {})
    assert host.free_memory() == 8 * GB


def test_unknown_free_memory(machine):
    machine("", {}, meminfo="")
    assert host.free_memory() is None


def test_cgroups_version_2(machine):
    files = {
        "a/b/memory.max": 3 * GB,
        "a/b/memory.current": 2 * GB,
        "a/b/memory.stat": f"anon 5\ninactive_file {GB // 2}",  # can be reclaimed
    }
    machine("0::/a/b\n", files)
    assert host.free_memory() == 3 * GB // 2
    machine("0::/a/b\n", {"a/memory.max": 4 * GB, "a/memory.current": 3 * GB})  # the parent's limit
    assert host.free_memory() == GB
    machine("0::/a/b\n", {"a/memory.max": "max", "a/b/memory.max": "max"})
    assert host.free_memory() == 8 * GB
    machine("0::/a/b\n", {"a/memory.max": 4 * GB, "a/memory.current": 5 * GB})
    assert host.free_memory() == 0


def test_container_group_at_the_root(machine):
    machine("0::/of/the/host\n", {"memory.max": 3 * GB, "memory.current": GB})
    assert host.free_memory() == 2 * GB


def test_cgroups_version_1(machine):
    files = {
        "memory/a/memory.limit_in_bytes": 2 * GB,
        "memory/a/memory.usage_in_bytes": GB,
        "memory/a/memory.stat": f"inactive_file 7\ntotal_inactive_file {GB // 4}",
        "memory/memory.limit_in_bytes": 2**63 - 4096,  # no limit
        "memory/memory.usage_in_bytes": GB,
    }
    machine("5:cpu:/a\n4:memory:/a\n0::/\n", files)
    assert host.free_memory() == GB + GB // 4

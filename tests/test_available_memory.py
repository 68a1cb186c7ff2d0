"""What memory there is: control groups of both versions, nested, and Metal's working set."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import psutil
import pytest

from moelab.experts import memory
from moelab.experts.memory import available_memory, control_group_memory

MB = 10**6
V1_NO_LIMIT = 9223372036854771712


def machine(root: Path, cgroup: str, mounts: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mounts)
    return root


def v2(
    group: Path, limit: int | str, used: int, inactive: int | None = None, high: Any = "max"
) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.high").write_text(f"{high}\n")
    (group / "memory.current").write_text(f"{used}\n")
    if inactive is not None:
        (group / "memory.stat").write_text(f"anon 5\nfile 7\ninactive_file {inactive}\n")


def v1(group: Path, limit: int, used: int, inactive: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (group / "memory.usage_in_bytes").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {inactive}\n")


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)


def test_the_least_of_all_ancestors(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/a/b/c\n", V2_MOUNT)
    top = root / "sys/fs/cgroup"
    v2(top / "a/b/c", "max", 10 * MB)
    assert control_group_memory(root) is None
    v2(top / "a/b/c", 100 * MB, 10 * MB)
    assert control_group_memory(root) == 90 * MB
    v2(top / "a", 50 * MB, 20 * MB)  # two above, and tighter
    assert control_group_memory(root) == 30 * MB
    v2(top / "a/b", 40 * MB, 39 * MB)
    assert control_group_memory(root) == 1 * MB
    v2(top / "a/x", 1, 1)  # a sibling is none of ours
    assert control_group_memory(root) == 1 * MB


def test_reclaimable_page_cache_is_free(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/job\n", V2_MOUNT)
    job = root / "sys/fs/cgroup/job"
    v2(job, 100 * MB, 95 * MB, 80 * MB)
    assert control_group_memory(root) == 85 * MB
    v2(job, 100 * MB, 95 * MB, 99 * MB)  # read at two moments, it may exceed the use
    assert control_group_memory(root) == 100 * MB
    (job / "memory.stat").write_text("nonsense\n")
    assert control_group_memory(root) == 5 * MB


def test_memory_high_is_a_limit_and_nothing_is_below_zero(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/job\n", V2_MOUNT)
    v2(root / "sys/fs/cgroup/job", 100 * MB, 30 * MB, 0, high=50 * MB)
    assert control_group_memory(root) == 20 * MB
    v2(root / "sys/fs/cgroup/job", 100 * MB, 60 * MB, 0, high=50 * MB)
    assert control_group_memory(root) == 0


def test_version_1_beside_an_empty_version_2(tmp_path: Path) -> None:
    cgroup = "9:name=systemd:/\n4:memory:/pod/box\n1:cpu:/\n0::/\n"
    root = machine(tmp_path, cgroup, V1_MOUNTS)
    top = root / "sys/fs/cgroup/memory"
    v1(top, V1_NO_LIMIT, 500 * MB, 0)
    v1(top / "pod", 200 * MB, 90 * MB, 10 * MB)
    v1(top / "pod/box", V1_NO_LIMIT, 80 * MB, 10 * MB)
    assert control_group_memory(root) == 120 * MB
    v1(top / "pod/box", 85 * MB, 80 * MB, 10 * MB)
    assert control_group_memory(root) == 15 * MB


@pytest.mark.parametrize("group", ["/docker/abc", "/", "/../../outside", "/elsewhere"])
def test_in_a_container_the_mounted_part_counts(tmp_path: Path, group: str) -> None:
    """There the group's path is the host's, or is not below what is mounted."""
    mount = "30 23 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n"
    root = machine(tmp_path, f"0::{group}\n", mount)
    v2(root / "sys/fs/cgroup", 64 * MB, 4 * MB)
    assert control_group_memory(root) == 60 * MB


@pytest.mark.parametrize("text", ["", "junk", "0:", "0::/\n:::\n4:memory\n"])
def test_no_control_groups(tmp_path: Path, text: str) -> None:
    assert control_group_memory(tmp_path) is None
    assert control_group_memory(machine(tmp_path, text, "junk\n- -\n1 2 3 - a\n")) is None


def test_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=9 * MB))
    monkeypatch.setattr(memory, "control_group_memory", lambda: None)
    assert available_memory() == memory.Memory(9 * MB, "available memory")
    monkeypatch.setattr(memory, "control_group_memory", lambda: 10 * MB)
    assert available_memory().nbytes == 9 * MB
    monkeypatch.setattr(memory, "control_group_memory", lambda: 3 * MB)
    assert available_memory() == memory.Memory(3 * MB, "memory left in this control group")


def test_metals_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"max_recommended_working_set_size": 20 * MB}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=17 * MB))
    monkeypatch.setattr(memory, "control_group_memory", lambda: 1)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 5 * MB)
    assert available_memory().nbytes == 11 * MB
    assert "80% of Metal's recommended" in available_memory().source
    info["max_recommended_working_set_size"] = 30 * MB
    assert available_memory() == memory.Memory(17 * MB, "available memory")
    info.clear()  # no Metal
    assert available_memory() == memory.Memory(17 * MB, "available memory")


def test_this_machine() -> None:
    found = available_memory()
    assert 0 < found.nbytes <= psutil.virtual_memory().total

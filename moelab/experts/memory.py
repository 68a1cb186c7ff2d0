"""How much memory a model could have on this machine now.

What the system calls available is not all of it on a machine that shares: a container's control
group has a limit of its own, and so may every group above it, and on a Mac Metal pushes back
before memory is used up. The least of these counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

METAL_SHARE = 0.8
"""Of Metal's recommended working set; beyond it macOS begins to push back."""

NO_LIMIT = 1 << 60
"""Version 1 writes the largest page count there is where version 2 writes "max"."""

_Names = tuple[str, tuple[str, ...], str]

_V2: _Names = ("memory.current", ("memory.max", "memory.high"), "inactive_file")
_V1: _Names = ("memory.usage_in_bytes", ("memory.limit_in_bytes",), "total_inactive_file")


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory that a model could have, in bytes, and what that figure is."""

    nbytes: int
    source: str


def available_memory() -> Memory:
    """Returns the memory that a model could have on this machine now.

    The least of: what the system says programs could have; what this process's control groups
    leave it, on Linux; and on a Mac what is left of `METAL_SHARE` of Metal's recommended working
    set, which counts for the whole process, so that what MLX already holds is taken off.
    """
    import psutil

    found = [Memory(int(psutil.virtual_memory().available), "available memory")]
    if sys.platform == "darwin":
        import mlx.core as mx

        working_set = mx.device_info().get("max_recommended_working_set_size", 0)
        if working_set:  # a Mac without Metal, such as a virtual one, has none
            left = int(working_set * METAL_SHARE) - mx.get_active_memory()
            what = f"{METAL_SHARE:.0%} of Metal's recommended working set, less what MLX holds"
            found.append(Memory(max(left, 0), what))
    else:
        limit = control_group_memory()
        if limit is not None:
            found.append(Memory(limit, "memory left in this control group"))
    return min(found, key=lambda memory: memory.nbytes)


def control_group_memory(root: Path = Path("/")) -> int | None:
    """Returns the bytes left under this process's memory limits, versions 1 and 2.

    Limits nest: the least over the group and all above it counts. A group's use includes the page
    cache of files that its processes read, and the kernel takes the part that was not used lately
    (`inactive_file`) back before it refuses memory, so that part counts as free. Version 2's
    `memory.high` counts as a limit, since the kernel slows a group down that is over it.
    See the kernel's documentation, admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.

    Args:
        root: Where `proc` and the mounted hierarchies are; for tests.

    Returns:
        Bytes, or None where there is no limit or no control group.
    """
    lefts = [left for group, names in _groups(root) if (left := _left(group, names)) is not None]
    return max(0, min(lefts)) if lefts else None


def _groups(root: Path) -> Iterator[tuple[Path, _Names]]:
    """Yields the folders of this process's memory groups, innermost first, and their files."""
    try:
        entries = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for entry in entries:
        number, _, rest = entry.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            kind, names = "cgroup2", _V2
        elif "memory" in controllers.split(","):
            kind, names = "cgroup", _V1
        else:
            continue
        for mount in mounts:
            place = _mounted(mount, kind)
            if place is None:
                continue
            top = root / str(place[1]).lstrip("/")
            try:
                below = PurePosixPath(group).relative_to(place[0])
            except ValueError:  # the group lies outside of what a container sees: its top counts
                below = PurePosixPath()
            if ".." in below.parts:
                below = PurePosixPath()
            yield top / below, names
            for parent in below.parents:
                yield top / parent, names


def _mounted(mount: str, kind: str) -> tuple[PurePosixPath, PurePosixPath] | None:
    """Returns the root and the place of a mounted hierarchy with memory limits, from mountinfo."""
    left, _, right = mount.partition(" - ")
    fields, types = left.split(), right.split()
    if len(fields) < 5 or len(types) < 3 or types[0] != kind:
        return None
    if kind == "cgroup" and "memory" not in types[2].split(","):
        return None
    return PurePosixPath(fields[3]), PurePosixPath(fields[4])


def _left(group: Path, names: _Names) -> int | None:
    """Returns the bytes that one group leaves, or None where it sets no limit."""
    current, limits, reclaimable = names
    numbers = [_number(group / name) for name in limits]
    found = [limit for limit in numbers if limit is not None and limit < NO_LIMIT]
    used = _number(group / current)
    if not found or used is None:
        return None
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= min(used, int(stat.get(reclaimable, 0)))
    except (OSError, ValueError):
        pass  # then all of it counts as used, which is on the safe side
    return min(found) - used


def _number(path: Path) -> int | None:
    """Reads a file with one number; None for "max", or where there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None

"""Fences around a process that runs an untrusted program.

Knows nothing about programs. Runs in a child process without this package, so it imports only the
standard library. Each fence is a step that raises `OSError` if the kernel refuses it:

    namespaces   own process ids, network, mounts, IPC and host name; a root directory with Python's
                 library and shared libraries, read-only, and a small `/tmp` in memory
    landlock     files are read-only except in the working directory; no TCP
    privileges   no root, no capabilities, none to gain
    limits       CPU time, memory, file size, processes, core dumps
"""

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

MAX_MEMORY = 1 << 30
"""Maximum address space of a process, in bytes."""

MAX_FILE = 1 << 20
"""Maximum size of a file, in bytes."""

MAX_PROCESSES = 8
"""Maximum number of processes and threads, including two that run the program."""

DISK = "size=16m,nr_inodes=2000,mode=755"
"""Options of the file system in memory."""

NOBODY = 65534
"""User and group of a program if this process belongs to root."""

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/etc/ld.so.cache")
"""Paths of shared libraries on Linux systems."""

# Constants of Linux's headers sched.h, mount.h, prctl.h and landlock.h.
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 8, 4096, 16384, 1 << 18, 2
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
# System calls have the same numbers on every architecture.
MOUNT_SETATTR, CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 442, 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
FILE_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}

SPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET

libc = ctypes.CDLL(None, use_errno=True)


class Ruleset(ctypes.Structure):
    """`struct landlock_ruleset_attr`."""

    _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class PathRule(ctypes.Structure):
    """`struct landlock_path_beneath_attr`."""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def call(name: str, *arguments: object) -> int:
    """Calls a function of the C library and returns its result.

    Raises:
        OSError: If it fails, or the system has no such function.
    """
    try:
        function = getattr(libc, name)
    except AttributeError:
        raise OSError(f"{name}: this system has no such function") from None
    texts = [os.fsencode(part) if isinstance(part, str) else part for part in arguments]
    result = function(*texts)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def syscall(number: int, *arguments: object) -> int:
    """Same as `call`, for a system call by its number."""
    return call("syscall", ctypes.c_long(number), *arguments)


def enter_namespaces() -> None:
    """Moves this process into new namespaces, and its next child into a new PID namespace.

    Root needs no user namespace for that; a user gets one, in which it has the same ids.
    """
    if os.geteuid() == 0:
        try:
            call("unshare", SPACES)
            return
        except OSError:
            pass  # Root in a container, which may still have a user namespace.
    ids = os.geteuid(), os.getegid()
    call("unshare", CLONE_NEWUSER | SPACES)
    Path("/proc/self/setgroups").write_text("deny")
    for name, id in zip(("uid_map", "gid_map"), ids, strict=True):
        Path(f"/proc/self/{name}").write_text(f"{id} {id} 1")


def library_paths() -> list[str]:
    """Returns the existing folders and files that Python needs to import its standard library."""
    folders = {*sys.path, os.path.join(sys.base_prefix, "lib"), *LIBRARIES}
    paths = sorted(path for path in folders if os.path.isabs(path) and os.path.exists(path))
    return [path for path in paths if not any(path.startswith(f"{p}/") for p in paths)]


def change_root(directory: str) -> None:
    """Replaces the root directory by one in memory with Python's library and `/tmp`."""
    call("mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    call("mount", "tmpfs", directory, "tmpfs", MS_NOEXEC, DISK)
    for path in library_paths():
        target = directory + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            Path(target).touch()
        call("mount", path, target, None, MS_BIND | MS_REC, None)
        make_read_only(target)
    os.makedirs(f"{directory}/tmp", exist_ok=True)
    os.chmod(f"{directory}/tmp", 0o777)
    os.chdir(directory)
    call("pivot_root", ".", ".")
    call("umount2", ".", MNT_DETACH)
    os.chdir("/tmp")


def make_read_only(mount: str) -> None:
    """Makes a mount and the mounts in it read-only. Landlock does not forbid chmod or utime."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY)  # `struct mount_attr`
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    syscall(MOUNT_SETATTR, AT_FDCWD, mount, AT_RECURSIVE, attributes, size)


def drop_privileges(change_user: bool) -> None:
    """Gives up all capabilities, and the means to gain them again. Root also becomes nobody.

    The limit of processes counts only those in the same user namespace, so nobody gets a new one.

    Args:
        change_user: If False, root stays root. Its files may be the only ones with a Python.
    """
    if change_user and os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("unshare", CLONE_NEWUSER)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())


def forbid_tracing() -> None:
    """Forbids other processes of the same user to read or change this one and its children."""
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)


def set_limits(seconds: float) -> None:
    """Limits CPU time, memory, file size, processes and core dumps."""
    limits = {
        "CPU": int(seconds) + 1,
        "AS": MAX_MEMORY,
        "FSIZE": MAX_FILE,
        "NPROC": MAX_PROCESSES,
        "CORE": 0,
        "NOFILE": 64,
    }
    refused = []
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (ValueError, OSError, AttributeError):
            refused.append(f"RLIMIT_{name}")
    if refused:
        raise OSError(f"this system refuses {', '.join(refused)}")


def landlock_version() -> int:
    """Returns the version of the kernel's Landlock."""
    return syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)


def restrict_files(readable: list[str], writable: str) -> None:
    """Forbids everything in files but reading `readable` and using `writable`, and all TCP."""
    version = landlock_version()
    rights = max(rights for abi, rights in FILE_RIGHTS_BY_ABI.items() if abi <= version)
    ruleset = Ruleset(rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    rules = syscall(
        CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(ctypes.sizeof(ruleset)), 0
    )
    read = EXECUTE | READ_FILE | READ_DIR
    # If `readable` has `/`, only the mount's MS_NOEXEC forbids to execute files in `writable`.
    for path, allowed in [*((path, read) for path in readable), (writable, rights & ~EXECUTE)]:
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            allowed &= ~READ_DIR
        rule = PathRule(allowed, file)
        syscall(ADD_RULE, rules, 1, ctypes.byref(rule), 0)
        os.close(file)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    syscall(RESTRICT_SELF, rules, 0)
    os.close(rules)


def raise_fences(directory: str, seconds: float, in_namespaces: bool) -> dict[str, str]:
    """Raises the fences around this process, whose working directory is `directory`.

    Args:
        directory: Existing folder for the program's files.
        seconds: Limit of CPU time.
        in_namespaces: True if this process is in new namespaces, and is the first one there.

    Returns:
        Fences that do not hold, with the reason.
    """
    missing = {}

    def attempt(name: str, step: Callable[..., object], *arguments: object) -> bool:
        try:
            step(*arguments)
        except OSError as error:
            missing[name] = error.strerror or str(error)
        return name not in missing

    os.chdir(directory)
    readable = library_paths()
    has_new_root = in_namespaces and attempt("namespaces", change_root, directory)
    if has_new_root:
        directory, readable = "/tmp", ["/"]
    has_landlock = attempt("landlock", landlock_version)
    attempt("privileges", drop_privileges, has_new_root)
    if has_landlock:
        attempt("landlock", restrict_files, readable, directory)
    attempt("limits", set_limits, seconds)
    return missing

"""Landlock: a Linux process gives up rights to files, network and other processes, for itself and all it starts."""

import ctypes
import os
import struct
from collections.abc import Iterable

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # numbers of the system calls, on every architecture
_READ = 0b1101  # execute, read a file, list a folder
_OF_A_FILE = 0b111 | 1 << 14  # execute, write, read, truncate; the others are rights to a folder
_TCP = 0b11  # bind, connect
_OTHERS = 0b11  # abstract sockets, signals
_NO_NEW_PRIVILEGES = 38  # of prctl

_libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """Which Landlock the kernel offers; 0 if none."""
    return max(0, _libc.syscall(_CREATE, None, 0, 1))


def confine(readable: Iterable[str], writable: Iterable[str]) -> bool:
    """Leave this process only these folders and files. Return whether the kernel could do it.

    From version 4 on it also loses TCP, from 6 on it sends no signals to processes that it has not started.
    """
    offered = version()
    if not offered:
        return False
    files = (
        1 << {1: 13, 2: 14}.get(offered, 15)
    ) - 1  # all rights to files that this version knows
    rights = [files, _TCP if offered >= 4 else 0, _OTHERS if offered >= 6 else 0]
    known = 1 + (offered >= 4) + (offered >= 6)
    attributes = struct.pack(f"={known}Q", *rights[:known])
    rules = _call(_CREATE, attributes, len(attributes), 0)
    try:
        for paths, allowed in ((readable, _READ), (writable, files)):
            for path in filter(os.path.exists, paths):
                _allow(rules, path, allowed)
        if _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
        _call(_RESTRICT, rules, 0)
    finally:
        os.close(rules)
    return True


def _allow(rules: int, path: str, allowed: int) -> None:
    if not os.path.isdir(path):
        allowed &= _OF_A_FILE
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _call(_ADD, rules, 1, struct.pack("=Qi", allowed, place), 0)
    finally:
        os.close(place)


def _call(number: int, *arguments: object) -> int:
    result = _libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "Landlock")
    return result

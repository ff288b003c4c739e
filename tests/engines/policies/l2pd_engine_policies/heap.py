"""The live memory of a process: what it has allocated from the C library and not freed.

Resident memory also counts what was freed and is in fragments; that grows without a leak.
"""

import ctypes

_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def live_mib():
    """MiB of this process, of allocations on the heap and of large ones, which are mapped."""
    mallinfo = ctypes.CDLL(None).mallinfo2  # glibc 2.33
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return (found.uordblks + found.hblkhd) / 2**20

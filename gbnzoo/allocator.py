"""The C library's allocator, set for training on CPUs."""

import ctypes

# glibc's malloc.h; the parameters of mallopt are ints.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let glibc keep the memory of freed tensors for the next ones, in this process, from now on.

    It maps tensors of 32 MiB and more anew at each allocation and gives them back at each free, so that every forward pass
    has the system find and zero all of its pages again. The price: memory once used stays with the process.

    Returns:
        Whether it could be set; not on other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: _TOP_PAD_BYTES}
    return all(mallopt(parameter, value) for parameter, value in settings.items())

"""The host's memory, where JAX computes on CPUs."""

import ctypes
import platform
import threading

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Where JAX computes on CPUs, have the process keep what an execution frees, for the next one.

    XLA's CPU backend allocates the memory of an execution in one piece. glibc maps so large a piece afresh each time,
    and whoever touches a page of it first waits for the system to find and clear one: a fifth of the processor time of
    a small network's step. Here glibc takes large pieces from its heap, too, and never gives the heap's end back. The
    first thread's heap alone is not bounded, so that programs of one device are executed by the thread that calls them
    (`jax_cpu_enable_async_dispatch`): calls return when they are done. Programs of several devices gain nothing.

    To be called by programs, in their first thread, before JAX finds its devices; not by functions that others may
    call: it is for the whole process, whose memory does not shrink any more. On other devices, and without glibc, as on
    macOS, nothing is kept.

    Raises:
      RuntimeError: called in another thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("keep_freed_memory has to be called in the first thread, whose memory it keeps")
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # is read when JAX finds its devices
    if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)

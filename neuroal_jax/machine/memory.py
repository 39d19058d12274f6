"""How much memory there is, and what it looks like when there is none left. Imports no JAX."""

import ctypes
import errno
import os
import resource
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from neuroal_jax.errors import UserError

LOWER = "lower --nsamples, --search-samples, --candidate-batch or --seqlen, or give it more memory"
_UNLIMITED = 2**60
_THREADS_BYTES = 256 * 2**20  # address space of the stacks and heaps of threads to come
_LIBRARIES_BYTES = 2**30  # address space of what is imported
_CORE_BYTES = 32 * 2**20  # and for each core, of the threads that the libraries start
_CGROUPS = Path("/sys/fs/cgroup")
# Parameters of glibc's mallopt: what to set, to what, and what to put back (it tells no one what was set before).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_KEPT = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0, _ARENA_MAX: 1}
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536, _ARENA_MAX: 8 * (os.cpu_count() or 1)}


def available_memory() -> tuple[int, str]:
    """Bytes of host memory that this process can still take, and what bounds them."""
    bounds = [(_free(), "free on this machine"), (_address_space(), "left under ulimit -v"), _cgroup()]
    size, bound = min(bounds)
    return max(size, 0), bound


def _free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (kilobytes,) = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        return 1024 * int(kilobytes)
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _address_space() -> int:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return _UNLIMITED
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        used = 0
    return limit - used - _THREADS_BYTES


def _cgroup() -> tuple[int, str]:
    """What a container may still take: its limit, without what it holds and cannot drop."""
    found = _UNLIMITED
    try:
        place = Path("/proc/self/cgroup").read_text().split("::", 1)[1].strip()
        groups = [_CGROUPS / place.lstrip("/"), *(_CGROUPS / place.lstrip("/")).parents]
    except (OSError, IndexError):
        groups = []
    for group in groups:
        if not group.is_relative_to(_CGROUPS):
            break
        try:
            limit = int((group / "memory.max").read_text())  # "max" is no number: no limit
            used = int((group / "memory.current").read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            found = min(found, limit - used + int(statistics["inactive_file"]))
        except (OSError, ValueError, KeyError):
            continue
    return found, "left to this control group"


def refuse_small_address_space() -> None:
    """Raises UserError under a limit in which the libraries end the process while they are imported, in many lines."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    needed = _LIBRARIES_BYTES + (os.cpu_count() or 1) * _CORE_BYTES
    if 0 <= limit < needed:
        raise UserError(
            f"out of memory: {limit / 2**30:.2f} GiB are allowed by ulimit -v, and libraries and their threads alone "
            f"need {needed / 2**30:.2f} GiB of address space: raise it"
        )


def is_exhausted(error: BaseException) -> bool:
    """Whether an exception of Python, NumPy, JAX or PyTorch says that memory ran out."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, ImportError) and "failed to map segment" in str(error):
        return True
    signs = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory", "can't start new thread", "bad_alloc")
    return isinstance(error, RuntimeError) and any(sign.lower() in str(error).lower() for sign in signs)


def refuse_what_cannot_fit(needed: int, advice: str = LOWER) -> None:
    """Raises UserError if `needed` bytes of host memory, which will be used for certain, are more than there are."""
    size, bound = available_memory()
    if needed > size:
        raise UserError(
            f"out of memory: at least {needed / 2**30:.2f} GiB of the host's are needed, {size / 2**30:.2f} GiB are "
            f"{bound}: {advice}"
        )


@contextmanager
def exhaustion_explained(advice: str) -> Iterator[None]:
    """Turns running out of memory into a UserError that ends in `advice`."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        if not is_exhausted(error):
            raise
        size, bound = available_memory()
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"out of memory ({reason}; {size / 2**30:.2f} GiB of the host's {bound}): {advice}") from error


class _Keepers:
    """How many runs of this process want freed memory kept: a setting of the whole process, so the last resets it."""

    def __init__(self) -> None:
        self._number = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        """One more; the first changes the setting."""
        with self._lock:
            self._number += 1
            if self._number == 1:
                _set_allocator(_KEPT)

    def leave(self) -> None:
        """One less; the last puts the defaults back."""
        with self._lock:
            self._number -= 1
            if self._number == 0:
                _set_allocator(_DEFAULTS)
                return_freed()


_keepers = _Keepers()


def _set_allocator(values: Mapping[int, int]) -> None:
    library = ctypes.CDLL(None)
    for parameter, value in values.items() if hasattr(library, "mallopt") else ():
        library.mallopt(parameter, value)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Makes the C library keep what is freed for whoever allocates next, until `return_freed`.

    On a CPU, XLA takes the temporary arrays of every call anew; to have the system map their pages each time costs some
    5% of a search. Does nothing where the C library is not glibc.
    """
    _keepers.enter()
    try:
        yield
    finally:
        _keepers.leave()


def return_freed() -> None:
    """Gives what the C library keeps of freed memory back to the system, if it is glibc."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))

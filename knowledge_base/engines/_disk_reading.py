"""Reading a part of a file into memory that is there already, at the pace of the disk, time after time.

What is read again and again must not fill memory beside the process: pages of a mapped file count as the process's, and
those of a file that was read take the system's. So it is read plainly, and the system is told to let go of it.
"""

from __future__ import annotations

import os

CHUNK_BYTES = 1 << 20  # larger ones were no faster, 16 MiB slower: the system reads ahead by itself


def read_into(file: int, place: memoryview, offset: int) -> None:
    """Fill a place with the file's bytes from `offset` on, and leave none of them in the system's memory.

    Args:
        file: a descriptor.

    Raises:
        OSError: the file cannot be read, or ends before the place is full.
    """
    done = 0
    while done < len(place):
        got = os.preadv(file, [place[done : done + CHUNK_BYTES]], offset + done)
        if got == 0:
            raise OSError(f"the file ends {len(place) - done} bytes too early")
        done += got
    os.posix_fadvise(file, offset, len(place), os.POSIX_FADV_DONTNEED)


def settled(file: int) -> None:
    """Have the system write out what of a file only memory holds yet, and let go of all of it."""
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

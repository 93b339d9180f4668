"""Processes that load images: what is said when one of them dies."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError

SHARED_MEMORY = Path("/dev/shm")  # through which Linux processes hand tensors to one another


def fetched(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches that other processes load. Raises InputError if one of these has died."""
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if reason.startswith("Caught ") or (isinstance(error, RuntimeError) and "DataLoader worker (pid" not in reason):
            raise  # an error in the code that loads, with its own traceback
        raise InputError(
            f"a process that loads images has died ({reason.rstrip('. ')}): if it lacked memory or {SHARED_MEMORY}, "
            "start the container with more --memory or --shm-size, or take --workers 0"
        ) from error

"""Files that are complete or absent: written under another name, then renamed; a clear error for unreadable ones."""

import contextlib
import csv
import errno
import functools
import hashlib
import json
import os
import pickle
import re
import secrets
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
from safetensors import SafetensorError

from .errors import InputError, WriteError

if TYPE_CHECKING:  # --help need not wait for them
    import numpy as np
    from torch import Tensor

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LOCK = ".lock"  # in a folder: held by the process that writes there
PATIENCE = 10.0  # seconds for the last loading processes of a program that was killed to go; they look every five
UNREADABLE = (SafetensorError, OSError, EOFError, pickle.UnpicklingError, RuntimeError, ValueError, csv.Error)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; when the block succeeds, that file is synced and renamed to `path`.

    A reader sees the old file or the new one, never half of one, and several processes may write the same file. After
    an exception nothing is left behind; `remove_partial_files` removes what a killed process leaves.

    Raises:
        WriteError: the file cannot be written.
    """
    # the process's number is not unique among machines; same suffix, or numpy would append it
    partial = path.with_name(f".{secrets.token_hex(4)}.partial-{path.name}")
    try:
        with writing(path):
            yield partial
            sync(partial)
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):  # where nothing may be written, nothing was
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of writing a file or folder into a WriteError of one sentence: what, why, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own error even for a full disk
        number = error.errno if isinstance(error, OSError) else None
        reason = (os.strerror(number) if number else str(error).splitlines()[0]).rstrip(".")
        full = number in FULL or any(os.strerror(code) in reason for code in FULL)
        do = "make room there" if full else "name another place, or make this one writable"
        raise WriteError(f"{path} cannot be written ({reason}): {do}, and run the same command again") from error


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, in which files can be written. Raises WriteError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permissions alone do not tell: a file system may be read-only
            pass


def check_output_file(path: Path) -> None:
    """Make the folder of a file that is about to be computed. Raises WriteError if it could not be written there."""
    if path.is_dir():
        raise WriteError(f"{path} is a folder; the output has to be a file")
    make_folder(path.parent)


def is_partial(path: Path) -> bool:
    """Whether a file is one that `replacing` has not finished."""
    return re.fullmatch(r"\..*\.partial-.*", path.name) is not None


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left in a folder to which no other process is writing."""
    for left in folder.glob(".*"):
        if is_partial(left):
            left.unlink(missing_ok=True)


def hold(folder: Path, busy: str) -> filelock.BaseFileLock:
    """Claim a folder until the lock is released, or gone with its owner; a process does not wait for itself.

    Raises:
        InputError: another process holds it; the sentence is what it is `busy` with and what to do.
        WriteError: nothing can be written there.
    """
    lock = filelock.FileLock(folder / LOCK, timeout=PATIENCE, thread_local=False, is_singleton=True)
    with writing(folder / LOCK):
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise InputError(f"{folder} {busy}") from error
    return lock


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step, see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text)


def write_together(texts: dict[Path, str]) -> None:
    """Replace several text files that belong together: none of them unless all could be written, see `replacing`."""
    with contextlib.ExitStack() as stack:
        for path, text in texts.items():
            stack.enter_context(replacing(path)).write_text(text)


def sync(path: Path) -> None:
    """Make sure that a file, or a folder's list of files, is on the disk and not only in its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def readable(path: Path, wrong: str = "is damaged or not a checkpoint") -> Iterator[None]:
    """Turn errors from reading a missing or damaged file into an InputError of one sentence, with what is `wrong`."""
    try:
        yield
    except InputError:  # a ValueError too, but already with a sentence
        raise
    except FileNotFoundError as error:  # what safetensors says of a file that is closed to us, too
        there = os.path.exists(path)
        raise InputError(f"{path} {'may not be read by this user' if there else 'does not exist'}") from error
    except UNREADABLE as error:
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):  # what torch.load calls the class of a pickled object
            reason = f"it holds an object of class {foreign[1]}, and only tensors are read"
        else:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} {wrong}: {reason}") from error


def save_tensors(tensors: dict[str, "Tensor"], path: Path, about: dict[str, str] | None = None) -> None:
    """Write a .safetensors file with the permissions that any new file has here; the package's own are 0600.

    Args:
        tensors: name → tensor.
        path: the file.
        about: its metadata.
    """
    from safetensors.torch import save_file  # brings torch, which --help need not wait for

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, about)
    path.chmod(mode)


def check_shapes(path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Raise InputError unless the tensors found in a file have the names and the shapes of those expected."""
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or surplus:
        raise InputError(f"{path} does not fit: missing {missing or 'nothing'}, surplus {surplus or 'nothing'}")
    for name, shape in found.items():
        if shape != expected[name]:
            raise InputError(f"{path} does not fit: {name} has shape {shape} and not {expected[name]}")


def read_arrays(path: Path, names: Collection[str]) -> dict[str, "np.ndarray"]:
    """Those of the named arrays that a .npz has. Raises InputError if it is missing or damaged."""
    import numpy as np

    with readable(path, "is not a readable .npz"):
        try:
            with np.load(path) as file:
                return {name: file[name] for name in names if name in file.files}
        except OSError:
            raise
        except Exception as error:  # zipfile, zlib and numpy each have their own
            raise ValueError(str(error) or type(error).__name__) from error


def reachable(name: str | Path) -> Path:
    """The path of that name, where there may be nothing yet.

    Raises InputError if the system cannot even look there: a part of it is too long, closed to us, or no name.
    """
    path = Path(name)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise InputError(f"{path} cannot be opened: {reason}") from error
    return path


def folder_hash(folder: Path) -> str:
    """The first 16 hexadecimal digits of a hash of every file's name, size and time of change in a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            status = file.stat()
            digest.update(os.fsencode(file.relative_to(folder)))
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def content_hash(path: Path) -> str:
    """The first 16 hexadecimal digits of a file's sha256; a file that has not changed since is not read again."""
    status = path.stat()
    return _content_hash(path.resolve(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _content_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """The JSON object in a file that should be `kind`. Raises InputError if it is missing or holds anything else."""
    with readable(path, f"cannot be read as {kind}"):
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__} instead of an object")
    return content

"""Files that a kill never leaves half written, digests of what is in them, and templates to write them from."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from reftlens.errors import StoreMismatch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def located(path: str | Path) -> Path:
    """The path that a user wrote, `~` being the home folder."""
    return Path(path).expanduser()


def destination(path: str | Path) -> Path:
    """Where a file is to be written: its folder is made, so that what cannot be written is refused before the work.

    Raises:
        ValueError: for a folder in the place of the file, a file in the place of its folder, or one that may not be
            written to.
    """
    path = located(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file: {path / 'name'}, for example")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}") from None
    if not writable:
        raise ValueError(f"{path} cannot be written: {path.parent} is read-only")
    return path


def write_atomically(path: Path, payload: bytes) -> None:
    """Replace the file at `path` in one step: a reader, or a kill, sees the old content or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made, as long as the block lasts; a kill lets them in again.

    Nothing is kept out where the system, or the file system, has no such locks.

    Raises:
        StoreMismatch: where another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise StoreMismatch(f"{folder} is in use by another process: wait for its end, or choose another one") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


@cache
def templates(folder: Path, *, html: bool = True) -> Environment:
    """The Jinja templates of a folder, where a name that is missing raises; of HTML, what is no markup is escaped."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
    )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, wherever they are."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {shape_of(tensor)} ".encode())
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def shape_of(tensor: Tensor) -> str:
    """Dtype and shape, in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

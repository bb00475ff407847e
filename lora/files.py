"""Writing a folder so that nobody ever sees half of it: aside first, then renamed into place."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(folder: str | Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`; on success it takes its place, replacing what was there.

    On an error nothing is left behind and `folder` is as it was. Raises OSError when the place cannot be written.
    """
    target = Path(folder).resolve()  # of a link, what it points to
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    aside.chmod(0o777 & ~_umask())
    try:
        yield aside
        _sync(aside)
        old = aside.with_name(aside.name + ".old") if target.exists() else None
        if old is not None:
            os.replace(target, old)
        os.replace(aside, target)
        _sync_names(target.parent)
        if old is not None:
            shutil.rmtree(old)
    finally:
        if aside.exists():
            shutil.rmtree(aside)


def _sync(folder: Path) -> None:
    """Contents reach the disk before the name does. Files get the usual mode: safetensors' are their owner's alone."""
    mode = 0o666 & ~_umask()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            _sync_names(path)


def _sync_names(folder: Path) -> None:
    """A rename reaches the disk before its caller deletes what it replaces, where the system can promise that."""
    opened = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems cannot
        os.fsync(opened)
    os.close(opened)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

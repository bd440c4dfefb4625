"""Files and directories that are there whole or not at all."""

import contextlib
import errno
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import IFPError


def check_writable(path: str | Path) -> None:
    """Raises IFPError if no file can be made there, so that the work for it need not be done."""
    if Path(path).is_dir():
        raise IFPError(f"{path} is a directory; name a file.")
    parent = Path(path).parent
    if not parent.is_dir():
        raise IFPError(f"{path} cannot be written: there is no directory {parent}.")
    if not os.access(parent, os.W_OK):
        raise IFPError(f"{path} cannot be written: no files can be made in {parent}.")


def by_last_use(files: Iterable[Path]) -> list[Path]:
    """Sort files, the most recently used first; those that another process deletes are left out."""
    used = []
    with contextlib.suppress(OSError):
        for file in files:
            with contextlib.suppress(OSError):
                used.append((file.stat().st_mtime, file))
    return [file for _, file in sorted(used, reverse=True)]


@contextlib.contextmanager
def new_file(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces ``path`` if all goes well.

    It keeps the suffix of ``path``. Whatever goes wrong, it is removed and ``path`` is untouched.

    Raises:
        FileExistsError: if ``path`` exists and is not to be overwritten. Of several processes that
            make one file at once, one does.
    """
    path = Path(path)
    if path.is_dir():
        raise IFPError(f"{path} is a directory; name a file.")
    name = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")
    try:
        # mkstemp would let nobody else read the file. To give it the usual rights afterwards, the
        # process's umask is needed, which cannot be read without changing it for all threads.
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        # The name of the temporary file would tell the user nothing.
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        yield name
        if overwrite:
            os.replace(name, path)
        else:
            _publish(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _publish(temporary: Path, path: Path) -> None:
    """Give a complete file its name, unless there is one of that name."""
    try:
        # Unlike a rename, a hard link never replaces anything.
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        # FAT and some network file systems have no hard links.
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(temporary, path)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside ``path`` that becomes ``path`` if all goes well.

    Whatever goes wrong, Ctrl-C and ``kill -9`` included, nothing is left.

    Raises:
        IFPError: if ``path`` exists, or its parent cannot be written.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise IFPError(f"{path} already exists. Delete it or name another path.")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # mkdtemp is not used, for the reason that new_file has.
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}").absolute()
        temporary.mkdir()
    except OSError as error:
        raise IFPError(f"{path} cannot be written: {error.strerror}.") from error
    with _removed_at_death(temporary):
        try:
            yield temporary
            try:
                os.rename(temporary, path)
            except OSError as error:
                if path.exists():
                    raise IFPError(f"{path} was made by another process meanwhile.") from error
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if not path.exists():
                with contextlib.suppress(OSError):
                    for parent in made:
                        parent.rmdir()


@contextlib.contextmanager
def without_path(directory: Path, what: str) -> Iterator[None]:
    """Errors do not name a temporary directory, which is gone when they are read.

    Args:
        directory (Path): from :func:`new_directory`.
        what (str): what was to be written or converted, in its place.
    """
    try:
        yield
    except IFPError as error:
        message = str(error)
        if str(directory) not in message:
            raise
        inside = message.replace(f"{directory}/", "").replace(str(directory), "the directory")
        raise IFPError(f"{what}: {inside}") from error


@contextlib.contextmanager
def _removed_at_death(path: Path) -> Iterator[None]:
    """Let a shell remove a directory if this process dies.

    ``kill -9`` leaves no time for that here. The shell waits on a pipe that only we hold open: it
    ends with us, however we end. In a session of its own it does not get our Ctrl-C.
    """
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", 'read -r line; [ "$line" = done ] || rm -rf -- "$1"', "sh", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            watcher.communicate(b"done\n")

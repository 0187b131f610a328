"""Files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary folder inside `path` (made if need be), to write files and folders into.

    When the block ends, its files take the places of those of the same names in `path`, one by one,
    in the order of their names. If it raises, none does and the folder is gone; if the process is
    killed, a folder .writing-* may be left. Either way every file in `path` is whole.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path) as name:
        yield Path(name)
        files = sorted(file for file in Path(name).rglob("*") if file.is_file())
        for file in files:  # on the disk before the rename is, should the power fail
            with open(file, "rb+") as stream:
                os.fsync(stream.fileno())
        for file in files:
            target = path / file.relative_to(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)

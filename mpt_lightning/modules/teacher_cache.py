"""The teachers' output per row on disk: one SQLite file that several processes read and write at once.

`datasets` holds finished tables; this file grows row by row while several ranks train, and survives a killed process.
"""

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import load, save
from torch import Tensor

from mpt_lightning.errors import MPTError

# Part of a file's name: raise it when the same row would be stored in another way.
FORMAT = 1

_WAIT = 120.0  # seconds for another process that is writing

# A row's tensors by name, without padding.
Row = dict[str, Tensor]


class TeacherCache:
    """Rows by key. `about` are plain values that all rows depend on; the folder has one file per `about`.

    A row is stored whole or not at all, even if a process is killed, and its checksum is compared when it is read. The
    file must be on a disk of this machine: SQLite's locks between processes do not reach across a network. All methods
    raise an `MPTError` if the file is damaged or cannot be used.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        name = hashlib.sha256(json.dumps({"format": FORMAT, **about}, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"{name}.sqlite"
        self._connection: sqlite3.Connection | None = None

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Row]:
        """Return the rows that are stored."""
        found = {}
        with self._messages():
            for key in keys:
                entry = self._open().execute("SELECT checksum, value FROM rows WHERE key = ?", (key,)).fetchone()
                if entry is None:
                    continue
                checksum, value = entry
                if not isinstance(value, bytes) or _checksum(key, value) != checksum:
                    raise sqlite3.DatabaseError("a row's checksum does not fit")
                found[key] = load(value)
        return found

    def put(self, rows: Mapping[bytes, Row]) -> None:
        """Add rows, all or none of them; a row that is stored already stays."""
        entries = [(key, _checksum(key, value), value) for key, value in ((k, save(row)) for k, row in rows.items())]
        with self._messages(), self._open() as transaction:
            transaction.executemany("INSERT OR IGNORE INTO rows VALUES (?, ?, ?)", entries)

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._connection is not None:
            with self._messages():
                self._connection.close()
        self._connection = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file out: copies and other processes open it themselves."""
        return self.__dict__ | {"_connection": None}

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One process at a time creates the file and its table.
            with FileLock(f"{self.path}.lock", timeout=_WAIT):
                connection = sqlite3.connect(self.path, timeout=_WAIT, check_same_thread=False)
                try:
                    # A log beside the file: readers do not wait for a writer, and a commit does not wait for the disk.
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.execute("PRAGMA synchronous = NORMAL")
                    columns = "key BLOB PRIMARY KEY, checksum INTEGER, value BLOB NOT NULL"
                    connection.execute(f"CREATE TABLE IF NOT EXISTS rows ({columns})")
                except BaseException:
                    connection.close()
                    raise
            self._connection = connection
        return self._connection

    @contextmanager
    def _messages(self) -> Iterator[None]:
        """Turn SQLite's errors into messages for the user."""
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise MPTError(
                f"The teachers' cache {self.path} cannot be used: {error}. Make room on its disk if that is full, or "
                "set --model.teacher_cache to another folder on a disk of this machine that can be written, or to null."
            ) from error
        except sqlite3.DatabaseError as error:
            raise MPTError(
                f"The teachers' cache {self.path} is damaged, or not a cache: {error}. Remove the file (with those of "
                "the same name and -wal, -shm), or set --model.teacher_cache to another folder."
            ) from error


def row_key(teacher: bytes, input_ids: bytes, labels: bytes) -> bytes:
    """Hash what a row's teacher output depends on: the teacher's digest, and the ids without padding."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (teacher, input_ids, labels):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _checksum(key: bytes, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(key))

"""A database on disk for lists that may be too long for memory; made anew by each process."""

import sqlite3
from pathlib import Path


def database(folder: Path, name: str, table: str) -> sqlite3.Connection:
    """An empty database `folder`/`name`.sqlite with one table, described by the SQL after CREATE TABLE."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.sqlite"
    path.unlink(missing_ok=True)
    made = sqlite3.connect(path)
    made.execute("PRAGMA synchronous=OFF")  # nothing in it has to outlive the process
    made.execute(f"CREATE TABLE {table}")
    return made

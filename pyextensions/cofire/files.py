# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and generated parts of pages that people write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; takes the place of ``path`` at the end, unless an exception ends it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> Path:
    """A reader sees the old file or the new one, never half of it. Returns ``path``."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def fill(page: Path, markers: tuple[str, str], text: str) -> bool:
    """Put a generated text between two marker lines of a page; True if that changed it.

    Raises:
        FileNotFoundError: there is no such page. ValueError: it lacks the markers.
    """
    start, end = markers
    old = page.read_text(encoding="utf-8")
    begin = old.find(start)
    stop = old.find(end, begin)  # a page may have several parts that end alike
    if begin < 0 or stop < 0:
        raise ValueError(f"cofire: {page} must contain the lines {start!r} and {end!r}")
    new = f"{old[:begin]}{start}\n{text}\n{old[stop:]}"
    if new != old:
        write_atomically(page, new)
    return new != old


def move_aside(path: Path, ending: str) -> Path:
    """Give a file another name, which nothing has yet: ``<name>.<ending>``, or with a number. Returns that name."""
    for number in range(1, 10_000):
        aside = path.with_name(f"{path.name}.{ending}{'' if number == 1 else f'-{number}'}")
        try:
            os.link(path, aside)  # fails where the name is taken: what lies there is kept
        except FileExistsError:
            continue
        except OSError:  # a file system without links
            if aside.exists():
                continue
            path.rename(aside)
            return aside
        path.unlink()
        return aside
    raise ValueError(f"cofire: there are too many files {path}.{ending}-*; remove some")

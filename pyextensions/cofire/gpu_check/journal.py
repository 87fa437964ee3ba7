# SPDX-License-Identifier: Apache-2.0
"""What was done, line by line: nothing that was known is lost when a process is killed, and the next call goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cofire.files import write_atomically

Record = dict[str, Any]

FORMAT = 1
NAME = "journal.jsonl"
GOOD = ("passed", "skipped")
BAD = ("failed", "hung", "crashed", "timed out")
LONGEST_NOTE = 600


class Journal:
    """A file of one JSON object a line, about a slice (a process) or about an item in it (a test, a case, a tile).

    ``event`` is ``"plan"`` (how many items a slice has), ``"start"``, or how something ended: one of :data:`GOOD` and
    :data:`BAD`; of a slice also ``"cut"``, by the time limit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, out: Path) -> Journal:
        """The journal of a folder, which is made if it is not there.

        Raises:
            ValueError: the file there is no journal, or of a newer cofire.
        """
        out.mkdir(parents=True, exist_ok=True)
        journal = cls(out / NAME)
        if not journal.path.exists():
            journal.write(event="format", format=FORMAT)
        journal.mend()
        journal.records()
        return journal

    def write(self, **record: Any) -> None:
        """One line, at once: several processes write to the same file."""
        if "note" in record:
            record["note"] = str(record["note"])[:LONGEST_NOTE]
        line = json.dumps({**record, "time": round(time.time(), 2)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def mend(self) -> None:
        """Drop the half of a line that a killed process may have left at the end."""
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            write_atomically(self.path, data[: data.rfind(b"\n") + 1].decode("utf-8", "replace"))

    def records(self) -> list[Record]:
        """All lines but the first, which says the format.

        Raises:
            ValueError: this is no journal, or one of a newer cofire.
        """
        found = [
            self._record(number, line) for number, line in enumerate(self.path.read_bytes().splitlines(), 1) if line
        ]
        if not found or found[0].get("event") != "format":
            raise ValueError(self._broken("does not begin with its format"))
        if found[0].get("format") != FORMAT:
            raise ValueError(
                f"gpu-check: {self.path} has format {found[0].get('format')}, and this cofire reads {FORMAT}; "
                "name another folder with --out"
            )
        return found[1:]

    def _record(self, number: int, line: bytes) -> Record:
        try:
            record = json.loads(line)
        except ValueError:
            raise ValueError(self._broken(f"has a line {number} that is no JSON")) from None
        if not isinstance(record, dict) or "event" not in record:
            raise ValueError(self._broken(f"has a line {number} that says no event"))
        return record

    def _broken(self, fault: str) -> str:
        return (
            f"gpu-check: {self.path} is not a journal of gpu-check (it {fault}); delete it to begin anew, or name another "
            "folder with --out"
        )

    def items(self, part: str, known: int | None = None) -> dict[str, Record]:
        """The last word on every item of a part, among all records or the first ``known``."""
        return {r["item"]: r for r in self.records()[:known] if r.get("part") == part and "item" in r}

    def slices(self) -> dict[str, Record]:
        """How every slice ended last; one that was killed with its caller has no end."""
        return {r["slice"]: r for r in self.records() if "item" not in r and r["event"] not in ("plan", "start")}

    def totals(self) -> dict[str, int]:
        """How many items each slice has."""
        return {r["slice"]: r["total"] for r in self.records() if r["event"] == "plan"}

    def forget(self, unwanted: Callable[[Record], bool]) -> None:
        """Drop records."""
        self._rewrite([r for r in self.records() if not unwanted(r)])

    def compact(self) -> None:
        """Keep the last word on everything."""
        last: dict[Any, Record] = {}
        for record in self.records():
            about = record["item"] if "item" in record else ("slice", record["slice"])
            last.pop(key := (record["part"], about, record["event"] == "plan"), None)
            last[key] = record
        self._rewrite([r for r in last.values() if r["event"] != "start"])

    def _rewrite(self, records: list[Record]) -> None:
        lines = [{"event": "format", "format": FORMAT}, *records]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))

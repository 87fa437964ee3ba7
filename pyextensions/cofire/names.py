# SPDX-License-Identifier: Apache-2.0
"""What to answer to a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST = 5  #: names listed when none is near


def near_matches(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence about an unknown name: the near ones, or the first few of all."""
    known = [k for k in known if k]
    near = difflib.get_close_matches(name, known, cutoff=0.5) or difflib.get_close_matches(
        name.lower(), known, cutoff=0.5
    )
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    if not known:
        return "; there are none"
    more = f", ... and {len(known) - MOST} more" if len(known) > MOST else ""
    return f"; there are {', '.join(map(repr, known[:MOST]))}{more}"

# SPDX-License-Identifier: Apache-2.0
"""Other libraries that compute what our operators compute: one file each, with one ``PEER = Peer(...)``.

Every module of this package whose name has no leading underscore is a peer; files outside become one by
``cofire bench --peer FILE``. A peer is asked for its provider of a case by what the case says of itself
(:attr:`~cofire.bench.cases.Case.facts`), whether its packages are there or not: one that computes the case and is not
here becomes a row that says so. Packages are therefore imported when a provider is set up, and not before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cofire.bench.cases import Case, Provider, installed

__all__ = ["Found", "Peer", "built_in", "distributions", "from_file", "of_case", "with_peers"]

Found = Provider | Mapping[str, Provider] | None


def _anywhere() -> str | None:
    return None


def _every(case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """A library, and how its documentation says to call it."""

    name: str  #: the rows are of the provider ``peer:<name>``
    #: its provider of a case, or several as ``{variant: provider}``, of which the fastest is the row; None where it does
    #: not compute the case
    find: Callable[[Case], Found]
    packages: Mapping[str, str] = field(default_factory=dict)  #: what it imports, and what pip calls that
    devices: tuple[str, ...] = ("cpu",)
    reason: Callable[[], str | None] = _anywhere  #: why it cannot run on this machine, or None
    left_out: Callable[[Case], str | None] = _every  #: why a case that it computes is not timed, or None

    def absence(self, case: Case | None = None) -> str | None:
        """Why the library gives no number here, or none of this case, or None; nothing is imported."""
        missing = [pip for package, pip in self.packages.items() if not installed(package)]
        if missing:
            return f"not installed: {', '.join(missing)}"
        reason = self.reason()
        if reason is not None:
            return f"cannot run here: {reason}"
        reason = None if case is None else self.left_out(case)
        return None if reason is None else f"left out: {reason}"

    def answer(self, case: Case) -> Found:
        """:attr:`find`, whose mistakes become a sentence.

        Raises:
            ValueError: it raised something, or what it returned is no provider.
        """
        try:
            found = self.find(case)
        except Exception as error:  # whatever somebody's file does
            raise ValueError(f"bench: find of the peer {self.name!r} failed on {case}: {_words(error)}") from error
        every = list(found.values()) if isinstance(found, Mapping) else [found]
        if found is not None and not (every and all(isinstance(p, Provider) for p in every)):
            raise ValueError(
                f"bench: find of the peer {self.name!r} must return a Provider, a mapping of names to Providers, or None; "
                f"got {found!r} on {case}"
            )
        return found


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


@functools.cache
def built_in() -> tuple[Peer, ...]:
    """The peers of this package, by file name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return tuple(_peer_of(importlib.import_module(f"{__name__}.{name}"), name) for name in names)


def _peer_of(module: Any, where: str) -> Peer:
    peer = getattr(module, "PEER", None)
    if not isinstance(peer, Peer):
        raise ValueError(f"bench: a peer's file must set PEER to a cofire.bench.peers.Peer, got {peer!r} in {where}")
    return peer


def from_file(path: str | Path) -> Peer:
    """The peer of a file outside this package.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it cannot be imported, or has no ``PEER``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"bench: a peer must be a Python file, and there is none at {path}")
    spec = importlib.util.spec_from_file_location(f"cofire_peer_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"bench: a peer must be a Python file (.py), got {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's file does
        raise ValueError(f"bench: the peer {path} cannot be imported: {_words(error)}") from error
    return _peer_of(module, str(path))


def with_peers(cases: Sequence[Case], files: Iterable[str | Path]) -> list[Case]:
    """The cases, compared with the peers of these files too.

    Raises:
        FileNotFoundError, ValueError: as :func:`from_file`; a name that is taken; a peer that fails on a case.
    """
    outside: dict[str, Peer] = {}
    taken = {f"peer:{peer.name}" for peer in built_in()}.union(*(c.providers for c in cases))
    for file in files:
        peer = from_file(file)
        if f"peer:{peer.name}" in taken:
            raise ValueError(
                f"bench: a peer's name must be new, and there is one called {peer.name!r} already ({file})"
            )
        taken.add(f"peer:{peer.name}")
        outside[peer.name] = peer
        for case in cases:
            peer.answer(case)
    return [replace(case, peers=(*case.peers, *outside.values())) for case in cases]


def of_case(case: Case, device: str) -> dict[str, tuple[Peer, Provider | Mapping[str, Provider]]]:
    """The peers that compute this case on such a device, installed or not, by provider name."""
    found = {}
    for peer in (*built_in(), *case.peers):
        entry = peer.answer(case) if device in peer.devices else None
        if entry is not None:
            found[f"peer:{peer.name}"] = (peer, entry)
    return found


def distributions(device: str = "cpu", peers: Iterable[Peer] = ()) -> list[str]:
    """What pip calls the packages of the peers of a device: an environment says which versions of them are there."""
    every = [p for p in (*built_in(), *peers) if device in p.devices]
    return sorted({pip for peer in every for pip in peer.packages.values()})

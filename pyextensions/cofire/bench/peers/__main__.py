# SPDX-License-Identifier: Apache-2.0
"""``python -m cofire.bench.peers``: which peers are here, and why others are not."""

from __future__ import annotations

from cofire.bench.peers import built_in

if __name__ == "__main__":
    for peer in built_in():
        print(f"{peer.name} ({', '.join(peer.devices)}): {peer.absence() or 'here'}")

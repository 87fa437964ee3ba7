# SPDX-License-Identifier: Apache-2.0
"""Whole networks, as a user would run them: latency, throughput, memory and accuracy, before and after.

``cofire bench-networks`` runs it, ``cofire report`` draws it. A family's networks are in
``cofire.bench.end_to_end.<family>``; a new family adds a module there with a list ``NETWORKS``, nothing else.
"""

from cofire.bench.end_to_end.network import Call, Network, Variant
from cofire.bench.end_to_end.results import Networks, networks_files, networks_path
from cofire.bench.end_to_end.runner import families, measure, networks, run
from cofire.bench.end_to_end.show import plot, summary, table, write_page

__all__ = [
    "Call",
    "Network",
    "Networks",
    "Variant",
    "families",
    "measure",
    "networks",
    "networks_files",
    "networks_path",
    "plot",
    "run",
    "summary",
    "table",
    "write_page",
]

# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite: every operator against the strongest plain torch, on this machine.

``cofire bench`` runs it, ``cofire report`` draws it. A family's cases are in ``cofire.bench.<family>``, other libraries
that compute the same in ``cofire.bench.peers``.
"""

from cofire.bench.agreement import agreement
from cofire.bench.cases import Case, Provider, families
from cofire.bench.harness import run
from cofire.bench.report import report
from cofire.bench.results import Results, results_files, results_path
from cofire.bench.tuning import tune

__all__ = [
    "Case",
    "Provider",
    "Results",
    "agreement",
    "families",
    "report",
    "results_files",
    "results_path",
    "run",
    "tune",
]

# SPDX-License-Identifier: Apache-2.0
"""Experiments: what ``cofire train METHOD`` runs.

``<method>.py`` plans and runs a method's experiment and ``<method>_report.py`` judges its results. They share
``training`` and ``language`` (the loops), ``files`` (results and weights), ``latency``, ``environment`` and ``report``
(tables, plots).
"""

from cofire.experiments import edkm, ftwt

#: The command of each method's experiment, by the method's name.
EXPERIMENTS = {"edkm": edkm.command, "ftwt": ftwt.command}

__all__ = ["EXPERIMENTS"]

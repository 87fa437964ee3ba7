# SPDX-License-Identifier: Apache-2.0
"""Experiments: what ``cofire train METHOD`` runs.

``<method>.py`` plans and runs a method's experiment and ``<method>_report.py`` judges its results (``quantize_report.py``
also those of ``qlora.py``). They share ``training`` and ``language`` (the loops), ``files`` (results and weights),
``latency``, ``environment`` and ``report`` (tables, plots).
"""

from cofire.experiments import dsnot, dynamic_llava, edkm, ftwt, lococo, ofq, qlora, quantize, shiftaddvit

#: The command of each method's experiment, by the method's name.
EXPERIMENTS = {
    "dsnot": dsnot.command,
    "dynamicllava": dynamic_llava.command,
    "edkm": edkm.command,
    "ftwt": ftwt.command,
    "lococo": lococo.command,
    "ofq": ofq.command,
    "qlora": qlora.command,
    "quantize": quantize.command,
    "shiftaddvit": shiftaddvit.command,
}

__all__ = ["EXPERIMENTS"]

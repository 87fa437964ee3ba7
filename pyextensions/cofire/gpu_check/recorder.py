# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that notes each test in the journal, and leaves out those that the journal knows.

Where tests run in several processes, each process notes its own tests; the one that deals them out notes those whose
process died. A process whose GPU context is lost ends itself: every later test in it would fail for no fault of its own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cofire.gpu_check.journal import Journal
from cofire.gpu_check.plan import checkout, gpu_test_files
from cofire.gpu_check.runner import CONTEXT_LOST

#: Tests of operators are called ``forward-<operator>-<provider>-<sample>-<dtype>``.
KIND = re.compile(r"\[((?:forward|gradient)-\w+-cuda(?:_c)?)-.*?(\w+)\]$")


class Recorder:
    """Notes what happens in this process."""

    def __init__(self, journal: Journal, slice: str, known: int | None = None) -> None:
        self.journal, self.slice = journal, slice
        self.known = known  #: how many lines of the journal count: all processes must leave out the same tests
        self.outcomes: dict[str, tuple[str, str, float]] = {}

    def write(self, item: str, event: str, **more: Any) -> None:
        self.journal.write(part="tests", slice=self.slice, item=item, event=event, **more)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what has ended; of the slice ``first``, all but one test of each kind, kernel and dtype."""
        chosen = _first_of_each(items) if self.slice.endswith("/first") else list(items)
        if config.option.collectonly:
            self.journal.write(part="tests", slice=self.slice, event="plan", total=len(chosen))
            self._miss_none(chosen)
            return
        ended = {name for name, r in self.journal.items("tests", self.known).items() if r["event"] != "start"}
        rest = [item for item in chosen if item.nodeid not in ended]
        if getattr(config, "workerinput", {"workerid": "gw0"})["workerid"] == "gw0":
            self.journal.write(part="tests", slice=self.slice, event="plan", total=len(chosen))
        kept = {item.nodeid for item in rest}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
        items[:] = rest

    def _miss_none(self, items: list[pytest.Item]) -> None:
        """Every test that needs a GPU is in a file that some slice runs."""
        root = checkout()
        planned = (
            {root / file for files in gpu_test_files(root).values() for file in files} if root is not None else set()
        )
        for file in sorted({item.path for item in items} - planned):
            self.write(str(file), "failed", note="it has tests that need a GPU, and no slice runs it")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(nodeid, "start")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        event, note, seconds = self.outcomes.get(report.nodeid, ("passed", "", 0.0))
        if report.failed:
            event, note = "failed", note or _reason(report)
        elif report.skipped and event != "failed":
            event, note = "skipped", _reason(report)
        self.outcomes[report.nodeid] = event, note, seconds + report.duration

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        answer = yield
        event, note, seconds = self.outcomes.pop(item.nodeid, ("failed", "no report", 0.0))
        self.write(item.nodeid, event, seconds=round(seconds, 3), **({"note": note} if note else {}))
        if event == "failed" and not context_answers():
            os._exit(CONTEXT_LOST)
        return answer

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        _note_collection(self, report)


class Dealer:
    """In the process that deals tests out to others: what they cannot note themselves."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.known = recorder, len(recorder.journal.records())

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Also a process that takes the place of one that died must find the tests that the others found."""
        node.workerinput["cofire_known"] = self.known

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when not in ("setup", "call", "teardown"):  # of a process that died
            known = self.recorder.journal.items("tests").get(report.nodeid)
            if known is None or known["event"] == "start":
                self.recorder.write(report.nodeid, "crashed", note=_reason(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        _note_collection(self.recorder, report)


def _note_collection(recorder: Recorder, report: pytest.CollectReport) -> None:
    """A file that cannot be imported is a failure; one that skips itself says why."""
    if report.failed or report.skipped:
        known = recorder.journal.items("tests").get(report.nodeid)
        if known is None:
            recorder.write(report.nodeid, "failed" if report.failed else "skipped", note=_reason(report))


def _first_of_each(items: list[pytest.Item]) -> list[pytest.Item]:
    found: dict[Any, pytest.Item] = {}
    for item in items:
        match = KIND.search(item.name)
        found.setdefault(match.groups() if match else item.nodeid.partition("[")[0], item)
    return list(found.values())


def _reason(report: Any) -> str:
    """The last line that says something."""
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message) if crash is not None else str(report.longrepr or "").strip()[-400:]


def context_answers() -> bool:
    """Whether the GPU still answers this process; without a GPU there is nothing to lose."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def pytest_configure(config: pytest.Config) -> None:
    path, slice = os.environ.get("COFIRE_GPU_CHECK_JOURNAL"), os.environ.get("COFIRE_GPU_CHECK_SLICE")
    if path is None or slice is None:
        raise pytest.UsageError(
            "cofire.gpu_check.recorder: cofire gpu-check starts this, and says where its journal is"
        )
    worker = getattr(config, "workerinput", None)
    recorder = Recorder(Journal(Path(path)), slice, None if worker is None else worker["cofire_known"])
    if worker is not None:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // worker["workercount"]))
    deals = worker is None and bool(getattr(config.option, "numprocesses", None))
    config.pluginmanager.register(Dealer(recorder) if deals else recorder, "cofire-gpu-check")

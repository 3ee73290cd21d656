"""Runs tests of one class here: python -m tests.stdlib.one RESULTS SECONDS CLASS TEST...

Appends a line of JSON to the file RESULTS when a test begins and when it has ended. A test that
takes more than SECONDS ends the process, with the stacks of its threads.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time
import unittest
from typing import Any

# At the top, so that the template of Fiber's processes has it, and children need not load it.
from tests.stdlib import cases


class Recorder(unittest.TestResult):
    def __init__(self, path: str, seconds: float) -> None:
        super().__init__()
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._seconds = seconds
        self._began = 0.0
        self._outcome: tuple[str, str] = ("passed", "")
        self._watch()

    def _watch(self) -> None:
        faulthandler.dump_traceback_later(self._seconds, exit=True)

    def _write(self, name: str, outcome: str, text: str) -> None:
        entry = {"test": name, "outcome": outcome, "text": text}
        entry["seconds"] = round(time.monotonic() - self._began, 2)
        print(json.dumps(entry), file=self._file, flush=True)

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._watch()
        self._began = time.monotonic()
        self._outcome = ("passed", "")
        self._write(test._testMethodName, "began", "")

    def stopTest(self, test: unittest.TestCase) -> None:
        self._write(test._testMethodName, *self._outcome)
        super().stopTest(test)
        self._watch()

    def _note(self, test: Any, outcome: str, text: str) -> None:
        if not hasattr(test, "_testMethodName"):  # setUpClass and its like
            self._write("", outcome, f"{test}\n{text}")
        elif outcome == "failed":
            before = self._outcome[1] if self._outcome[0] == "failed" else ""
            self._outcome = ("failed", before + text)
        elif self._outcome[0] == "passed":
            self._outcome = (outcome, text)

    def addError(self, test: Any, error: Any) -> None:
        self._note(test, "failed", self._exc_info_to_string(error, test))

    def addSubTest(self, test: Any, subtest: Any, error: Any) -> None:
        if error is not None:
            self.addError(test, error)

    def addSkip(self, test: Any, reason: str) -> None:
        self._note(test, "skipped", reason)

    def addUnexpectedSuccess(self, test: Any) -> None:
        self._note(test, "failed", "it was expected to fail, and did not")

    addFailure = addError  # noqa: N815


def main(path: str, seconds: str, test_class: str, *methods: str) -> None:
    recorder = Recorder(path, float(seconds))
    case = getattr(cases, test_class)
    unittest.TestSuite([case(method) for method in methods]).run(recorder)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(*sys.argv[1:])

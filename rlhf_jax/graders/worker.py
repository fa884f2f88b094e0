"""A program that answers questions in a process of its own: a line of JSON in, a line out."""

import atexit
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any


class Ended(RuntimeError):
    """The program ended, or was ended because it took too long."""


class Worker:
    """A Python program, started at its first question. It ends when its input ends, and therefore
    together with this process. It finds the packages of this process, but gets no other variable of
    its environment.
    """

    def __init__(self, program: Path):
        self.program = program
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, question: Any, seconds: float) -> Any:
        """The answer to a question that JSON can hold.

        Raises:
            Ended: there is none after so many seconds; the next question starts the program anew.
        """
        with self._lock:
            return self._ask(question, seconds)

    def _ask(self, question: Any, seconds: float) -> Any:
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        alarm = threading.Timer(seconds, process.kill)
        alarm.start()
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            alarm.cancel()
        if not line:
            self._process = None
            raise Ended
        return json.loads(line)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(self.program)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                # The order of sets decides how many calls a comparison of mathematics needs.
                env={
                    "PYTHONHASHSEED": "0",
                    "PYTHONUTF8": "1",
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                },
                start_new_session=True,  # Ctrl-C is for the run
            )
            atexit.register(self._process.kill)
        return self._process

"""Commands in processes of their own, forked from one that has imported what takes seconds.

A test asks ``run`` for a command; the process that forks is this file, started at the first call.
JAX is imported there, with the settings of its environment, and has started no backend. Runs draw
their pages where the environment has ``PAGES``.
"""

import functools
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# What a run imports, where it does not import it at once.
IMPORTED = (
    "rlhf_jax.cli.commands",
    "rlhf_jax.training",
    "rlhf_jax.training.common.saving",
    "matplotlib.figure",
)


@functools.cache
def server(settings: tuple[tuple[str, str], ...]) -> subprocess.Popen:
    """The process that forks; it ends when its input does, with this process. ``settings`` of JAX
    are read when it is imported: others need another process.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | dict(settings)
    return subprocess.Popen([sys.executable, __file__], env=environment, **pipes)


def run(
    command: list, folder: Path, typed: str = "", before: str = "", **environment: str
) -> subprocess.CompletedProcess:
    """What ``subprocess.run`` returns of a command in ``folder``, on the CPU.

    command: ``python`` with its arguments, or a script of this interpreter's environment, such as
        ``rlhf-jax``.
    typed: its input.
    before: Python code that the process runs first.
    environment: in place of this process's.
    """
    words = [str(word) for word in command]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {**os.environ} | {"JAX_PLATFORMS": "cpu", "PATH": path} | environment
    forking = server(tuple(sorted((key, own[key]) for key in own if key.startswith("JAX_"))))
    with tempfile.TemporaryDirectory() as place:
        files = [str(Path(place, name)) for name in ("typed", "output", "errors")]
        for file, content in zip(files, (typed, "", ""), strict=True):
            Path(file).write_text(content, "utf-8")
        asked = {"words": words, "folder": str(folder), "files": files, "before": before}
        asked["environment"] = own
        forking.stdin.write(json.dumps(asked) + "\n")
        forking.stdin.flush()
        code = forking.stdout.readline()
        assert code, "the process that forks has ended"
        said = [Path(file).read_text("utf-8") for file in files[1:]]
    return subprocess.CompletedProcess(words, int(code), *said)


def become(
    words: list[str], folder: str, files: list[str], before: str, environment: dict[str, str]
) -> None:
    """Runs the command in this process, which was forked for it."""
    for number, file in enumerate(files):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if "PAGES" not in environment:
        sys.modules["rlhf_jax.training.common.saving"]._draw_page = lambda run: None
    exec(before, {})
    program, *rest = words
    if program == "python" and rest[0] == "-m":
        sys.path[0] = folder
        sys.argv = ["-m", *rest[2:]]
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = rest if program == "python" else [shutil.which(program), *rest]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    for line in iter(sys.stdin.readline, ""):
        number = os.fork()
        if number == 0:
            become(**json.loads(line))
            return
        _, status = os.waitpid(number, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

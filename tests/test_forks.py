"""A forked command is as one that is started: its words, input, output, environment and end."""

import os

import forks
import pytest

SCRIPT = """
import os, signal, sys
print(sys.argv[1:], input(), os.getcwd(), os.environ["TOLD"], os.environ["JAX_ENABLE_X64"])
import jax
print(jax.numpy.ones(1).dtype, os.path.basename(sys.path[0]), __name__)
if sys.argv[1] == "raises":
    raise ValueError(sys.argv[2])
if sys.argv[1] == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("exits", 7), ("raises", 1), ("is killed", -9)])
def test_a_forked_command(end, code, tmp_path):
    (tmp_path / "own").mkdir()
    script = tmp_path / "own" / "script.py"
    script.write_text(SCRIPT)
    told = {"TOLD": "so", "JAX_ENABLE_X64": "1"}
    done = forks.run(["python", script, end, "b c"], tmp_path, "typed\n", **told)
    assert done.returncode == code
    if end != "is killed":  # what it had not written yet is lost
        first, second = done.stdout.splitlines()
        assert first == f"['{end}', 'b c'] typed {tmp_path} so 1"
        assert second == "float64 own __main__"
    assert ("ValueError: b c" in done.stderr) == (end == "raises")
    assert "TOLD" not in os.environ

"""The notebooks: with small outputs in the repository, and executed from first to last cell on
small settings (slow).

A notebook's cell tagged ``parameters`` is followed, as papermill does it, by one that overrides
what is to be small; a last cell asserts what the notebook claims.

    RLHF_JAX_DATA=FOLDER python tests/test_notebooks.py   # executes them, keeps the outputs
"""

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbclient
import nbformat
import pytest
from builders import text_file

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
# Left out here, since each takes longer than these runs and has tests of its own: doctor's step of
# every phase, and a page for each run.
SHORTER = """
import rlhf_jax.cli.doctor
import rlhf_jax.report.page

rlhf_jax.cli.doctor.STEPS = {}
rlhf_jax.report.page.write = lambda runs, path: None
"""
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
LARGEST = 160_000  # bytes of a notebook with its outputs
KEPT_LINES = 8  # of a long output, at its beginning and at its end
# In place of the network: the file that the notebooks fetch, whose checksum they compare.
FETCHED = """
import os, pathlib, urllib.request

def urlopen(url, timeout):
    return pathlib.Path(os.environ["RLHF_JAX_DATA"], "tinyshakespeare", "input.txt").open("rb")

urllib.request.urlopen = urlopen
"""


def code_cells(name):
    return [
        cell
        for cell in json.loads((NOTEBOOKS / f"{name}.ipynb").read_bytes())["cells"]
        if "outputs" in cell
    ]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook in a kernel of this interpreter, in ``tmp_path``, on the CPU; returns what it
    printed.
    """
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def execute(name, *checks, **settings):
        book = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        [place] = [
            i for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", ())
        ]
        overrides = "\n".join(f"{key} = {value!r}" for key, value in settings.items())
        book.cells.insert(place + 1, nbformat.v4.new_code_cell(overrides))
        book.cells.insert(0, nbformat.v4.new_code_cell(SHORTER))
        book.cells.append(
            nbformat.v4.new_code_cell("\n".join(f"assert {check}" for check in checks))
        )
        nbclient.NotebookClient(
            book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
        return "".join(
            output.get("text", "") for cell in book.cells for output in cell.get("outputs", ())
        )

    return execute


def texts_of(cell):
    return ["".join(output["text"]) for output in cell["outputs"] if "text" in output]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_holds_small_outputs_and_pictures(name):
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < LARGEST
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    printing = [cell for cell in cells if re.search(r"^ *print\(", "".join(cell["source"]), re.M)]
    assert printing
    assert all(texts_of(cell) for cell in printing)
    said = "".join(text for cell in cells for text in texts_of(cell))
    assert not re.search(r"(^|[\s'\"(])/(tmp|home|root|work)/", said, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_says_its_run_time_at_its_top(name):
    first = json.loads((NOTEBOOKS / f"{name}.ipynb").read_bytes())["cells"][0]
    assert re.search(r"took \d+ minutes? on two CPU cores", "".join(first["source"]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("driver", "accelerator", "extra"),
    [
        ("580.65.06", "", "[cuda13]"),
        ("550.54", "", "[cuda12]"),
        (None, "accel0", "[tpu]"),
        (None, "", ""),
    ],
)
def test_the_first_cell_installs_the_extra_of_the_machine(
    name, driver, accelerator, extra, tmp_path, monkeypatch
):
    installed = []
    (tmp_path / "dev" / accelerator).mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()

    def run(command, **options):
        if command[0] == "nvidia-smi":
            return type("Done", (), {"stdout": f"{driver}\n"})
        return installed.append(command[-1])

    monkeypatch.setattr("shutil.which", lambda command: driver and f"/bin/{command}")
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("rlhf_jax.cli.run", lambda argv: installed.append(argv[0]))
    monkeypatch.chdir(tmp_path / "notebooks")
    cell = "".join(code_cells(name)[0]["source"]).replace('"/dev"', repr(str(tmp_path / "dev")))
    with pytest.raises(AssertionError, match="in notebooks/ of a checkout"):
        exec(cell, {})
    (tmp_path / "pyproject.toml").touch()
    exec(cell, {})
    assert installed == [f"{tmp_path}{extra}", "doctor"]


@pytest.mark.slow
def test_the_two_shakespeare_notebooks_one_after_the_other(execute, tmp_path):
    data = text_file(tmp_path / "text.txt", 12000)
    shared = {"DATA": str(data), "NUM_LAYERS": 1}
    small = {"CHUNK_SIZES": (4, 8), "OVERLAPS": (0, 2), "VALIDATION_INTERVAL": 50}
    checks = (
        "len(pieces) == 5000 and error < targets.var() / 4",
        "score(['hhhh'])[0] > score(['aaaa'])[0] + 2",
    )
    assert "always saying the mean" in execute(
        "shakespeare_reward_model", *checks, **shared, **small
    )
    small = {
        "STARTERS": ("hat", "be", "the", "eat", "ah", "bat"),
        "HIDDEN_SIZE": 32,
        "MAX_LENGTH": 16,
    }
    small |= {"ITERATIONS": 100, "EPISODES": 36, "MAX_NEW_TOKENS": 6, "LEARNING_RATE": 3e-3}
    checks = (
        "metrics['exact count'][-1]['validation/score'] > 5.5",
        "metrics['learned count'][-1]['validation/reward/count:h'] > 4.5",
    )
    said = execute("shakespeare_vpg", *checks, **shared, **small)
    assert "exact count: " in said
    assert "Generated: " in said


@pytest.mark.slow
def test_the_notebook_of_the_reward_model_on_llama_tells_good_from_bad(execute, tmp_path):
    checks = (
        "test['accuracy'] > 0.7 and good > bad",
        "sizes[0] < sizes[1] / 2 and judge.model.config.num_kv_heads == 2",
    )
    said = execute("reward_model_lora", *checks, NUM_PAIRS=800, NUM_EPOCHS=2, NORMALIZE_SAMPLES=0)
    assert "numbers were trained beside" in said
    assert (tmp_path / "runs" / "notebooks" / "reward_model" / "reward_model" / "adapter").is_dir()


def shortened(text):
    """The first and the last lines of a long output."""
    lines = text.splitlines(keepends=True)
    left_out = len(lines) - 2 * KEPT_LINES
    if left_out <= 1:
        return text
    middle = f"[... {left_out} lines ...]\n"
    return "".join([*lines[:KEPT_LINES], middle, *lines[-KEPT_LINES:]])


def store(name, folder):
    """Executes a notebook as it stands, in a folder, and keeps what its cells print and draw."""
    path = NOTEBOOKS / f"{name}.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells.insert(0, nbformat.v4.new_code_cell(FETCHED))
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(book, timeout=7200, resources=resources).execute()
    del book.cells[0]
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, 1):
        cell.execution_count = number
        cell.metadata.pop("execution", None)
        drawn = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        said = [
            output.get("text") or output.data["text/plain"]  # of a table by rich
            for output in cell.outputs
            if output not in drawn
        ]
        if said:
            shown = shortened("".join(said).replace(f"{folder}/", ""))
            drawn.insert(0, nbformat.v4.new_output("stream", name="stdout", text=shown))
        cell.outputs = drawn
    nbformat.write(book, path)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(sys.argv[1:] or NAMES):
            begin = time.monotonic()
            store(name, folder)
            print(f"{name}: {(time.monotonic() - begin) / 60:.1f} minutes")

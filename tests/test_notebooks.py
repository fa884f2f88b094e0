"""The notebooks: clean in the repository, and executed from first to last cell on small settings (slow).

A notebook's cell tagged ``parameters`` is followed, as papermill does it, by one that overrides what is to be small; a
last cell asserts what the notebook claims.
"""

import json
import os
import random
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
# Left out here, since each takes longer than these runs and has tests of its own: doctor's step of every phase, and a
# page for each run.
SHORTER = """
import rlhf_jax.training.doctor
import rlhf_jax.report.page

rlhf_jax.training.doctor.self_test = list
rlhf_jax.report.page.write = lambda runs, path: None
"""
NAMES = ("reward_model_lora", "shakespeare_reward_model", "shakespeare_vpg")


def read(name):
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text("utf-8"))


def code_cells(name):
    return ["".join(cell["source"]) for cell in read(name)["cells"] if cell["cell_type"] == "code"]


def tagged(name, tag="parameters"):
    return [i for i, cell in enumerate(read(name)["cells"]) if tag in cell["metadata"].get("tags", ())]


def text_file(path, characters):
    """Random words of which every fourth character is an h or so."""
    source = random.Random(0)
    words = ["hat ", "the ", "be\n", "ah, ", "bat ", "eat "]
    path.write_text("".join(source.choice(words) for _ in range(characters // 3))[:characters], encoding="utf-8")
    return str(path)


def execute(name, settings, checks, folder, monkeypatch):
    """Runs the notebook in a kernel of this interpreter, in an empty folder, on the CPU."""
    import nbclient
    import nbformat

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles in half the time
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    book = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    overrides = "\n".join(f"{key} = {value!r}" for key, value in settings.items())
    unknown = [key for key in settings if f"{key} = " not in book.cells[tagged(name)[0]].source.replace(", ", " = ")]
    assert not unknown, f"{name} has no such settings: {unknown}"
    book.cells.insert(tagged(name)[0] + 1, nbformat.v4.new_code_cell(overrides))
    book.cells.insert(0, nbformat.v4.new_code_cell(SHORTER))
    book.cells.append(nbformat.v4.new_code_cell(checks))
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    return book


def said(book):
    return "\n".join(
        output.get("text", "") for cell in book.cells if cell.cell_type == "code" for output in cell.outputs
    )


def test_the_notebooks_are_all_here():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_notebook_holds_outputs(name):
    book = read(name)
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None]
    assert len(tagged(name)) == 1
    assert book["cells"][1]["cell_type"] == "code"  # what installs comes first


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("driver", "accelerator", "extra"),
    [("580.65.06", "", "[cuda13]"), ("550.54", "", "[cuda12]"), (None, "accel0", "[tpu]"), (None, "", "")],
)
def test_the_first_cell_installs_the_extra_of_the_machine(name, driver, accelerator, extra, tmp_path, monkeypatch):
    installed = []
    (tmp_path / "dev").mkdir()
    if accelerator:
        (tmp_path / "dev" / accelerator).touch()
    monkeypatch.setattr("shutil.which", lambda command: None if driver is None else f"/bin/{command}")
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)

    def run(command, **options):
        if command[0] == "nvidia-smi":
            return type("Done", (), {"stdout": f"{driver}\n"})
        return installed.append(command[-1])

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("rlhf_jax.cli.run", lambda argv: installed.append(argv[0]))
    monkeypatch.chdir(tmp_path)
    exec(code_cells(name)[0].replace('"/dev"', repr(str(tmp_path / "dev"))), {})
    assert installed == [f"rlhf-jax{extra}", "doctor"]


@pytest.mark.slow
def test_the_two_shakespeare_notebooks_one_after_the_other(tmp_path, monkeypatch):
    data = text_file(tmp_path / "text.txt", 12000)
    book = execute(
        "shakespeare_reward_model",
        {"DATA": data, "CHUNK_SIZES": (4, 8), "OVERLAPS": (0, 2), "NUM_LAYERS": 1, "VALIDATION_INTERVAL": 50},
        "assert len(pieces) == 5000 and error < targets.var() / 4\nassert score(['hhhh'])[0] > score(['aaaa'])[0] + 2",
        tmp_path,
        monkeypatch,
    )
    assert "always saying the mean" in said(book)
    small = {
        "DATA": data,
        "STARTERS": ("hat", "be", "the", "eat", "ah", "bat"),
        "HIDDEN_SIZE": 32,
        "NUM_LAYERS": 1,
        "MAX_LENGTH": 16,
    }
    book = execute(
        "shakespeare_vpg",
        {**small, "ITERATIONS": 100, "EPISODES": 36, "MAX_NEW_TOKENS": 6, "LEARNING_RATE": 3e-3},
        "last = {name: found[-1]['validation/reward/count:h' if name[0] == 'l' else 'validation/score'] for name, found"
        " in metrics.items()}\nassert last['exact count'] > 5.5 and last['learned count'] > 4.5, last",
        tmp_path,
        monkeypatch,
    )
    assert "exact count: " in said(book)
    assert "Generated: " in said(book)


@pytest.mark.slow
def test_the_notebook_of_the_reward_model_on_llama_tells_good_from_bad(tmp_path, monkeypatch):
    book = execute(
        "reward_model_lora",
        {"NUM_PAIRS": 800, "NUM_EPOCHS": 2, "NORMALIZE_SAMPLES": 0},
        "assert test['accuracy'] > 0.7 and sizes[0] < sizes[1] / 2 and judge.model.config.num_kv_heads == 2, test\n"
        "assert good > bad",
        tmp_path,
        monkeypatch,
    )
    assert "numbers were trained beside" in said(book)
    assert (tmp_path / "runs" / "notebooks" / "reward_model" / "reward_model" / "adapter").is_dir()

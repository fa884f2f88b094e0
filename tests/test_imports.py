"""Imports go down only, and what is heavy or fragile stays where the design puts it."""

import ast
import functools
import re
import sys
import warnings
from pathlib import Path

import forks
import pytest
from source import parse

PACKAGE = Path(__file__).resolve().parent.parent / "rlhf_jax"
# The science, which the application below it uses and which never imports it.
SCIENCE = [
    {"types", "errors"},
    {"parallel"},
    {"policies"},
    {"ops", "metrics"},
    {"losses", "advantages"},
    {"models"},
    {"sampling"},
    {"rewards"},
    {"algorithms"},
    {"iteration"},
]
APPLICATION = [
    {"runs"},
    {"graders"},
    {"data", "config"},
    {"report", "generation"},
    {"engines"},
    {"training"},
    {"evaluation"},
    {"inference"},
    {"cli", "__main__"},
]
LAYERS = [*SCIENCE, *APPLICATION]
WITH_FILES = ("errors.py", "hf.py", "peft.py")  # models are folders
LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path):
    """The module or subpackage of rlhf_jax that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def nodes(path):
    return [*ast.walk(parse(path.read_text("utf-8")))]


def imported(path):
    """Full names of what a file imports, wherever in it."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_down_only():
    """A part that no layer names counts as the highest. Losses, advantages and algorithms are given
    functions of models.
    """
    wrong = []
    for path in FILES:
        here = part(path)
        assert here in LAYER_OF, path
        for name in imported(path):
            package, _, inner = name.partition(".")
            above = inner.split(".")[0]
            goes_up = LAYER_OF.get(above, len(LAYERS)) > LAYER_OF[here]
            if here in ("losses", "advantages", "algorithms"):
                goes_up = goes_up or above == "models"
            if package == "rlhf_jax" and inner and goes_up:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_no_file_needs_the_triton_of_pallas():
    """Deprecated since JAX 0.11."""
    deprecated = ("jax.experimental.pallas.ops.gpu", "jax.experimental.pallas.triton")
    assert not [name for path in FILES for name in imported(path) if name.startswith(deprecated)]


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning])
def test_what_our_modules_need_must_not_be_deprecated(category):
    """Of the modules of other packages it is a warning."""

    def warn(module):
        warnings.warn_explicit("goes soon", category, "source.py", 1, module=module)

    for module in ("rlhf_jax", "rlhf_jax.models.kernels.cache"):
        with pytest.raises(category, match="goes soon"):
            warn(module)
    with pytest.warns(category, match="goes soon"):
        warn("flax.linen")


def test_the_science_imports_few_packages():
    allowed = {
        *("jax", "flax", "optax", "chex", "numpy", "scipy", "safetensors", "huggingface_hub"),
        "rlhf_jax",
    }
    for path in FILES:
        if LAYER_OF[part(path)] < len(SCIENCE):
            packages = {name.split(".")[0] for name in imported(path)}
            assert packages - sys.stdlib_module_names <= allowed, path


def test_no_folder_is_crowded():
    # Of algorithms each file is a method by itself.
    for folder in {path.parent for path in FILES} - {PACKAGE, PACKAGE / "algorithms"}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= 18, folder


def test_what_only_one_place_may_import():
    owners = {
        "orbax": {"runs"},
        "datasets": {"data"},
        "matplotlib": {"report"},
        "flax.linen": {"models"},
        "flax.nnx": set(),
        "starlette": {"inference"},
        "uvicorn": {"inference"},
        "sqlite3": {"inference"},
        "torch": set(),
        "pickle": set(),
    }
    for path in FILES:
        for name in imported(path):
            for package, allowed in owners.items():
                if name == package or name.startswith(f"{package}."):
                    assert part(path) in allowed, f"{path} imports {name}"


def test_only_an_entry_takes_all_settings():
    """Whoever else reads a setting is given its section, or the few values that it needs."""
    entries = {
        "training/common/setup.py",
        "training/common/opening.py",  # writes them into the folder
        "training/pipeline.py",
        *(f"training/rl/{name}.py" for name in ("run", "job", "method")),
        *(f"training/supervised/{name}.py" for name in ("run", "sft", "dpo", "kto")),
        "training/supervised/reward_model.py",
    }
    for path in FILES:
        if part(path) in ("config", "cli"):
            continue
        names = {node.id for node in nodes(path) if isinstance(node, ast.Name)}
        takes_all = "RunConfig" in names or "rlhf_jax.config.RunConfig" in imported(path)
        name = path.relative_to(PACKAGE).as_posix()
        assert takes_all == (name in entries), path


def test_the_science_does_not_touch_the_world():
    world = {"os", "pathlib", "time", "datetime", "logging", "sys", "io", "tempfile", "random"}
    for path in FILES:
        if LAYER_OF[part(path)] < len(SCIENCE) and path.name not in WITH_FILES:
            assert not world & {name.split(".")[0] for name in imported(path)}, path


IMPORTS = """import sys
from rlhf_jax import *
from rlhf_jax.data import encoding
from rlhf_jax.data.tokenizers import train_bpe
train_bpe(["a"], 300).encode("a")
print([m for m in ("flax.nnx", "torch", "transformers", "datasets") if m in sys.modules])
"""


def test_the_package_imports_neither_nnx_nor_torch_nor_what_is_slow(tmp_path):
    """In a process that has imported what commands do, for which other tests wait too."""
    (tmp_path / "imports.py").write_text(IMPORTS)
    assert forks.run(["python", tmp_path / "imports.py"], tmp_path).stdout == "[]\n"


def test_only_the_command_line_prints():
    """What runs report goes through the logger ``rlhf_jax``; warnings about a signal go to stderr
    at once.
    """
    for path in (path for path in FILES if path != PACKAGE / "cli" / "console.py"):
        for node in nodes(path):
            function = node.func if isinstance(node, ast.Call) else None
            if isinstance(function, ast.Name) and function.id == "print":
                assert "file" in {keyword.arg for keyword in node.keywords}, (
                    f"{path}, line {node.lineno}"
                )


def test_no_test_file_imports_another():
    """What two of them need stands in a helper: builders, cases, programs, references, ..."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text("utf-8")
        found = re.search(r"^\s*(from|import) (tests\.|tests import )?test_.*", text, re.MULTILINE)
        assert found is None, f"{path.name}: {found[0]}"


def numbers_in_a_row(function):
    """Pairs of positional numbers, or switches, of which each could be taken for the other."""
    number = re.compile(r"(int|float|bool)\b")
    given = [*function.args.posonlyargs, *function.args.args]
    is_number = [
        x.annotation is not None and number.match(ast.unparse(x.annotation)) for x in given
    ]
    for index in range(1, len(given)):
        if is_number[index - 1] and is_number[index]:
            yield given[index - 1].arg, given[index].arg


def test_numbers_that_could_be_swapped_have_names():
    """In public functions of the science; those that have their places in papers keep them."""
    found = {
        (node.name, *pair)
        for path in FILES
        if part(path) in set().union(*SCIENCE) - {"models"} or path.stem in ("heads", "lora")
        for node in parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        for pair in numbers_in_a_row(node)
    }
    assert found == {
        ("gae", "gamma", "lam"),
        ("clipped_surrogate", "clip_low", "clip_high"),
        ("clipped_surrogate", "clip_high", "dual_clip"),
        ("missing_eos", "penalty", "score"),
        ("token_count", "token_id", "cap"),
        ("token_count", "cap", "include_prompt"),
        ("policy_fn", "temperature", "prompt_length"),
    }

"""Configs that come with the package, and the configs of others: what they may not name, and what
other commands read of them.
"""

import os
import re
from pathlib import Path
from typing import Any

import msgspec

from rlhf_jax.config.settings import Compute, RLStage, Text
from rlhf_jax.config.yaml_files import Values
from rlhf_jax.errors import UserError
from rlhf_jax.runs import keeping, reading

# Settings that are texts, and name nothing outside the program.
_TEXTS = {"columns", "alerts", "keep_best", "template", "stop", "patterns", "replacement", "match"}
_TEXTS |= {"frozen", "teacher_model"}
_REWARDS = {"reward", "judge", "classifier", "gold", "score"}  # a path is a part of the text


def shipped() -> dict[str, Path]:
    """The configs that come with the package, such as ``tiny`` and ``dapo``, by their names."""
    paths: dict[str, Path] = {}
    for place in Path(__file__).parents[1:3]:  # of a wheel, of a checkout
        paths |= {path.stem: path for path in (place / "configs").rglob("*.yaml")}
    return dict(sorted(paths.items()))


def check_trusted(given: Values, run: Path | None = None) -> None:
    """Refuses values of somebody else's file that would run Python code, send texts and keys to a
    server, or read and write elsewhere on this machine.

    Configs of this package are trusted, and so are values whose YAML file and Python file are in
    the current folder. A file in the folder of a run may be somebody else's wherever it is: what it
    names is never trusted, except files and folders below the current folder or of that run.

    Args:
        run: the folder that the files belong to, if it was given as that of a run.

    Raises:
        UserError: lists these values.
    """
    own = [_real(path) for path in shipped().values()]
    problems = []
    for key, (value, place) in given.items():
        config = Path(re.sub(r", line \d+$", "", place)).absolute()
        if _real(config) in own:
            continue
        for text in value if isinstance(value, tuple) else (value,):
            around = run or _run_around(config)
            harm = _harm(key, text, config, around)
            if harm:
                of_run = f" (a config of the run {around})" if around else ""
                problems.append(f"{place}: {key} {text} {harm}{of_run}")
    if problems:
        listed = "\n".join(problems)
        raise UserError(
            f"{listed}\nThis acts with your rights, and the file may be somebody else's. What you "
            "type as flags needs no trust; if the file is yours, or you have read it, give "
            "--trust-config"
        )


_SAMPLING = ["max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop"]
_READ: dict[str, tuple[type, list[str]]] = {
    "compute": (Compute, ["dtype"]),
    "text": (Text, ["template", "special_tokens"]),
    "rl": (RLStage, [*_SAMPLING, "environment", "max_turns"]),
}


def recorded(folder: str) -> dict[str, Any]:
    """{dotted key: value} of what other commands read of the config.yaml of a run, given the run or
    its ``model/``; for other models its ``reward`` is empty and nothing else there.

    Raises:
        UserError: names the file and the key of a value that no run has.
    """
    file = reading.settings_file(folder)
    settings = reading.read_yaml(file, reading.Settings) if file.is_file() else {}
    found = {"reward": settings.get("reward", [])}
    for section, (kind, keys) in _READ.items():
        given = {key: value for key, value in settings.get(section, {}).items() if key in keys}
        wrong = reading.misfit(given, kind).removeprefix("it: ")
        if wrong:
            raise UserError(f"{file}: {section}: {wrong}")
        values = vars(msgspec.convert(given, kind))
        found |= {f"{section}.{key}": values[key] for key in given}
    return found


def _harm(key: str, value: Any, config: Path, run: Path | None) -> str:
    """What a value of somebody else's YAML file, of this run, could do; "" for nothing."""
    name = key.rpartition(".")[2]
    if not value or not isinstance(value, str | bool) or name in _TEXTS:
        return ""
    here = _real(".")
    if run and key in ("resume", "overwrite", "allow_changed"):
        return "changes another run, and no run has it in its own config"
    if isinstance(value, bool):
        return ""
    from rlhf_jax.graders import spec  # only somebody else's file asks for it

    kind, names = spec.named(value)
    if kind == "code":
        file = _real(names[0])
        return f"runs the Python code of {file}" if run or not file.is_relative_to(here) else ""
    harmless = {"judge.url": "", "processes": "auto"}
    is_host = kind == "address" or value != harmless.get(key, value)
    if is_host and (run or not _real(config).is_relative_to(here)):
        return "gets the texts of the run, and your API key"
    if run and key == "track" and value != "tensorboard":
        return "gets the metrics and texts of the run"
    if run is None:
        return ""
    for place in names if name in _REWARDS else (value, *names):
        path = _real(place)
        is_below = path.is_relative_to(here) and not os.path.isabs(place)
        if not is_below and not path.is_relative_to(_real(run)):
            return "is an absolute path, or leads out of the current folder"
    return ""


def _real(path: str | Path) -> Path:
    """The absolute path without links. Unlike ``Path.resolve`` it raises nothing."""
    return Path(os.path.realpath(str(path).replace("\0", "")))


def _run_around(file: Path) -> Path | None:
    """The folder of the run in which a file lies, or lies behind a link; None outside of runs."""
    for folder in (*file.parents, *_real(file).parents):
        # Either is enough for --resume.
        for mark in (folder / "manifest.json", folder / keeping.START):
            if os.path.lexists(mark):
                return folder
    return None

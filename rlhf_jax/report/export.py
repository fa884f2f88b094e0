"""``rlhf-jax export``: a run's model as a Hugging Face folder with its tokenizer and a model card."""

import json
import shutil
from pathlib import Path

import jinja2

from rlhf_jax.errors import UserError
from rlhf_jax.report import records


def export(run: str | Path, folder: str | Path) -> Path:
    """Copies ``RUN/model``, all members of an ensemble, to ``folder`` and writes README.md, the model card.

    Raises:
        UserError: the run has no model yet, its files are broken, or the folder is in use.
    """
    run, folder = Path(run), Path(folder)
    if records.model_config(run) is None:
        raise UserError(f"{run / 'model'}: no model here; give the folder of a finished run")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is in use; give a new folder")
    [record] = records.find([run])
    card = model_card(record, folder.name)
    shutil.copytree(run / "model", folder, dirs_exist_ok=True)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def model_card(record: records.RunRecord, name: str) -> str:
    """Markdown for a finished run: its command, data, last metrics, settings and limits."""
    config = records.model_config(record.path)
    assert config is not None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlhf_jax.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md").render(
        name=name,
        manifest=record.manifest,
        config=record.config,
        metrics=record.metrics[-1] if record.metrics else {},
        ensemble=config.parent.name == "member_0",
        reward_model="reward_shift" in json.loads(config.read_text("utf-8")),
    )

"""``rlhf-jax export``: a run's model as a Hugging Face folder with its tokenizer and a model card."""

import json
import shutil
from pathlib import Path

from rlhf_jax.data import chat
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.report import page, records


def export(run: str | Path, folder: str | Path) -> Path:
    """Copies ``RUN/model``, all members of an ensemble, to ``folder`` and writes README.md, the
    model card: base model, licence (to be filled in), use with the prompt template, command, data,
    last metrics, settings and limits.

    Raises:
        UserError: the run has no model yet, its files are broken, or the folder is in use.
    """
    run, folder = Path(run), Path(folder)
    config = records.model_config(run)
    if records.is_own(run):
        raise UserError(
            f"{run / 'model'}: the policy is one that Python gave, no Hugging Face model; copy the "
            "folder as it is"
        )
    if config is None:
        raise UserError(f"{run / 'model'}: no model here; give the folder of a finished run")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is in use; give a new folder")
    [record] = records.find([run])
    tokenizer = load_tokenizer(config.parent)
    template = chat.frame(record.settings.get("text.template", chat.AUTO), tokenizer)
    scores = "reward_shift" in json.loads(config.read_text("utf-8"))
    kind = {"ensemble": config.parent.name == "member_0", "reward_model": scores}
    names = {
        "name": folder.name,
        "base_model": record.settings.get("model"),
        "prompt_template": template,
    }
    card = page.fill("model_card.md", record=record, **names, **kind)
    shutil.copytree(run / "model", folder, dirs_exist_ok=True)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder

"""``rlhf-jax export``: a run's model as a Hugging Face folder with its tokenizer and a model card."""

import json
import shutil
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.report import records

CARD = """---
library_name: transformers
tags: [rlhf, rlhf_jax]
---

# {name}

{kind} trained with rlhf_jax, stage `{stage}`.

## How to reproduce it

    {command}

Seed {seed}. Versions: {versions}. Devices: {devices}.

## Data

{data}

## Last metrics

| metric | value |
|---|---|
{metrics}

## Settings

```yaml
{config}```

## Limits

The model repeats what its data and its reward taught it, flaws included. It has been evaluated on nothing but the
metrics above: measure helpfulness, harmlessness and honesty on your own prompts before anyone relies on it.
{reward_limits}
"""
REWARD_LIMITS = """\
Scores of a reward model are comparable between answers to one prompt, mean little far from its training data, and are
raised by whatever its labellers happened to prefer, such as length. Add `reward_shift` of config.json to transformers'
logit to get its score.
"""


def export(run: str | Path, folder: str | Path) -> Path:
    """Copies ``RUN/model``, all members of an ensemble, to ``folder`` and writes README.md, the model card.

    Raises:
        UserError: the run has no model yet, or the folder is in use.
    """
    run, folder = Path(run), Path(folder)
    source = run / "model"
    if not _first_model(run).is_file():
        raise UserError(f"{source}: no model here; give the folder of a finished run")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is in use; give a new folder")
    card = model_card(run, folder.name)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def model_card(run: Path, name: str) -> str:
    """Markdown from what the run says of itself.

    Raises:
        UserError: the run's manifest or metrics are missing.
    """
    try:
        manifest: dict[str, Any] = json.loads((run / "manifest.json").read_text("utf-8"))
        config = (run / "config.yaml").read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: not a run folder: {error}") from error
    rows = records.read_rows(run / "metrics.jsonl")
    last = rows[-1] if rows else {}
    first = _first_model(run)
    is_reward_model = "reward_shift" in json.loads(first.read_text("utf-8"))
    kind = "A reward model" if is_reward_model else "A language model"
    if first.parent.name == "member_0":
        kind = "An ensemble of reward models (`member_0`, `member_1`, ...)"
    return CARD.format(
        name=name,
        kind=kind,
        stage=manifest.get("stage", "unknown"),
        command=manifest["command"],
        seed=manifest["seed"],
        versions=", ".join(f"{package} {version}" for package, version in manifest["versions"].items()),
        devices=f"{manifest['devices']['count']} x {manifest['devices']['kind']}",
        data="\n".join(f"- `{file}`, sha256 {digest}" for file, digest in manifest["data"].items()),
        metrics="\n".join(f"| {metric} | {value:.5g} |" for metric, value in last.items()),
        config=config,
        reward_limits=REWARD_LIMITS if is_reward_model else "",
    )


def _first_model(run: Path) -> Path:
    """The config.json of a run's model, or of the first member of its ensemble."""
    alone = run / "model" / "config.json"
    return alone if alone.is_file() else run / "model" / "member_0" / "config.json"

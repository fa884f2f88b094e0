"""``rlhf-jax export``: a run's model as a Hugging Face folder with tokenizer and model card; or a
base model with a PEFT adapter merged.
"""

import re
from pathlib import Path

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from rlhf_jax import models
from rlhf_jax.config import ALGORITHMS
from rlhf_jax.data import chat, tokenizers
from rlhf_jax.errors import UserError, file_errors, logger, no_folder
from rlhf_jax.models import hf, lora, peft
from rlhf_jax.models.hf import read_json
from rlhf_jax.report import page, records
from rlhf_jax.runs.writing import (
    check_writable,
    copy_files,
    refuse_links,
    replacing,
    write_atomically,
)

# What a run writes into ``model/``, beside the folders of an ensemble's members.
KNOWN = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "value_head.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
SUPERVISED = ("sft", "reward_model", "dpo", "kto")
OF_RL = ("rl", "safety", "judge", "engine")  # sections that all stages of RL read
OF_STAGES = (*SUPERVISED, *OF_RL, *ALGORITHMS)
# What a reward model's stage reads of ``rl``: how it samples the policy, to scale its scores.
OF_SAMPLES = ("max_prompt_length", "max_new_tokens", "temperature")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_MEMBER = re.compile(r"member_\d+")


def export(run: str | Path, folder: str | Path) -> Path:
    """Copies the files of ``RUN/model`` that a run writes, all members of an ensemble, to
    ``folder``, which appears when it is complete. Logs which other files are there. Writes
    README.md, the model card: base model, licence (to be filled in), use with the prompt template,
    command, data, last metrics, settings and limits. For the folder of a PEFT adapter in place of a
    run's: ``export_merged``.

    Raises:
        UserError: the run has no model yet, its files are broken or symbolic links, or the folder
            is in use.
    """
    run = Path(run)
    folder = Path(folder)
    if (run / hf.ADAPTER_CONFIG).is_file():
        return export_merged(run, folder)
    if not run.is_dir():
        raise no_folder(run)
    model = run / "model"
    config = records.model_config(run)
    if records.is_own(run):
        raise UserError(
            f"{model}: the policy is one that Python gave, no Hugging Face model; copy the folder "
            "as it is"
        )
    if config is None:
        raise UserError(f"{model}: no model here; give the folder of a finished run")
    _check_free(folder)
    check_writable(folder)
    refuse_links([model])
    members = [entry for entry in model.iterdir() if _MEMBER.fullmatch(entry.name)]
    folders = [model, *sorted(member for member in members if member.is_dir())]
    refuse_links(folders)
    entries = [entry for place in folders for entry in sorted(place.iterdir())]
    entries = [entry for entry in entries if entry not in folders]
    known = [entry for entry in entries if entry.name in KNOWN or _SHARD.fullmatch(entry.name)]
    refuse_links(known)
    files = [entry for entry in known if entry.is_file()]
    for place in {config.parent, *(file.parent for file in files)}:
        hf.Reader(place)  # complete weights lie there
    [record] = records.find([run])
    tokenizer = tokenizers.load_tokenizer(config.parent)
    template = chat.frame(record.settings.get("text.template", chat.AUTO), tokenizer)
    end = chat.template_of(tokenizer).end_of_turn if template is None else None
    if template is not None:
        template = tokenizer.spelled(tokenizer.beginning) + template
    card = page.fill(
        "model_card.md",
        record=record,
        name=folder.name,
        base_model=record.settings.get("model"),
        prompt_template=template,
        end_of_turn=tokenizer.spelled([tokenizer.eos_id if end is None else end]),
        ensemble=config.parent.name == "member_0",
        reward_model="reward_shift" in read_json(config),
        settings=own_settings(record.config, record.stage),
    )
    with file_errors(folder, "written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as new:
            copy_files(files, model, new)
            write_atomically(new / "README.md", card)
            _check_free(folder)  # from another process
    unknown = [str(entry.relative_to(model)) for entry in entries if entry not in files]
    if unknown:
        names = ", ".join(unknown)
        logger.info(f"left out, as no run of rlhf_jax writes it: {names}")
    return folder


def own_settings(config: str, stage: str) -> str:
    """The lines of a run's config.yaml without the sections that its stage does not read."""
    read = {stage} if stage in SUPERVISED else {stage, *OF_RL}
    kept = []
    for block in re.split(r"^(?=\w)", config, flags=re.MULTILINE):
        name, _, _ = block.partition(":")
        if name == "rl" and stage == "reward_model":
            head, *lines = block.splitlines(keepends=True)
            sampling = [line for line in lines if line.split(":")[0].strip() in OF_SAMPLES]
            kept.append("".join([head, *sampling]))
        elif name in read or name not in OF_STAGES:
            kept.append(block)
    return "".join(kept)


def export_merged(adapter: Path, folder: Path) -> Path:
    """Writes the base model that a PEFT adapter names, with the adapter merged, and the tokenizer
    of the adapter's folder, or of the base model if that has none.
    """
    _check_free(folder)
    check_writable(folder)
    config = hf.find_folder(adapter) / hf.ADAPTER_CONFIG
    base = read_json(config).get("base_model_name_or_path")
    if not (isinstance(base, str) and base):
        raise UserError(f"{config}: base_model_name_or_path is {base!r}, and no model's name")
    model, params = peft.with_tokens_of(adapter, *models.load(base))
    merged = lora.merge(params, lora.load(adapter, params, model))
    for path, leaf in flatten_dict(merged).items():
        if not jnp.isfinite(leaf).all():
            raise UserError(
                f"{adapter}: merged into {base}, {'/'.join(path)} is not finite; look at "
                f"lora_alpha in {hf.ADAPTER_CONFIG} and at the numbers of both folders"
            )
    is_ours = hf.scores_turns(model.config) or peft.scores_turns(adapter)
    of_base = hf.find_folder(base)
    of_tokenizer = adapter if tokenizers.files_of(adapter) else of_base
    with file_errors(folder, "written"), replacing(folder) as new:
        models.save(new, model, merged, score_position=hf.END_OF_TURN if is_ours else None)
        files = tokenizers.files_of(of_tokenizer)
        copy_files((file for file in files if file.name != hf.CONFIG), of_tokenizer, new)
        copy_files([of_base / "generation_config.json"], of_base, new)
    return folder


def _check_free(folder: Path) -> None:
    """Raises UserError unless the folder is missing or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is in use; give a new folder")
    if folder.resolve() == Path.cwd():  # it is replaced, and a shell would stay in the former one
        raise UserError(f"{folder} is the working folder; give a new folder, such as my-model")

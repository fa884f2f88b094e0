"""Forks a run: begins at one of its checkpoints with other settings, another reward or without one
row of the data, and says what differs first.

Up to the checkpoint the fork has the bits of the run; without a change it has them to the end. The
folder of the run, which may come from somebody else, does not change.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from rlhf_jax.cli import verify
from rlhf_jax.cli.console import print_table, show
from rlhf_jax.cli.stages import REWARD, STAGES
from rlhf_jax.config import RunConfig, model_source, to_dict
from rlhf_jax.config.flags import switches_of
from rlhf_jax.errors import UserError, file_errors
from rlhf_jax.runs import folder, manifest, reading
from rlhf_jax.training.common import initial
from rlhf_jax.training.common.opening import fixed
from rlhf_jax.training.common.signals import resume_command
from rlhf_jax.training.tasks import TASKS

# What --set cannot change: the command itself chooses it.
OWN = (*verify.STARTS, "config", "trust_config", "mesh.data")
# They draw the held-out rows.
DRAWS = ("seed", "validation_fraction")
Many = tyro.conf.UseAppendAction[tuple[str, ...]]


def fork(
    run: tyro.conf.Positional[Path],
    at: int,
    output_dir: Path,
    settings: Annotated[Many, tyro.conf.arg(name="set", metavar="KEY=VALUE")] = (),
    reward: tuple[str, ...] = (),
    without_row: Annotated[Many, tyro.conf.arg(metavar="N")] = (),
    data: tuple[str, ...] = (),
    model: str | None = None,
    trust_config: bool = False,
) -> None:
    """Go on from a checkpoint of a run with a change, in a folder of its own, and see what differs
    first: rlhf-jax fork RUN --at STEP [--set KEY=VALUE | --reward ... | --without-row N].

    Up to the checkpoint the bits are the run's; without a change they are to the end. Writes
    nothing into the run's folder, which may be somebody else's.

    For example: rlhf-jax fork runs/ppo --at 50 --output-dir runs/fork --set rl.kl_coef=0.1

    Args:
        run: the folder of a run of one stage.
        at: the step of a checkpoint to begin at.
        output_dir: the folder of the fork.
        settings: a setting to change, such as rl.kl_coef=0.1 or sft.data=[a.json,b.json]; may be
            repeated.
        reward: in place of the run's.
        without_row: the number of a row of the data to leave out of its batches (of several files
            FILE:N), where rows are trained on; may be repeated.
        data: where the run's data files are here, if not where they were.
        model: where its --model is here.
        trust_config: use the Python files, servers and places that its config names.

    Raises:
        UserError: the folder is no run that can be forked, or is not as the run left it; there is
            no such checkpoint, setting or row; the other folder is used.
    """
    recorded = verify.read_manifest(run)
    stage = recorded["stage"]
    saved = folder.steps(run / "checkpoints")
    if at not in saved:
        listed = ", ".join(map(str, saved)) or "none"
        raise UserError(f"--at {at}: {run} has the checkpoints of these steps: {listed}")
    if output_dir.resolve().is_relative_to(run.resolve()):
        raise UserError(f"--output-dir {output_dir}: is in the run's folder; choose another")
    if without_row and stage not in TASKS:
        raise UserError(
            f"--without-row: {stage} learns from its own samples, not from rows; give prompts "
            "without the row, --set rl.data=FILE"
        )

    source = [] if model is None else ["--model", model]
    before = verify.read_config(run, recorded, source, data, trust_config)
    kinds = {f"{name}.": type(own) for name, own in before.own.items()} | {"": RunConfig}
    switches = {key for prefix, kind in kinds.items() for key in switches_of(kind, prefix)}
    flags = [word for setting in settings for word in _flag(setting, switches)]
    if reward:
        flags += ["--reward", *reward]
    if without_row:
        left_out = [*getattr(before, stage).without_rows, *without_row]
        flags += [f"--{stage.replace('_', '-')}.without-rows", *left_out]
    sections = [*(STAGES[stage.replace("_", "-")].reads if stage in TASKS else REWARD), stage]
    # What is not typed was trusted above.
    after = verify.read_config(run, recorded, [*source, *flags], data, True, sections)
    layers = initial.num_layers(model_source(after))
    after = replace(after, compute=initial.by_depth(after.compute, layers))
    changes = manifest.differences(to_dict(before), to_dict(after))
    never = [key for key in changes if manifest.within(key, fixed(after))]
    if never:
        raise UserError(
            f"{changes[never[0]]}: the checkpoint does not fit this; start a new run with it"
        )

    about = {"run": str(run), "step": at, "changes": [*changes.values()]}
    is_new = _begin(run, output_dir, before, after, {**recorded, "fork": about})
    try:
        verify.train(replace(after, output_dir=str(output_dir), resume=True), stage)
    except UserError as error:
        if is_new and resume_command(stage, output_dir) not in str(error):  # it cannot begin
            shutil.rmtree(output_dir)
        raise
    ends = [reading.read_rows(of / "metrics.jsonl")[-1]["step"] for of in (run, output_dir)]
    if ends[1] <= at:
        shutil.rmtree(output_dir)
        raise UserError(f"--at {at}: no step is left to make; begin earlier, or set more steps")
    differences, _ = verify.compare(run, output_dir, verify.Span(at, min(ends), max(ends)))
    changed = [f"changed: {sentence}" for sentence in changes.values()]
    show("\n".join([f"{output_dir}: forked from {run} at step {at}", *changed]))
    if differences:
        rows = [[str(step), *texts] for step, *texts in differences]
        print_table(("step", "file", "first difference", "run", "fork"), rows)
    else:
        nothing = f"the run has no step after {at}: nothing was compared"
        same = "nothing differs from the run, in the steps that both have"
        show(nothing if min(ends) == at else same)


def _begin(
    run: Path, output_dir: Path, before: RunConfig, after: RunConfig, facts: verify.Facts
) -> bool:
    """Makes the folder with what the fork goes on from, if the run is as it was; False if the same
    fork was begun there and stopped.
    """
    about = facts["fork"]
    if output_dir.exists() and not folder.is_unused(output_dir):
        file = output_dir / "manifest.json"
        if file.is_file() and reading.read_json(file, reading.Manifest).get("fork") == about:
            return False
        raise UserError(f"{output_dir} holds files already; choose another --output-dir")
    here = verify.checksums(before, facts["stage"])
    for found in verify.start_differences(run, [about["step"]], facts["data"], here):
        what = " ".join(filter(None, (found.place, found.recorded, "now", found.repeated)))
        raise UserError(f"{run}: {found.file} is not as it was in the run: {what}")
    data = verify.checksums(after, facts["stage"])
    with file_errors(output_dir, "written"):
        verify.copy_start(run, output_dir, after, about["step"], {**facts, "data": data})
    return True


def _flag(setting: str, switches: set[str]) -> list[str]:
    """The words of the flag that KEY=VALUE stands for."""
    key, equals, value = setting.partition("=")
    key = key.replace("-", "_")
    if not (key and equals) or key in OWN:
        why = "a fork has its own" if key in OWN else "give KEY=VALUE, such as rl.kl_coef=0.1"
        raise UserError(f"--set {setting}: {why}")
    section, dot, name = key.replace("_", "-").rpartition(".")
    if key.rpartition(".")[2] in DRAWS:
        raise UserError(
            f"--set {setting}: other rows would be held out, of which the run has learned some; "
            "start a new run with it"
        )
    if key in switches and value in ("true", "false"):
        return [f"--{section}{dot}{'no-' * (value == 'false')}{name}"]
    if not value.startswith("["):
        return [f"--{section}{dot}{name}", value]
    items = reading.parse_yaml(f"items: {value}", dict[str, list[str]], f"--set {key}")["items"]
    return [f"--{section}{dot}{name}", *items]

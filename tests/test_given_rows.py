"""Rows that Python gives to a run are what the same rows in a file are."""

import datetime
import json
from dataclasses import replace

import datasets
import jax
import numpy as np
import pandas as pd
import pytest
from builders import LETTERS, letters_stage, outputs, stopped_goes_on_alike
from numpy.testing import assert_array_equal

from rlhf_jax import grpo, models, training
from rlhf_jax.cli import verify
from rlhf_jax.data import files, formats
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.report import chapters, records
from rlhf_jax.runs import processes

PROMPTS = [{"prompt": f"say {c}", "letter": c} for c in LETTERS]
TEXTS = [{"prompt": f"say {c}", "response": f"yes {c}"} for c in LETTERS]
PAIRS = [{"prompt": f"say {c}", "chosen": f"yes {c}", "rejected": "no"} for c in LETTERS]
ROWS = {"sft": TEXTS, "reward_model": PAIRS, "dpo": PAIRS, "kto": PAIRS, "grpo": PROMPTS}


def distance(prompts, responses, letter):
    """How far the first letter is from that of the prompt's row."""
    starts = [response[:1] or "~" for response in responses]
    return [float(abs(ord(a) - ord(b))) for a, b in zip(starts, letter, strict=True)]


def start(config, stage, **rows):
    if stage == "grpo":
        return training.rl.run(config, grpo, reward=distance, **rows)
    return getattr(training, stage).run(config, **rows)


def stage_config(folder, stage, **changes):
    """A short run that names no data."""
    config = letters_stage(folder, stage)
    section = "rl" if stage == "grpo" else stage
    own = replace(getattr(config, section), data=(), **changes)
    return replace(config, data=(), **{section: own})


def lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return str(path)


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text("utf-8"))


@pytest.mark.parametrize("stage", ROWS)
def test_rows_as_a_list_a_dataset_and_a_file_train_the_same_bits(stage, tmp_path):
    """One run reads files, the other a list, and validates on a dataset."""
    rows, to_validate = ROWS[stage][:12], ROWS[stage][12:]
    length = {"num_iterations": 2} if stage == "grpo" else {"max_steps": 2}
    config = stage_config(tmp_path, stage, **length)
    section = "rl" if stage == "grpo" else stage
    named = {
        "data": (lines(tmp_path / "rows.jsonl", rows),),
        "validation_data": (lines(tmp_path / "others.jsonl", to_validate),),
    }
    of_files = start(
        replace(config, **{section: replace(getattr(config, section), **named)}), stage
    )
    given = {"data": rows, "validation_data": datasets.Dataset.from_list(to_validate)}
    of_rows = start(replace(config, output_dir=str(tmp_path / "given")), stage, **given)
    expected, found = outputs(of_files.folder), outputs(of_rows.folder)
    del expected["samples.jsonl"]  # which names the files
    assert {key for key in expected if found[key] != expected[key]} == set()
    recorded = manifest(of_rows.folder)
    recorded["given"].pop("reward", None)
    assert recorded["given"] == {"data": "12 rows", "validation_data": "4 rows"}
    assert recorded["rows"] == manifest(of_files.folder)["rows"]
    of_report = records.find([of_rows.folder])
    assert "validation_data" not in chapters._title(of_report, records.groups(of_report))
    trained = of_rows.language_model()
    jax.tree.map(assert_array_equal, trained.params, models.load(of_files.model_folder)[1])
    assert trained.tokenizer.decode(trained.tokenizer.encode("say a")) == "say a"
    trained.save(tmp_path / "again")  # for the model of a next run
    again = LanguageModel.load(tmp_path / "again")
    jax.tree.map(assert_array_equal, trained.params, again.params)
    assert again.tokenizer.fingerprint == trained.tokenizer.fingerprint


def test_what_json_cannot_hold_is_converted_or_stays_for_who_reads_it():
    """As a file of JSON would hold it; rows are counted from 1."""
    row = {"prompt": "a", "x": np.float32(0.5), 7: np.arange(2), "y": (None, {"z": np.True_})}
    [record] = files.from_python(iter([row]), "data").records
    assert record.value == {"prompt": "a", "x": 0.5, "7": [0, 1], "y": [None, {"z": True}]}
    assert type(record.value["x"]) is float
    assert record.source == "data, row 1"
    day = datetime.date(2026, 1, 1)
    rows = [{"prompt": "a", "day": day}, {"prompt": day}, 7]
    with pytest.raises(UserError) as caught:
        formats.read("prompts", {"data": files.from_python(rows, "data")})
    assert "data, row 2: 'prompt'" in str(caught.value)
    assert "data, row 3" in str(caught.value)
    source = files.from_python(rows, "data")
    read = formats.read("prompts", {"data": source}, on_bad_row="drop")
    assert [row.columns for row in read.rows] == [{"day": day}]


def test_the_name_of_a_file_is_no_prompt(tmp_path):
    file = lines(tmp_path / "rows.jsonl", PROMPTS)
    with pytest.raises(UserError, match=r"^data, row 2: .*rows\.jsonl is a file; name it in the"):
        files.from_python(["say a", file], "data")


def test_the_nulls_that_a_dataset_adds_to_messages_are_left_out():
    """A list has none that it does not want, such as the default of a tool's argument."""
    turn = {"role": "user", "content": "a", "name": None}
    row = {"messages": [turn], "tools": [{"default": None}], "x": {"y": None}}
    dataset = datasets.Dataset.from_list([row])
    [of_list], [of_dataset] = (files.from_python(r, "data").records for r in ([row], dataset))
    assert of_list.value == row
    assert of_dataset.value == {
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{}],
        "x": {"y": None},
    }


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (datasets.DatasetDict(train=[], test=[]), "found DatasetDict of train, test; give one"),
        ({"prompt": ["a"]}, "found dict of prompt"),
        (pd.DataFrame(PROMPTS), "found DataFrame; .*to_dict"),
        ("rows.jsonl", "found str"),
        (b"rows", "found bytes"),
        (3, "found int"),
        ([], "holds no rows"),
    ],
)
def test_what_holds_no_rows_is_an_error(rows, said):
    with pytest.raises(UserError, match=f"^validation_data: .*{said}"):
        files.from_python(rows, "validation_data")


def test_fingerprints_tell_rows_apart():
    """By values, order and keys; a list and a generator of the same rows are the same."""
    kinds = [PROMPTS, PROMPTS[::-1], PROMPTS[:-1], [*PROMPTS[:-1], PROMPTS[-1] | {"letter": "é"}]]
    digests = [files.from_python(rows, "data").fingerprint for rows in kinds]
    assert len(set(digests)) == len(kinds)
    assert files.from_python(iter(PROMPTS), "data").fingerprint == digests[0]


def test_rows_are_read_under_all_settings_of_data(tmp_path):
    """Columns, bad rows, the number of rows and the share that is held out count as for a file."""
    rows = [{"prompt": f"say {c}", "answer": c} for c in LETTERS]
    rows[2] = {"prompt": "say c", "answer": 3}
    config = replace(
        stage_config(tmp_path, "sft", max_rows=10, num_epochs=1),
        columns=("response=answer",),
        on_bad_row="drop",
    )
    file = lines(tmp_path / "rows.jsonl", rows)
    of_file = start(replace(config, data=(file,)), "sft")
    given = start(replace(config, output_dir=str(tmp_path / "given")), "sft", data=iter(rows))
    assert manifest(given.folder)["rows"] == manifest(of_file.folder)["rows"]
    assert manifest(given.folder)["rows"]["dropped"] == {
        "'response' must be a string, found the number 3": 1
    }
    first, second = (outputs(run.folder) for run in (of_file, given))
    assert first["model/model.safetensors"] == second["model/model.safetensors"]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_rows_and_files_at_once_are_an_error(stage, tmp_path):
    config = stage_config(tmp_path, stage)
    with pytest.raises(UserError, match=r"^data: Python gives rows, .* name f\.json g\.json;"):
        start(replace(config, data=("f.json", "g.json")), stage, data=ROWS[stage])
    config = stage_config(tmp_path, stage, validation_data=("f.json",))
    with pytest.raises(UserError, match=r"^validation_data: Python gives rows, .* name f\.json;"):
        start(config, stage, data=ROWS[stage], validation_data=ROWS[stage])
    with pytest.raises(UserError, match=r"^no data"):
        start(stage_config(tmp_path, stage), stage, validation_data=ROWS[stage])


def test_rows_that_are_trained_on_are_not_validated_on(tmp_path):
    with pytest.raises(UserError, match="validation_data is data, which is trained on"):
        start(stage_config(tmp_path, "sft"), "sft", data=TEXTS, validation_data=iter(TEXTS))


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_stopped_run_goes_on_with_the_same_rows_alone(stage, tmp_path):
    """To the bits of a run that was never stopped."""
    config = stage_config(tmp_path, stage)
    straight = start(config, stage, data=ROWS[stage])
    resumed = stopped_goes_on_alike(
        lambda config: start(config, stage, data=iter(ROWS[stage])), config, straight, 3
    )
    again = replace(config, output_dir=str(resumed.folder), resume=True)
    others = [*ROWS[stage][:-1], ROWS[stage][-1] | {"prompt": "say z"}]
    with pytest.raises(UserError, match="sha256 of data was"):
        start(again, stage, data=others)
    with pytest.raises(UserError, match="data was '16 rows' and is now '15 rows'"):
        start(again, stage, data=others[1:])
    file = lines(tmp_path / "rows.jsonl", ROWS[stage])
    with pytest.raises(UserError, match="data was '16 rows' and is now"):
        start(replace(again, data=(file,)), stage)
    with pytest.raises(UserError, match="Python gave it data"):
        verify.verify(resumed.folder)


def test_processes_must_be_given_the_same_rows(tmp_path, monkeypatch):
    def gather(work):
        facts = work()
        return [facts, facts and facts | {"given": {"data": 3}}]

    monkeypatch.setattr(processes, "gather", gather)
    with pytest.raises(UserError, match=r"given\.data is '16 rows' in process 0 and 3 in"):
        start(stage_config(tmp_path, "sft"), "sft", data=TEXTS)

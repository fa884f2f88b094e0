"""Damaged run folders: report, export, resume and evaluate answer with a result or a sentence,
soon.
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import time

import jax
import pytest
from accidents import BOMB, DEEP, LOOP, PIECES, hurt, with_odd_value
from builders import initial_params, run_loop, slow

from rlhf_jax import models
from rlhf_jax.config import RunConfig
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.evaluation import evaluate
from rlhf_jax.models import lora
from rlhf_jax.report import page
from rlhf_jax.report.export import export
from rlhf_jax.runs import reading

SECONDS = 60  # of the processor: far more than any of this takes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a reward model's folder, checkpoints and every file that a run may hold."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = RunConfig(output_dir=str(folder), checkpoint_interval=3)
    run_loop(config, num_steps=3, scores=[float(n) for n in range(4)])
    model = models.build(models.LlamaConfig(6, 8, 4, 1, 2, 4, tie_embeddings=True))
    params = initial_params(model)
    models.save(folder / "model", model, models.add_head(jax.random.key(1), params, "score"))
    tokenizers.characters("ab").save(folder / "model")
    lora.save(folder / "adapter", params, lora.init(jax.random.key(2), params, 2))
    alert = {"step": 2, "rule": "loss > 0", "message": "loss is 1"}
    (folder / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    figure = {"category": "preferences", "metric": "accuracy", "value": 0.5, "low": 0.1}
    figure |= {"high": 0.9, "n": 3, "unit": "pairs", "note": ""}
    (folder / "evaluation.json").write_text(json.dumps({"rows": [figure]}))
    pair = {"prompt": "a", "chosen": "a", "rejected": "b"}
    pair |= {"score_chosen": 1.0, "score_rejected": 0.5}
    single = {"prompt": "a", "response": "b", "score": 2.0}
    with (folder / "samples.jsonl").open("a") as file:
        for step, sample in itertools.product((0, 3), (pair, single)):
            file.write(json.dumps({"step": step} | sample) + "\n")
    return folder


def damage(folder, draw):
    """One accident to one file; returns what happened."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name[0] != ".")
    texts = [file for file in files if file.suffix in (".json", ".jsonl", ".yaml")]
    texts += [file for file in files if file.name == "metadata"]
    file = draw.choice(files if draw.random() < 0.3 else texts)
    content = file.read_bytes()
    kind = draw.choice(["odd"] * 9 * (file in texts) + ["hurt"] * 5 + ["gone", "folder", "whole"])
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "whole":
        file.write_bytes(draw.choice(PIECES))
    elif kind == "hurt":
        file.write_bytes(hurt(content, draw))
    elif kind == "odd":
        with contextlib.suppress(ValueError):
            if file.name == "metadata":  # somebody who changes it changes the checksum too
                content = with_odd_value(json.loads(content)["record"].encode(), "record", draw)
                digest = hashlib.sha256(content).hexdigest()
                content = json.dumps({"record": content.decode(), "sha256": digest}).encode()
            else:
                content = with_odd_value(content, file.name, draw)
        file.write_bytes(content)
    return f"{file.relative_to(folder)}: {kind}"


def report(run, tmp_path):
    page.write([run], tmp_path / "page.html")


def exports(run, tmp_path):
    export(run, tmp_path / "copy")


def resume(run, tmp_path):
    config = RunConfig(output_dir=str(run), checkpoint_interval=3, resume=True)
    run_loop(config, num_steps=4, scores=[float(n) for n in range(5)])


def evaluates(run, tmp_path):
    (tmp_path / "pairs.json").write_text(
        json.dumps([{"prompt": "a", "chosen": "a", "rejected": "b"}])
    )
    config = evaluate.Config(preferences=(str(tmp_path / "pairs.json"),), device="cpu")
    evaluate.run(run, config)


ACTS = [report, exports, resume, evaluates]


def copied(whole, run):
    """A copy of the run, which says of itself that it lies there."""
    shutil.copytree(whole, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(whole), str(run)))
    return run


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_what_is_whole_works(act, whole, tmp_path):
    act(copied(whole, tmp_path / "run"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    "seeds",
    [
        range(4),
        pytest.param(range(4, 36), marks=pytest.mark.slow),
        pytest.param(range(36, 250), marks=pytest.mark.soak),
    ],
    ids=["few", "many", "more"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_run_ends_in_a_result_or_a_sentence(act, seeds, whole, tmp_path):
    wrong = []
    for seed in seeds:
        draw = random.Random(f"{act.__name__} {seed}")
        run = copied(whole, tmp_path / "run")
        accident = damage(run, draw)
        start = time.process_time()
        try:
            with contextlib.suppress(UserError, TrainingFault):
                act(run, tmp_path)
        except Exception as error:
            wrong.append(f"{seed}, {accident}: {type(error).__name__}: {error!s:.200}")
        seconds = time.process_time() - start
        if seconds > SECONDS:
            wrong.append(f"{seed}, {accident}: {seconds:.1f} s")
        for folder in (run, tmp_path / "copy"):
            shutil.rmtree(folder, ignore_errors=True)
    assert not wrong, "\n".join(wrong)


READERS = {
    "config.yaml": lambda path: reading.read_yaml(path, reading.Settings),
    "manifest.json": lambda path: reading.read_json(path, reading.Manifest),
    "metrics.jsonl": reading.read_rows,
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        slow(name, content) if (name, content) == ("config.yaml", DEEP[0]) else (name, content)
        for name in READERS
        for content in [*DEEP, BOMB, LOOP, b"a: " + b"1" * 200_000, b"a: !!int ''", b"1: 2"]
    ],
)
def test_what_is_too_deep_too_large_or_of_another_kind_is_refused_at_once(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content + b"\n")
    start = time.process_time()
    with pytest.raises(UserError, match=f"{name}[:,]"):
        READERS[name](path)
    assert time.process_time() - start < SECONDS


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is no file"):
        reading.read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("name", ["metrics", "timing", "samples", "alerts"])
def test_rows_of_another_kind_are_named_by_line_and_key(name, tmp_path):
    row = {"step": 1, "score": [], "message": 2}
    (tmp_path / f"{name}.jsonl").write_text('{"step": 0}\n' + json.dumps(row) + "\n")
    with pytest.raises(
        UserError, match=rf"{name}\.jsonl, line 2: (score|message): Expected .*, got "
    ):
        reading.read_rows(tmp_path / f"{name}.jsonl")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"git": None, "resumed": [{"threads": 1}, {}], "seed": True, "other": [1]}, ""),
        ({"git": {"commit": 3}}, "git.commit: Expected `str`, got `int`"),
        ({"git": 0}, "git: Expected `object | null`, got `int`"),
        ({"resumed": [{}, {"threads": True}]}, "resumed[1].threads: Expected `int | null`, got"),
        ({"resumed": {}}, "resumed: Expected `array`, got `object`"),
        ({"seed": "1"}, "seed: Expected `bool | float | null`, got `str`"),
        ({"versions": {"jax": 1}}, "versions[...]: Expected `str`, got `int`"),
    ],
)
def test_misfits_are_named_by_their_key(value, sentence):
    found = reading.misfit(value, reading.Manifest)
    assert found.startswith(sentence)
    assert bool(found) == bool(sentence)


def test_plain_values_end_at_64_bits_32_levels_and_many_parts(monkeypatch):
    monkeypatch.setattr(reading, "_MAX_PARTS", 100)
    nested = [0]
    for _ in range(31):
        nested = [nested]
    assert reading.is_plain({"a": [2**63 - 1, 1e308, None, True, "é"]})
    assert reading.is_plain(nested)
    assert reading.is_plain([0] * 99)
    for value in ([nested], [2**63], {1: 2}, ["\ud83d"], {"\ud83d": 1}, [0] * 100, [b""]):
        assert not reading.is_plain(value)

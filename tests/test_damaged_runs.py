"""Damaged run folders: report, export, resume and evaluate answer with a result or a sentence, soon."""

import contextlib
import json
import os
import random
import shutil
import time

import jax
import pytest
import yaml
from builders import run_loop

from rlhf_jax import models
from rlhf_jax.config import RunConfig
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.evaluation import evaluate
from rlhf_jax.models import lora
from rlhf_jax.report import page
from rlhf_jax.report.export import export
from rlhf_jax.runs import reading

SECONDS = 5
NAN, INF = float("nan"), float("inf")
ODD = [
    None,
    True,
    -1,
    0,
    3,
    2**31,
    2**63,
    10**30,
    10**400,
    1e308,
    -1e308,
    5e-324,
    NAN,
    INF,
    "",
    "2",
]
ODD += ["NaN", "{prompt", "\x1b[2J", "\ud83d", [], [0], [[]], {}, {"a": {"b": [None]}}, {"": ""}]
DEEP = [b"[" * 3000, b'{"a":' * 3000, b"[" * 400 + b"]" * 400, b"- " * 500]
BOMB = b"a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + b"".join(
    b"%c: &%c [%s]\n" % (now, now, b", ".join([b"*%c" % (now - 1)] * 9)) for now in range(98, 108)
)
LOOP = b"a: &a {b: *a}\nc: &c [*c]\n"
PIECES = [b"", b"\0", b'"', b"{", b"}", b"[", b"\n", b"\xff", b"NaN", b"9" * 5000, b"1e999", b"\r"]
PIECES += [
    b'{"step": 1e5}\n',
    b'{"step": 99999999999999999999}\n',
    b"!!int ''\n",
    b"? [1]\n",
    b"&a [*a]",
]
PIECES += [b"!!timestamp 2020-99-99", b"2020-01-01: 2020-01-01\n", *DEEP, BOMB, LOOP]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a reward model's folder, checkpoints and every file that a run may hold."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = RunConfig(output_dir=str(folder), checkpoint_interval=3)
    run_loop(config, num_steps=3, scores=[float(n) for n in range(4)])
    model = models.build(models.LlamaConfig(6, 8, 4, 1, 2, 4, tie_embeddings=True))
    params = model.init(jax.random.key(0))
    models.save(folder / "model", model, models.add_head(jax.random.key(1), params, "score"))
    tokenizers.characters("ab").save(folder / "model")
    lora.save(folder / "adapter", params, lora.init(jax.random.key(2), params, 2))
    alert = {"step": 2, "rule": "loss > 0", "message": "loss is 1"}
    (folder / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    figure = {
        "category": "preferences",
        "metric": "accuracy",
        "value": 0.5,
        "low": 0.1,
        "high": 0.9,
    }
    figure |= {"n": 3, "unit": "pairs", "note": ""}
    (folder / "evaluation.json").write_text(json.dumps({"rows": [figure]}))
    pair = {
        "prompt": "a",
        "chosen": "a",
        "rejected": "b",
        "score_chosen": 1.0,
        "score_rejected": 0.5,
    }
    with (folder / "samples.jsonl").open("a") as file:
        for step in (0, 3):
            file.write(json.dumps({"step": step, **pair}) + "\n")
            file.write(
                json.dumps({"step": step, "prompt": "a", "response": "b", "score": 2.0}) + "\n"
            )
    return folder


def with_odd_value(content, name, draw):
    """The JSON or YAML with one value, wherever in it, of another kind."""
    lines = content.decode().splitlines() if name.endswith(".jsonl") else [content.decode()]
    at = draw.randrange(len(lines))
    value = yaml.safe_load(lines[at]) if name.endswith(".yaml") else json.loads(lines[at])
    inner = value
    while isinstance(inner, dict | list) and inner:
        key = draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if not inner[key] or not isinstance(inner[key], dict | list) or draw.random() < 0.4:
            inner[key] = draw.choice(ODD)
            break
        inner = inner[key]
    lines[at] = json.dumps(value, default=str)
    return "\n".join(lines).encode() + b"\n"


def damage(folder, draw):
    """One accident to one file; returns what happened."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name[0] != ".")
    texts = [file for file in files if file.suffix in (".json", ".jsonl", ".yaml")]
    file = draw.choice(files if draw.random() < 0.3 else texts)
    content = file.read_bytes()
    at = draw.randrange(len(content) + 1)
    to = min(len(content), at + draw.randrange(200))
    kinds = ["cut", "flip", "put", "replace", "drop", "empty", "gone", "folder", "whole"]
    kind = draw.choice(["odd"] * 9 * (file in texts) + kinds)
    match kind:
        case "odd":
            with contextlib.suppress(ValueError):
                content = with_odd_value(content, file.name, draw)
        case "cut":
            content = content[:at]
        case "flip":
            content = (
                content[:at]
                + bytes(b ^ 1 << draw.randrange(8) for b in content[at : at + 1])
                + content[at + 1 :]
            )
        case "put":
            content = content[:at] + draw.choice(PIECES) + content[at:]
        case "replace":
            content = content[:at] + draw.choice(PIECES) + content[to:]
        case "drop":
            content = content[:at] + content[to:]
        case "empty":
            content = b""
        case "whole":
            content = draw.choice(PIECES)
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind != "gone":
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


@pytest.mark.parametrize("act", ACTS)
def test_what_is_whole_works(act, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    if act is resume:  # the run of the fixture lies elsewhere
        config = (tmp_path / "run" / "config.yaml").read_text()
        (tmp_path / "run" / "config.yaml").write_text(
            config.replace(str(whole), str(tmp_path / "run"))
        )
    act(tmp_path / "run", tmp_path)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    "seeds", [range(15), pytest.param(range(15, 250), marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_run_ends_in_a_result_or_a_sentence(act, seeds, whole, tmp_path):
    wrong = []
    for seed in seeds:
        draw = random.Random(f"{act.__name__} {seed}")
        run = tmp_path / "run"
        shutil.copytree(whole, run)
        if act is resume:
            config = (run / "config.yaml").read_text()
            (run / "config.yaml").write_text(config.replace(str(whole), str(run)))
        accident = damage(run, draw)
        start = time.perf_counter()
        try:
            with contextlib.suppress(UserError, TrainingFault):
                act(run, tmp_path)
        except Exception as error:
            wrong.append(f"{seed}, {accident}: {type(error).__name__}: {error!s:.200}")
        seconds = time.perf_counter() - start
        if seconds > SECONDS:
            wrong.append(f"{seed}, {accident}: {seconds:.1f} s")
        for folder in (run, tmp_path / "copy"):
            shutil.rmtree(folder, ignore_errors=True)
    assert not wrong, "\n".join(wrong)


READERS = {
    "config.yaml": lambda path: reading.read_yaml(path, reading.SETTINGS),
    "manifest.json": lambda path: reading.read_json(path, reading.MANIFEST),
    "metrics.jsonl": reading.read_rows,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "content", [*DEEP, BOMB, LOOP, b"a: " + b"1" * 200_000, b"a: !!int ''", b"1: 2"]
)
def test_what_is_too_deep_too_large_or_of_another_kind_is_refused_at_once(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content + b"\n")
    start = time.perf_counter()
    with pytest.raises(UserError, match=f"{name}[:,]"):
        READERS[name](path)
    assert time.perf_counter() - start < SECONDS


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is no file"):
        reading.read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("name", ["metrics", "timing", "samples", "alerts"])
def test_rows_of_another_kind_are_named_by_line_and_key(name, tmp_path):
    row = {"step": 1, "score": [], "message": 2}
    (tmp_path / f"{name}.jsonl").write_text('{"step": 0}\n' + json.dumps(row) + "\n")
    with pytest.raises(
        UserError, match=rf"{name}\.jsonl, line 2: (score|message) is .*, expected a"
    ):
        reading.read_rows(tmp_path / f"{name}.jsonl")


GIT = {"git": ({"commit": str}, None), "starts": [{str: int}], "rate": reading.NUMBER}


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"git": None, "starts": [{"a": 1}, {}], "rate": True, "other": [1]}, ""),
        ({"git": {"commit": 3}}, "git.commit is 3, expected a text"),
        ({"git": 0}, "git is 0, expected a mapping of keys"),
        ({"starts": [{}, {"a": True}]}, "starts[1].a is True, expected a number"),
        ({"starts": {}}, "starts is {}, expected a list"),
        ({"rate": None}, "rate is None, expected a number"),
    ],
)
def test_misfits_are_named_by_their_key(value, sentence):
    assert reading.misfit(value, GIT) == sentence


def test_plain_values_end_at_64_bits_32_levels_and_a_million_parts():
    nested = [0]
    for _ in range(31):
        nested = [nested]
    assert reading.is_plain({"a": [2**63 - 1, 1e308, None, True, "é"]})
    assert reading.is_plain(nested)
    assert reading.is_plain([0] * 900_000)
    for value in ([nested], [2**63], {1: 2}, ["\ud83d"], {"\ud83d": 1}, [0] * 1_000_001, [b""]):
        assert not reading.is_plain(value)

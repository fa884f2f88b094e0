"""Wrong input is a sentence: one table of mistakes, each made as a user makes it, with what the
script must answer.

Below it, what is right though it looks wrong, and what is left out and counted.
"""

import json
import sys
import tempfile
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from builders import initial_params
from safetensors.numpy import save_file

from rlhf_jax import cli, models
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError

ROW = '{"prompt": "ab", "response": "ba"}'
PAIR = {"prompt": "ab", "chosen": "a", "rejected": "b"}
EMPTY = '{"prompt": "ab", "response": ""}'
SAME = PAIR | {"rejected": "a"}
SMALL = {
    "network": {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "max_length": 8},
    "tokenizer": {"kind": "characters"},
}


def write(**files):
    """Makes files of the working folder; a dot in a name is written as two underscores."""

    def make():
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode("utf-8")
            Path(name.replace("__", ".")).write_bytes(data)

    return make


@cache
def model_files(alphabet, head):
    """name -> bytes of the folder of a model with a vocabulary of 4."""
    model = models.build(
        models.GPT2Config(vocab_size=4, max_length=8, hidden_size=4, num_layers=1, num_heads=1)
    )
    params = initial_params(model)
    with tempfile.TemporaryDirectory() as folder:
        models.save(
            folder, model, models.add_head(jax.random.key(1), params, head) if head else params
        )
        tokenizers.characters(alphabet).save(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def model_folder(name="model", alphabet="ab", head=None):
    Path(name).mkdir()
    for file, content in model_files(alphabet, head).items():
        (Path(name) / file).write_bytes(content)


def yaml(content):
    return write(bad__yaml=content)


def model(change=None, **made):
    """A model's folder after ``change(folder)``, and a row of data."""

    def make():
        model_folder(**made)
        if change is not None:
            change(Path("model"))
        write(data__json=f"[{ROW}]")()

    return make


def without(name):
    return lambda folder: (folder / name).unlink()


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def settings(content):
    return put("tokenizer_config.json", content)


def edit(**changes):
    def change(folder):
        keys = json.loads((folder / "config.json").read_text("utf-8")) | changes
        (folder / "config.json").write_text(json.dumps(keys), encoding="utf-8")

    return change


def long_name_of_a_shard(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"wte.weight": "%s"}}' % ("s" * 5000)
    )


def two_models():
    model_folder("policy")
    model_folder("other", alphabet="xy", head="score")
    write(prompts__txt="ab\n")()


def token_ids():
    model_folder()
    write(data__json='[{"query": [2], "sample0": [3], "sample1": [99], "best": 0}]')()


def run(stage, data="data.json", **settings):
    """The stage and its settings: as a file they are read in a tenth of the time of flags."""
    return (stage, {"data": [data], **settings})


def prompts(stage="ppo", max_new_tokens=4, batch_size=64, **settings):
    rl = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return run(stage, "prompts.txt", reward=["count:a"], rl=rl, **SMALL, **settings)


DATA = run("sft")
PAIRS = run("reward_model")
MODEL = run("sft", model="model")
PROMPTS = prompts()
CONFIG = ("ppo", "--config", "bad.yaml")

# What is wrong, how it is made, how the script is called, what it says. More of data: test_files
# and test_formats.
LONG = '{"prompt": "abab", "response": "abab"}'
BATCH = run("sft", sft={"batch_size": 30, "num_microbatches": 3})
GROUPS = prompts("grpo", batch_size=16, grpo={"group_size": 6})
RL = {"max_new_tokens": 4}
TWO_MODELS = run("ppo", "prompts.txt", model="policy", reward=["other"], rl=RL)
ONE_ROW = write(data__json=f"[{ROW}]")
MISTAKES = [
    ("no data", write(), ("sft",), "no data: give --data FILE"),
    ("empty file", write(data__json=""), DATA, "data.json: holds no rows"),
    (
        "misspelt key",
        write(data__json='[{"prompt": "a", "respnse": "b"}]'),
        DATA,
        "'response' by 'respns",
    ),
    (
        "empty answers",
        write(data__json=(f"[{ROW}, {EMPTY}, {EMPTY}]")),
        DATA,
        "2 rows: 'response' is empty",
    ),
    (
        "column that no row has",
        write(data__json='[{"q": "a"}]'),
        run("sft", columns=["prompt=qq"]),
        "no row has 'qq'",
    ),
    (
        "only identical pairs",
        write(data__json=json.dumps([SAME])),
        PAIRS,
        "no usable row: 0 rows, 1 dropped (chosen",
    ),
    (
        "long prompt",
        write(prompts__txt="ab\nabababab\n"),
        PROMPTS,
        "line 2: the prompt has 8 tokens, more than the 4",
    ),
    (
        "long text",
        write(data__json=LONG),
        run("sft", **SMALL),
        "or give --text.too-long",
    ),
    (
        "full context",
        write(prompts__txt="a"),
        prompts(max_new_tokens=8),
        "leaves no room f",
    ),
    (
        "token ids of another tokenizer",
        token_ids,
        run("reward_model", model="model"),
        "row 1: holds the token id 99, but th",
    ),
    # Settings
    ("YAML without end", yaml("data: [a"), CONFIG, "bad.yaml, line 1: not valid YAML in UTF-8"),
    ("no character", yaml('model: "\\UFFFFFFFF"'), CONFIG, "bad.yaml: not valid YAML in UTF-8"),
    (
        "wrong tag",
        yaml("seed: !!bool maybe"),
        CONFIG,
        "bad.yaml, line 1: seed must be an int, found maybe",
    ),
    (
        "a call in YAML",
        yaml("model: !!python/object/apply:os.getcwd []"),
        CONFIG,
        "bad.yaml, line 1: model must",
    ),
    ("missing YAML", write(), CONFIG, "bad.yaml: cannot be read: "),
    ("batch", ONE_ROW, BATCH, "use 24 or 36"),
    (
        "groups",
        write(prompts__txt="a"),
        GROUPS,
        "16 does not divide by 6 ",
    ),
    # Models
    (
        "no model",
        ONE_ROW,
        run("sft", model="a/b/c"),
        "a/b/c: no such folder",
    ),
    (
        "no weights",
        model(without("model.safetensors")),
        MODEL,
        "model/model.safetensors: no such file",
    ),
    ("endless size", model(edit(n_embd=10**30)), MODEL, "model/config.json: n_embd is 1000000000"),
    (
        "cut weights",
        model(put("model.safetensors", b"x" * 9)),
        MODEL,
        "model.safetensors: cannot be read as safet",
    ),
    (
        "long name of a shard",
        model(long_name_of_a_shard),
        MODEL,
        "is not the name of a file",
    ),
    (
        "large tokenizer",
        model(alphabet="abcd"),
        MODEL,
        "6 entries but the model only 4",
    ),
    (
        "half of a pair",
        model(settings(b'{"eos_token": "\\ud83d"}')),
        MODEL,
        "a string holds half of a surrogate pair,",
    ),
    (
        "Latin-1 template",
        model(put("chat_template.jinja", b"caf\xe9")),
        MODEL,
        "chat_template.jinja: cannot be read: 'utf-8' codec",
    ),
]


def call(argv, monkeypatch):
    """The command's exit code."""
    stage, *flags = argv
    if flags and isinstance(flags[0], dict):
        Path("run.yaml").write_text(json.dumps(flags[0]))  # JSON is YAML
        flags = ["--config", "run.yaml"]
    command = [stage.replace("_", "-"), *flags]
    monkeypatch.setattr(sys, "argv", ["rlhf-jax", *command])
    with pytest.raises(SystemExit) as ended:
        cli.run_script(lambda: cli.run(command))
    return ended.value.code


# These start a model first.
SLOW = {
    "long prompt",
    "long text",
    "full context",
    "token ids of another tokenizer",
}


@pytest.mark.parametrize(
    ("make", "argv", "message"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, *case in MISTAKES
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(
    make, argv, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    make()
    assert call(argv, monkeypatch) == 2
    said = capsys.readouterr().err
    assert message in said
    assert not (tmp_path / "runs" / argv[0] / "checkpoints").exists()


def test_a_byte_order_mark_is_no_part_of_any_text(tmp_path, monkeypatch):
    """Editors on Windows write one in front of UTF-8."""
    monkeypatch.chdir(tmp_path)
    model_folder()
    for file in (Path("model/config.json"), Path("model/tokenizer_config.json")):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert models.load("model")[0].config.vocab_size == 4
    assert tokenizers.load_tokenizer("model").vocab_size == 4


@pytest.mark.parametrize(
    ("shape", "message"), [((0, 4), "so no rank"), ((1, 3), r"expected \[1, 4\]")]
)
def test_adapters_that_none_wrote(shape, message, tmp_path):
    params = initial_params(models.build(models.GPT2Config(4, 8, 4, 1, 1)))
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "lora_alpha": 1}', encoding="utf-8"
    )
    module = "base_model.model.transformer.h.0.attn.c_attn"
    tensors = {
        f"{module}.lora_{name}.weight": np.ones(size, np.float32)
        for name, size in {"A": shape, "B": (12, 1)}.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"attn.c_attn.lora_A.weight has shape .*, {message}"):
        models.lora.load(tmp_path, params)


@pytest.mark.slow
def test_a_reward_model_that_cannot_spell_the_texts(tmp_path, monkeypatch, capsys):
    """It reads the longest prompt before the run begins."""
    monkeypatch.chdir(tmp_path)
    two_models()
    assert call(TWO_MODELS, monkeypatch) == 2
    said = capsys.readouterr().err
    assert "other: the longest prompt: the tokenizer's alphabet lacks 'a'" in said
    assert not [*Path("runs/ppo").glob("checkpoints/[0-9]*")]

"""Mistakes that people from outside made: what each command says to them. The next mistake is a
line in the table.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from builders import initial_params

from rlhf_jax import advantages, cli, models, rewards
from rlhf_jax.data import tokenizers
from rlhf_jax.report import page

# Of files, which are read in a tenth of the time of flags.
SMALL = "--config small.yaml"
PPO = f"ppo {SMALL}"


class Mistake(NamedTuple):
    """A command of ``rlhf-jax``, or a call that prints or raises; the folder also holds the files
    of FILES.
    """

    command: str | Callable[[], Any]
    says: str
    files: dict[str, Any] | None = (
        None  # name -> text, bytes, a value to be written as JSON, or a function that makes it
    )
    code: int = 2  # with which a command exits
    never: tuple[str, ...] = ("Traceback", "no problems")


def checked(content: Any, says: str, code: int = 2, name: str = "a.json") -> Mistake:
    """A file that ``data check`` warns of (code 0) or calls unusable."""
    return Mistake(f"data check {name}", says, {name: content}, code)


def model(head: str | None = None) -> Callable[[Path], None]:
    """Makes a folder with a GPT-2 of one layer; a reward model has the head "score"."""

    def make(folder: Path) -> None:
        built = models.build(
            models.GPT2Config(
                vocab_size=30, max_length=32, hidden_size=8, num_layers=1, num_heads=1
            )
        )
        params = initial_params(built)
        models.save(
            folder, built, models.add_head(jax.random.key(1), params, head) if head else params
        )
        tokenizers.characters("abcdefghijklmnopqrstuvwxyz ").save(folder)

    return make


def rows(number: int = 2, **row: Any) -> list[dict[str, Any]]:
    return [row] * number


FILES: dict[str, Any] = {
    "small.yaml": {
        "network": {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "max_length": 64},
        "tokenizer": {"kind": "characters"},
        "output_dir": "run",
        "rl": {"max_new_tokens": 4},
        "data": ["prompts.json"],
    },
    "texts.json": [{"prompt": f"say {c}", "response": f"{c}{c}"} for c in "abcdefgh"],
    "prompts.json": [{"prompt": f"say {c}"} for c in "abcdefgh"],
    "mine.py": "def letters(prompts, responses):\n    return [0.0] * len(prompts)\n",
}
NAME = "\u202enosj.\x1b"  # of a data file
TOOLS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "tool_calls": [{}]},
]
HH = {
    "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c",
    "rejected": "\n\nHuman: a\n\nAssistant: d",
}
MARK = '{"prompt": "a", "response": "b"}\n\ufeff{"prompt": "c", "response": "d"}\n'

TABLE = [
    # Commands, flags and YAML
    Mistake("docter", "no command 'docter'; did you mean doctor?"),
    Mistake(
        "ppo --config a.yaml",
        "a.yaml, line 1: unknown key rl.kl_tagret",
        {"a.yaml": "rl: {kl_tagret: 1}"},
    ),
    Mistake(
        "sft --config nothing.yaml",
        "nothing.yaml: cannot be read: No such file",
    ),
    # Keys of rows
    checked(
        rows(prompt="a", choosen="x", rejected="y"),
        "the key 'choosen' is not read; did you mean 'chosen'?",
        0,
    ),
    checked(
        rows(prompt="a", respnse="x"), "the key 'respnse' is not read; did you mean 'response'?", 0
    ),
    checked(
        rows(prompt="a", output="x"),
        "the key 'output' is not read; did you mean 'response'?",
        0,
    ),
    checked(rows(prompt="a", chosen="x"), "the key 'chosen' is not read", 0),
    checked(
        "prompt, response\na,b\n",
        "the key ' response' is not read; did you mean 'response'?",
        0,
        "a.csv",
    ),
    checked(
        [{"messages": TOOLS}], "the plain template writes no tool_calls; name a model whose own t"
    ),
    checked([HH], "'chosen' ends with a human turn, not with an answer"),
    checked(rows(chosen="a", rejected="b"), "must be a dialogue of turns"),
    Mistake(
        f"sft {SMALL}",
        "8 rows: expected keys prompt, response, found prompt; --columns OURS=THEIRS reads "
        "other keys (prompts.json, row 1",
    ),
    Mistake(
        f"sft {SMALL} own.yaml",
        "no row has 'ansr'; did you mean answer?",
        {"a.json": rows(answer="b"), "own.yaml": "data: [a.json]\ncolumns: [response=ansr]"},
    ),
    Mistake(
        f"dpo {SMALL} own.yaml",
        "'rejected' is empty",
        {"a.json": rows(prompt="a", chosen="b", rejected=""), "own.yaml": "data: [a.json]"},
    ),
    # Files
    Mistake(
        f"sft {SMALL} own.yaml",
        "text.json: no such file; did you mean texts.json?",
        {"own.yaml": "data: [text.json]"},
    ),
    checked(
        "prompt;response\na;b\n",
        "one column 'prompt;response'; separate columns by commas",
        name="a.csv",
    ),
    checked("prompt,response\na,b\n,\n", "a.csv, line 3: 'prompt' is empty", name="a.csv"),
    checked(
        '{"prompt": "a"}\n',
        "expected a text, found a JSON object; call the file .jsonl",
        name="a.txt",
    ),
    checked({"data": []}, "line 1: expected keys prompt, response, found data"),
    checked(
        "version https://git-lfs.github.com/spec/v1\n",
        "JSON list or JSON lines, found 'version https://git-'",
    ),
    checked(MARK, "a.jsonl, line 2: not valid JSON", name="a.jsonl"),
    checked(b'{"prompt": "\xff"}', "a.jsonl, line 1: byte 0xff is not UTF-8", name="a.jsonl"),
    checked('[{"prompt": "a"', "the text ends there"),
    # Rewards and models
    Mistake(PPO, "no reward: give --reward a reward model's folder"),
    Mistake(
        f"{PPO} own.yaml",
        "--reward cuont:e: no such reward and no such folder; did you mean count:e?",
        {"own.yaml": "reward: ['cuont:e']"},
    ),
    Mistake(
        f"{PPO} own.yaml",
        "mine.py has no function lettres; did you mean letters?",
        {"own.yaml": "reward: ['mine.py:lettres']"},
    ),
    Mistake(
        f"{PPO} own.yaml",
        "policy: this model has no score head",
        {"policy": model(), "own.yaml": "reward: [policy]"},
    ),
    Mistake(
        "sft --config own.yaml",
        "--model rm: this is a reward model",
        {"rm": model("score"), "own.yaml": "model: rm\ndata: [texts.json]"},
    ),
    Mistake(
        f"{PPO} own.yaml",
        "a.txt: has no words",
        {"a.txt": "\n", "own.yaml": "reward: [length]\nsafety: {words: [a.txt]}"},
    ),
    Mistake(lambda: rewards.ensemble([], "mean"), "an ensemble needs at least one reward function"),
    Mistake(
        lambda: jax.jit(advantages.group_normalized)(np.float32([[np.nan, 1]])).tolist(),
        "[nan, nan]",
    ),  # not 0 and 0
    # Run folders and reports
    Mistake(
        f"{PPO} own.yaml",
        "run holds files already; give --resume",
        {"run/notes.txt": "mine", "own.yaml": "reward: [length]"},
    ),
    Mistake(
        "report texts.json",
        "this folder holds no run: it has no manifest.json; give the folder of a run",
    ),
    Mistake(
        "evaluate rm --prompts prompts.json",
        "this is a reward model, which writes no text",
        {"rm": model("score")},
    ),
    Mistake("export run exported", "error: run: no such folder"),
    Mistake("report run", "error: run: no such folder"),
    Mistake("verify run", "error: run: no such folder"),
    Mistake("evaluate ./run --prompts p.txt", "error: ./run: no such folder"),
    Mistake(
        lambda: page.render(NAME, [page.Facts("", {NAME: 1})]),
        "⟨U+202E⟩nosj.␛",
        never=("\u202e", "\x1b"),
    ),
]


@pytest.mark.parametrize("mistake", TABLE, ids=lambda mistake: mistake.says[:50])
def test_a_mistake_is_named(mistake, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in (FILES | (mistake.files or {})).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(Path(name))
        else:
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            Path(name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    if callable(mistake.command):
        try:
            print(mistake.command())
        except Exception as error:
            print(error)
    else:
        with pytest.raises(SystemExit) as ended:
            cli.run_script(lambda: cli.run(shlex.split(mistake.command)))
        assert ended.value.code == mistake.code
    printed = "".join(capsys.readouterr())
    assert mistake.says in printed
    assert not any(sentence in printed for sentence in mistake.never)

"""Mistakes that people from outside made: what each command says to them. The next mistake is a line in the table."""

import importlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from rlhf_jax import cli, models, rewards
from rlhf_jax.data import tokenizers
from rlhf_jax.report import page

SMALL = "--network.hidden-size 8 --network.num-layers 1 --network.num-heads 1 --network.max-length 64"
SMALL += " --tokenizer.kind characters --output-dir run"


class Mistake(NamedTuple):
    """A mistake is a command line, or a call that prints or raises; the folder also holds the files of FILES."""

    command: str | Callable[[], Any]
    says: str | tuple[str, ...]  # all of it is said
    files: dict[str, Any] | None = (
        None  # name -> text, bytes, a value to be written as JSON, or a function that makes it
    )
    code: int | None = 2  # with which a command exits
    never: tuple[str, ...] = ("Traceback",)


def model(head: str | None = None) -> Callable[[Path], None]:
    """Makes a folder with a GPT-2 of one layer; a reward model has the head "score"."""

    def make(folder: Path) -> None:
        built = models.build(models.GPT2Config(vocab_size=30, max_length=32, hidden_size=8, num_layers=1, num_heads=1))
        params = built.init(jax.random.key(0))
        models.save(folder, built, models.add_head(jax.random.key(1), params, head) if head else params)
        tokenizers.characters("abcdefghijklmnopqrstuvwxyz ").save(folder)

    return make


PAIR, SAME = {"prompt": "say a", "chosen": "aa", "rejected": "no"}, {"rejected": "aa"}
FILES: dict[str, Any] = {
    "texts.json": [{"prompt": f"say {c}", "response": f"{c}{c}"} for c in "abcdefgh"],
    "prompts.json": [{"prompt": f"say {c}"} for c in "abcdefgh"],
    "mine.py": "def letters(prompts, responses):\n    return [0.0] * len(prompts)\n",
}
NAME = "\u202enosj.\x1b"  # of a data file
A_YAML = "rl: {kl_tagret: 1}"
PPO = f"ppo {SMALL} --rl.max-new-tokens 4 --data prompts.json"
TABLE = [
    # Commands, flags and YAML
    Mistake("rlhf-jax reprot run", ("no command 'reprot'", "report")),
    Mistake(
        "ppo --config a.yaml", "a.yaml, line 1: unknown key rl.kl_tagret; did you mean kl_target?", {"a.yaml": A_YAML}
    ),
    Mistake("sft --config nothing.yaml", "nothing.yaml: cannot be read (given by --config): No such file"),
    # Data files
    Mistake(f"sft {SMALL} --data text.json", "text.json: no such file; did you mean texts.json?"),
    Mistake(f"sft {SMALL} --data prompts.json", "prompts.json, row 1: expected keys prompt, response, found prompt"),
    Mistake(f"reward_model {SMALL} --data texts.json", "texts.json, row 1: expected keys prompt, chosen, rejected"),
    Mistake(f"sft {SMALL} --data a.jsonl", "a.jsonl, line 1: not valid JSON", {"a.jsonl": '{"prompt": "a"'}),
    Mistake(
        f"sft {SMALL} --data a.jsonl", "a.jsonl, line 1: byte 0xff is not UTF-8", {"a.jsonl": b'{"prompt": "\xff"}'}
    ),
    Mistake(f"dpo {SMALL} --data a.json", "1 dropped (chosen and rejected are identical)", {"a.json": [PAIR | SAME]}),
    # Rewards
    Mistake(PPO, "no reward: give --reward a reward model's folder"),
    Mistake(f"{PPO} --reward mine.py:lettres", "mine.py has no function lettres; did you mean letters?"),
    Mistake(f"{PPO} --reward policy", "policy: this model has no score head", {"policy": model()}),
    Mistake(f"{PPO} --reward rm", "the reward model's tokenizer is not the policy's", {"rm": model("score")}),
    Mistake(f"{PPO} --reward length --safety.words a.txt", "a.txt: has no words", {"a.txt": "\n"}),
    Mistake(lambda: rewards.ensemble([], "mean"), "an ensemble needs at least one reward function"),
    # Run folders and reports
    Mistake(f"{PPO} --reward length", "run holds files already; give --resume", {"run/notes.txt": "mine"}),
    Mistake("rlhf-jax report texts.json", "no run here, as there is no manifest.json; give the folder of a run"),
    Mistake("rlhf-jax export run exported", "run/model: no model here; give the folder of a finished run"),
    Mistake(lambda: page.render(NAME, [page.Facts("", {NAME: 1})]), "⟨U+202E⟩nosj.␛", never=("\u202e", "\x1b")),
]


@pytest.mark.parametrize("mistake", TABLE, ids=lambda mistake: str(mistake.says)[:50])
def test_a_mistake_is_named(mistake, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in (FILES | (mistake.files or {})).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(Path(name))
        else:
            text = content if isinstance(content, str | bytes) else json.dumps(content, indent=0)
            Path(name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    if callable(mistake.command):
        try:
            print(mistake.command())
        except Exception as error:
            print(error)
    else:
        program, *words = shlex.split(mistake.command)
        monkeypatch.setattr(sys, "argv", [program, *words])
        main = (lambda: cli.run(words)) if program == "rlhf-jax" else importlib.import_module(program).main
        with pytest.raises(SystemExit) as ended:
            cli.run_script(main)
        assert ended.value.code == mistake.code
    printed = "".join(capsys.readouterr())
    for sentence in (mistake.says,) if isinstance(mistake.says, str) else mistake.says:
        assert sentence in printed
    assert not any(sentence in printed for sentence in mistake.never)

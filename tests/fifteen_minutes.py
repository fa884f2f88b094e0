"""The first fifteen minutes of a newcomer, as one script.

    python tests/fifteen_minutes.py FOLDER

It works in FOLDER, which is empty, with the command ``rlhf-jax`` that is on PATH: ``.ci/run`` puts
an environment there that has the built package alone. The commands are those of README's first
screen, those of docs/your-preferences.md in their order, whose outputs must be what the page
shows, and at last ``report`` and ``export``; the docs' pictures are drawn from the folder, and must
say what the committed ones say. The Python that runs this script needs torch and transformers,
which read the exported folder.

It is no test of pytest: there the package is the checkout's, and files of the checkout are at hand.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pages

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "your-preferences.md"
QUESTIONS = """\
i want to know what the king whispered.
/reset
how do i flood the school?
/score
/quit
"""
FIRST = {
    "rlhf-jax quickstart": "",
    "rlhf-jax chat runs/quickstart/ppo --compare runs/quickstart/sft --temperature 0": QUESTIONS,
    "rlhf-jax generate runs/quickstart/ppo --prompts runs/quickstart/data/heldout_prompts.json "
    "--out answers.jsonl --n 2 --reward runs/quickstart/reward_model": "",
}
PUBLISHED = ROOT / "docs" / "results" / "quickstart.json"  # what docs/quickstart.md shows of seed 0
TOLERANCES = {
    "reward model's accuracy": 0.06,
    "PPO beats SFT": 0.12,
    "lowest KL of the last 10": 1.0,
    "highest KL of the last 10": 1.0,
    "rubric, SFT": 0.06,
    "rubric, PPO": 0.08,
}
"""How far a run may be from them on another kind of CPU or with another JAX: about twice what three
runs of seed 0 differed by (.02, .04, KL .7, rubric .01)."""
CHECKS = {"reward_model_accuracy", "ppo_beats_sft", "kl_in_band", "kl_coef_moved"}
LAST = {
    "rlhf-jax report runs/quickstart/ppo runs/mine": "",
    "rlhf-jax export runs/mine my-model": "",
}


def run(command: str, typed: str, folder: Path) -> str:
    """What a command prints; the script ends if it fails."""
    start = time.monotonic()
    print(f"$ {command}", flush=True)
    done = subprocess.run(
        shlex.split(command), input=typed, cwd=folder, capture_output=True, text=True, check=False
    )
    print(f"  {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def without_numbers(text: str) -> str:
    """The text with N for each number: which answers are equal depends on the kind of CPU."""
    return re.sub(r"\d+", "N", text.strip())


def ends_as_shown(said: str, shown: str) -> bool:
    """Whether an output ends with what the page shows, up to its numbers."""
    return without_numbers(said).endswith(without_numbers(shown))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def answer_of(model_folder: Path) -> str:
    """What transformers answers with the exported model, through its chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    asked = [{"role": "user", "content": "What is a cat?"}]
    how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    inputs = tokenizer.apply_chat_template(asked, **how)
    outputs = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    response = outputs[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(response, skip_special_tokens=True)


def check_numbers(summary: dict) -> None:
    """The numbers on the page are those of the quickstart today."""
    rows = json.loads(PUBLISHED.read_text("utf-8"))["rows"]
    published = {row["metric"]: row["value"] for row in rows if row["seed"] == 0}
    last = summary["kl"]["last_iterations"]
    own = {
        "reward model's accuracy": summary["reward_model"]["accuracy"],
        "PPO beats SFT": summary["win_rate"],
        "lowest KL of the last 10": min(last),
        "highest KL of the last 10": max(last),
        "rubric, SFT": summary["rubric"]["sft"],
        "rubric, PPO": summary["rubric"]["ppo"],
    }
    for metric, within in TOLERANCES.items():
        there = published[metric]
        far = f"{metric}: {own[metric]}, on the page {there}; write {PUBLISHED.name} anew"
        assert abs(own[metric] - there) <= within, far


def check_quickstart(folder: Path, said: str) -> None:
    """What the quickstart must have said and left in its folder."""
    from transformers import AutoTokenizer

    lines = said.splitlines()
    assert lines.count("cpu: 1 x cpu, float32") == 1, said
    assert said.count("compiling; ") == 3, said
    assert "gates" not in said
    assert any(re.fullmatch("The report: .*/report[.]html", line) for line in lines), said
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["heldout_prompts"] >= 100
    assert summary["checks"] == dict.fromkeys(CHECKS, True)
    assert summary["critic"]["lowest_explained_variance_of_last_half"] > 0
    assert summary["critic"]["largest_ratio"] < 5
    if summary["seed"] == 0:
        check_numbers(summary)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")  # it knows how the run asked
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "Human: Hi\nAssistant: "
    page = (folder / "report.html").read_text("utf-8")
    assert page.count("<svg") >= 6
    elsewhere = ("http://", "https://", "<script ", " src=", "<link")
    assert not any(reference in page for reference in elsewhere)


def check(folder: Path, said: dict[str, str]) -> None:
    """What the commands must have left and said."""
    check_quickstart(folder / "runs" / "quickstart", said["rlhf-jax quickstart"])
    talk = said[list(FIRST)[1]]
    for label in "AB":
        answers = re.findall(rf"^{label}: (.+)$", talk, re.MULTILINE)
        assert len(answers) == 3, talk
        assert answers[-1].startswith("score "), talk
    rows = rows_of(folder / "answers.jsonl")
    assert len(rows) >= 100
    assert all(row["prompt"] and "score" in row for row in rows)
    assert sum(bool(row["response"]) for row in rows) > len(rows) / 2
    for command, shown in pages.outputs(PAGE).items():
        assert ends_as_shown(said[command], shown), f"{command}\n{said[command]}\nnot\n{shown}"
    judged = rows_of(folder / "preferences.jsonl")
    assert len(judged) >= 8
    assert all({"chosen", "ranks"} & set(row) for row in judged)
    for name in ("my-reward", "mine", "dpo"):
        assert (folder / "runs" / name / "model" / "model.safetensors").is_file(), name
    assert "<svg" in (folder / "report.html").read_text("utf-8")
    assert (folder / "my-model" / "README.md").is_file()


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir()
    os.environ.pop("PYTHONPATH", None)
    os.environ["JAX_PLATFORMS"] = "cpu"
    start = time.monotonic()
    commands = FIRST | pages.typed(PAGE) | LAST
    said = {command: run(command, typed, folder) for command, typed in commands.items()}
    for command in said["rlhf-jax quickstart"].splitlines()[-3:-1]:  # as it says itself
        run(command, "", folder)
    check(folder, said)
    pictures = ["docs/pictures.py", str(folder), str(folder / "pictures")]
    subprocess.run([sys.executable, *pictures], cwd=ROOT, check=True)
    answer = answer_of(folder / "my-model")
    assert answer.strip(), "transformers gives an empty answer"
    print(f"transformers: {answer!r}\nall of it: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

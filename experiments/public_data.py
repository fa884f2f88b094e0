"""Public data in the forms of docs/assistant.md: the three files of ``rlhf-jax pipeline``, two for
``rlhf-jax evaluate``, and GSM8K's model solutions with targets.

    python experiments/public_data.py published data

``published`` has the data sets as they are published, under the names below.
"""

import gzip
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TASKS = "self_instruct/seed_tasks.jsonl"
PROBLEMS = "gsm8k/train_first2000.jsonl"
DIALOGUES = "hh_rlhf/harmless-base-test.dev.jsonl.gz"
PREFERENCES = "hhh/hhh_alignment.dev.jsonl"
SOLUTIONS = "gsm8k/example_model_solutions_first660.jsonl"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def lines(path: Path) -> list[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def save(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write(source: Path, folder: Path) -> None:
    """The pipeline's three files and two for the evaluation, from the published files in
    ``source``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    for task in lines(source / TASKS):
        for instance in task["instances"]:
            prompt = f"{task['instruction']}\n{instance['input']}".strip()
            tasks.append({"prompt": prompt, "response": f" {instance['output'].strip()}"})
    for problem in lines(source / PROBLEMS)[:1000]:
        tasks.append({"prompt": problem["question"], "response": f" {problem['answer']}"})
    pairs = []
    questions = []
    for row in lines(source / DIALOGUES):
        context, _, chosen = row["chosen"].rpartition("\n\nAssistant:")
        same, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
        dialogue = context.removeprefix("\n\nHuman: ")
        questions.append(dialogue.partition("\n\nAssistant:")[0])
        if context == same and chosen.strip() and rejected.strip():
            pairs.append({"prompt": dialogue, "chosen": chosen, "rejected": rejected})
    questions = list(dict.fromkeys(questions))
    better = [
        {**row, "chosen": f" {row['chosen']}", "rejected": f" {row['rejected']}"}
        for row in lines(source / PREFERENCES)
    ]
    save(folder / "sft_data.json", tasks)
    save(folder / "preference_data.json", pairs)
    save(folder / "prompts.json", questions[256:])
    save(folder / "heldout_prompts.json", questions[:256])
    save(folder / "hhh.jsonl", better)


def solutions(path: Path) -> list[dict[str, Any]]:
    """GSM8K's model solutions: four answers to each question, with 1 where the answer is correct
    and 0 where not.
    """
    return [
        {
            "prompt": question["question"] + "\n",
            "responses": [question[model]["solution"] for model in MODELS],
            "targets": [float(question[model]["is_correct"]) for model in MODELS],
        }
        for question in lines(path)
    ]


def main() -> None:
    source, folder = map(Path, sys.argv[1:])
    write(source, folder)
    save(folder / "gsm8k.jsonl", solutions(source / SOLUTIONS))


if __name__ == "__main__":
    main()

"""A model's folder in this library and in transformers: logits in float32 and greedy tokens.

    python benchmarks/real_model_parity.py FOLDER --out real_model_parity.json

Needs PyTorch. The texts are a few of different scripts, and a page of this repository, cut to 700
tokens, which is longer than the window of Gemma 3.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
import results  # noqa: E402

from rlhf_jax import models  # noqa: E402
from rlhf_jax.generation.generator import Generator  # noqa: E402

TEXTS = {
    "a sum": "3 + 9 =",
    "English": "The capital of France is Paris, and the capital of Germany is",
    "a program": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Japanese": "日本語の文章です。東京は",
    "a page": (HERE.parent / "docs" / "data.md").read_text("utf-8"),
}
LONGEST = 700  # tokens
PROMPTS = [
    "3 + 9 =",
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "The three laws of robotics are",
    "Water boils at",
    "日本の首都は",
    "Q: What is 12 + 30?\nA:",
]
NEW_TOKENS = 32


def logits_compared(folder, tokenizer, theirs):
    """Rows on the logits of each text."""
    model, params = models.load(folder)
    apply = jax.jit(model.apply)
    rows = []
    for name, text in TEXTS.items():
        tokens = np.array([tokenizer(text)["input_ids"][:LONGEST]])
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens)).logits[0].numpy()
        found = np.asarray(apply(params, tokens, np.ones_like(tokens)))[0]
        largest = np.abs(found - expected).max()
        values = {
            "tokens": tokens.shape[1],
            "largest difference of a logit, millionths": 1e6 * largest,
            "the same, as millionths of the largest logit": 1e6 * largest / np.abs(expected).max(),
            "same likeliest token": np.mean(found.argmax(-1) == expected.argmax(-1)),
        }
        rows += [results.row(name, results.ALL, 0, *item) for item in values.items()]
    return rows


def greedy_compared(folder, tokenizer, theirs):
    """Rows on the likeliest texts behind the prompts."""
    how = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "template": "{prompt}"}
    found = Generator(folder, **how)(PROMPTS).texts
    same = 0
    for prompt, text in zip(PROMPTS, found, strict=True):
        asked = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            tokens = theirs.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        expected = tokenizer.decode(tokens[asked["input_ids"].shape[1] :], skip_special_tokens=True)
        same += text == expected
    name = f"greedy, {NEW_TOKENS} tokens behind {len(PROMPTS)} prompts"
    return [results.row(name, results.ALL, 0, "same texts", same)]


def main():
    """Compares, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the model")
    parser.add_argument("--out", type=Path, required=True, help="a file for the results as a table")
    args = parser.parse_args()
    started = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    rows = logits_compared(args.folder, tokenizer, theirs.eval())
    rows += greedy_compared(args.folder, tokenizer, theirs)
    for row in rows:
        print(row["variant"], row["metric"], row["value"], sep=": ")
    command = f"python benchmarks/real_model_parity.py FOLDER --out {args.out.name}"
    results.write(args.out, command, time.perf_counter() - started, rows)


if __name__ == "__main__":
    main()

"""The examples of docs/api/forms.md, and records as the stages read them."""

import json
from pathlib import Path

from rlhf_jax.data import formats, forms
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.rows import BadRow, Record

W = "data.jsonl, line 1"
STAGES = {
    "demonstrations": "SFT",
    "comparisons": "reward model",
    "pairs": "DPO",
    "feedback": "KTO",
    "solutions": "process reward model",
    "prompts": "RL",
}
PAGE = Path(__file__).resolve().parent.parent / "docs" / "api" / "forms.md"
LINES = PAGE.read_text("utf-8").partition("```text\n")[2].partition("\n```")[0].split("\n")
EXAMPLES = {form.name: json.loads(line) for form, line in zip(forms.FORMS, LINES, strict=True)}
"""The page has an example of each form, in the order of the table."""


def adapted(value, columns=()):
    try:
        return forms.converted(Record(value, W), forms.parse_columns(columns))
    except BadRow as error:
        return [Record(error, W)]


def parsed(kind, *records, columns=(), drop="error", template=None):
    read = [record for value in records for record in adapted(value, columns)]
    return formats.parse_all(kind, read, template or ChatTemplate(), drop)

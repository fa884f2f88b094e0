"""`data preview --for STAGE`: the ids and the learned part are those of the stage's own batches."""

import json
from dataclasses import replace

import numpy as np
import pytest
from builders import initial_params

from rlhf_jax import models
from rlhf_jax.cli import commands
from rlhf_jax.config import RLStage, RunConfig, Text, data_source
from rlhf_jax.data import check, formats
from rlhf_jax.data.tokenizers import characters, load_tokenizer
from rlhf_jax.errors import UserError, logger
from rlhf_jax.training import preview
from rlhf_jax.training.common import initial

CHATML = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
TOKENIZER = characters("abcdefgh<>us|notx\n")
PAIR = {"prompt": "a", "chosen": "b", "rejected": "cd"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 24 positions whose template frames each turn."""
    path = tmp_path_factory.mktemp("model")
    config = models.GPT2Config(
        vocab_size=TOKENIZER.vocab_size,
        max_length=24,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        pad_token_id=TOKENIZER.pad_id,
        eos_token_id=TOKENIZER.eos_id,
    )
    model = models.build(config)
    models.save(path, model, initial_params(model))
    TOKENIZER.save(path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": CHATML}))
    return str(path)


@pytest.fixture
def previewed(folder, write):
    """The lines of JSON for these rows."""

    def previewed(stage, *rows, count=9, name="data.jsonl", **settings):
        path = write(list(rows) if not isinstance(rows[0], str) else rows[0], name)
        config = RunConfig(model=folder, data=(path,), **settings)
        shown = preview.rows(stage, data_source(config), config.rl, count)
        return [json.loads(preview.to_json(row, shown.tokenizer)) for row in shown.rows]

    return previewed


def learned(text):
    """What a text of one character for each id learns, with | for EOS."""
    letters = text["text"].replace("<|endoftext|>", "|")
    assert len(letters) == len(text["ids"]) == len(text["learned"])
    marked = zip(letters, text["learned"], strict=True)
    return "".join(letter if is_learned else "." for letter, is_learned in marked)


def test_a_demonstration(previewed):
    turns = [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]
    [row] = previewed("sft", {"conversations": turns, "id": 3})
    assert list(row) == ["source", "form", "texts", "columns"]
    assert row["source"] == "data.jsonl, line 1"
    assert row["form"] == "ShareGPT"
    [text] = row["texts"]
    assert text["text"] == "<u>b<|endoftext|><a>c<|endoftext|>"
    assert learned(text) == "........c|"
    assert text["ids"] == [*TOKENIZER.encode("<u>b"), 1, *TOKENIZER.encode("<a>c"), 1]


def test_chosen_stands_before_rejected_and_the_best_first(previewed):
    choice = {"prompt": "a", "responses": ["b", "c", "d"], "best": 1}
    rows = previewed("reward_model", PAIR, choice)
    assert [learned(text)[-2:] for text in rows[0]["texts"]] == ["b|", "d|"]
    assert [learned(text)[-2] for text in rows[1]["texts"]] == ["c", "b", "d"]
    scored = {"prompt": "a", "responses": ["b", "c", "d"], "targets": [0, 1, 2]}
    [row] = previewed("reward_model", scored)
    assert [learned(text)[-2] for text in row["texts"]] == ["d", "c", "b"]
    assert len(previewed("dpo", PAIR, choice)) == 3


def test_scores_of_a_ranking_do_not_name_the_answers_of_its_pairs(folder, write, capsys):
    answers = [{"response": "b", "overall_score": 2.0}, {"response": "c", "overall_score": 8.5}]
    path = write([{"instruction": "a", "completions": answers}])
    commands.run(["data", "preview", path, "--for", "dpo", "--model", folder])
    shown = capsys.readouterr().out
    assert shown.index("  chosen: ") < shown.index("[[c<") < shown.index("  rejected: ")
    assert shown.index("  rejected: ") < shown.index("[[b<")
    assert "target" not in shown
    assert "  chosen:\n    | c\n  rejected:\n    | b" in check.preview(path, kind="pairs")


def test_dialogues_of_hh_within_a_chat_template_are_a_warning(folder, write, caplog, monkeypatch):
    dialogue = "\n\nHuman: a\n\nAssistant: "
    path = write([{"chosen": f"{dialogue}b", "rejected": f"{dialogue}c"}])
    tokenizer = load_tokenizer(folder)
    warning = r"1 prompts begin with '\n\nHuman:' (data.jsonl, line 1), and the chat template"
    assert f"  warning: {warning}" in check.check([path], tokenizer).text
    assert "  warning: " not in check.check([path], TOKENIZER).text
    [row] = formats.read("pairs", path).rows
    monkeypatch.setattr(logger, "propagate", True)
    initial.say_spelled([row], tokenizer, "{prompt}")
    assert not caplog.messages
    initial.say_spelled([row], tokenizer, "auto")
    assert "; --text.template '{prompt}' reads them as they are" in caplog.text


def test_the_turns_of_a_conversation_have_its_form(folder, write):
    talk = [{"from": ("human", "gpt")[i % 2], "value": "abcd"[i]} for i in range(4)]
    config = RunConfig(model=folder, data=(write([{"conversations": talk}]),))
    config = replace(config, text=Text(template="{prompt}"))
    shown = preview.rows("sft", data_source(config), config.rl, 9)
    assert {row.form for row in shown.rows} == {"ShareGPT"}


def test_feedback_and_prompts(previewed):
    rows = previewed("kto", PAIR)
    assert [learned(text)[8:] for row in rows for text in row["texts"]] == ["b|", "cd|"]
    [row] = previewed("grpo", {"prompt": "a", "answer": 7}, rl=RLStage(max_new_tokens=8))
    assert row["columns"] == {"answer": 7}
    assert [learned(text) for text in row["texts"]] == ["........"]
    assert row["texts"][0]["text"] == "<u>a<|endoftext|><a>"


def test_what_is_cut_or_not_usable_is_said(folder, write):
    path = write([PAIR | {"chosen": "b" * 30}, PAIR | {"prompt": ""}, PAIR | {"prompt": "aa"}])

    def shown(too_long):
        config = RunConfig(model=folder, data=(path,), text=Text(too_long=too_long))
        return preview.rows("dpo", data_source(config), config.rl, 9)

    first, second = shown("error").rows
    [note] = first.notes
    assert "a run would not use it: data.jsonl, line 1: a prompt of 8 and a response of 31" in note
    assert first.texts == []
    assert (second.notes, len(second.texts)) == ([], 2)
    cut = shown("truncate")
    [first, _] = cut.rows
    assert first.notes == ["response cut, its EOS with it"]
    assert [len(text.ids) for text in first.texts] == [24, 11]
    assert cut.found.dropped == {"'prompt' is empty": 1}


@pytest.mark.parametrize(
    ("stage", "record"),
    [
        ("sft", {"prompt": "a", "response": "b<|endoftext|>"}),
        ("dpo", PAIR | {"chosen": "b<|endoftext|>"}),
        ("kto", PAIR | {"rejected": "c<|endoftext|>"}),
        ("grpo", {"prompt": "a<|pad|>"}),
        ("sft", {"text": "a<|endoftext|>b"}),
    ],
)
def test_a_spelled_special_token_is_said_until_it_is_chosen_what_it_is(
    stage, record, folder, write
):
    for chosen, template, is_said in (
        (None, "{prompt}", True),
        ("text", "{prompt}", False),
        ("tokens", "{prompt}", False),
    ):
        text = Text(special_tokens=chosen, template=template)
        config = RunConfig(model=folder, data=(write([record]),), text=text)
        rl = RLStage(max_new_tokens=8)
        rows = preview.rows(stage, data_source(config), rl, 9).rows
        notes = [note for row in rows for note in row.notes]
        assert sum("text.special_tokens: tokens reads the" in note for note in notes) == is_said


def test_a_plain_text_is_shown_in_pieces(previewed):
    rows = previewed("sft", "abcdefgh" * 5, name="book.txt")
    assert [len(row["texts"][0]["ids"]) for row in rows] == [24, 18]
    assert learned(rows[0]["texts"][0])[:3] == ".bc"
    assert rows[1]["texts"][0]["text"].endswith("gh<|endoftext|>")


def test_for_people_the_learned_part_is_marked(folder, write, capsys):
    path = write([PAIR | {"chosen": "b\n", "prompt": "h"}])
    commands.run(["data", "preview", path, "--for", "dpo", "--model", folder])
    assert capsys.readouterr().out.split("\n")[:9] == [
        "1 rows",
        f"text.template auto: the chat template of {folder}; a plain prompt is a user's message",
        "",
        "data.jsonl, line 1 (prompt, chosen, rejected)",
        "  chosen: 11 tokens, 3 learned",
        "    | <u>h<|endoftext|><a>[[b",
        "    | <|endoftext|>]]",
        "  rejected: 11 tokens, 3 learned",
        "    | <u>h<|endoftext|><a>[[cd<|endoftext|>]]",
    ]
    config = RunConfig(model=folder, data=(path,))
    shown = preview.rows("dpo", data_source(config), config.rl, 1)
    [row] = shown.rows
    assert "<a>\x1b[32mcd<|endoftext|>\x1b[0m" in preview.to_text(row, shown.tokenizer, True)


def test_the_command_with_json_prints_nothing_else(folder, write, capsys):
    path = write([PAIR, PAIR | {"chosen": "b" * 30}])
    commands.run(
        ["data", "preview", "--for=dpo", path, "--json", "--model", folder, "--count", "2"]
    )
    output = capsys.readouterr()
    assert len(list(map(json.loads, output.out.splitlines()))) == 2
    assert output.err.startswith("data.jsonl, line 2: a run would not use it: ")
    flags = ["--model", folder, "--text.too-long", "truncate"]
    commands.run(["data", "preview", path, "--for", "dpo", "--json", *flags])
    lines = capsys.readouterr().out.splitlines()
    assert [len(json.loads(line)["texts"]) for line in lines] == [2, 2]


def test_mistakes_of_the_command(folder, write):
    path = write([PAIR])
    wrong = [
        ([path, "--for", "stf"], "--for stf: there is no such stage; did you mean sft"),
        ([path, "--for", "dpo"], "--for shows the ids of a model: give --model FOLDER too"),
        (["--for", "dpo", "--model", folder], "name the file first"),
        ([path, "--for", "pipeline", "--model", folder], "--for pipeline: there is no such stage"),
    ]
    for flags, message in wrong:
        with pytest.raises(UserError, match=message):
            commands.run(["data", "preview", *flags])


def test_check_counts_what_is_learned(folder, write):
    tokenizer = characters("abcd")
    text = check.check([write([PAIR, PAIR])], tokenizer).text
    assert "  tokens: 14, of which 10 are learned\n" in text  # a b | and a c d |, twice
    turns = [{"role": ("user", "assistant")[i % 2], "content": "abcd"[i]} for i in range(4)]
    text = check.check([write([{"messages": turns}])], load_tokenizer(folder)).text
    assert "of which 4 are learned\n" in text  # b | and d |, without the turn between them
    text = check.check([write([{"prompt": "abcd"}])], tokenizer).text
    assert "learned" not in text
    texts = write([{"text": "abc"}, {"text": "d"}])
    text = check.check([texts], tokenizer).text
    assert "of which 4 are learned\n  tokens of a response: median 3, 95% up to 4" in text


def test_special_tokens_and_other_values_of_columns_are_written():
    [a, b] = TOKENIZER.encode("ab")
    text = preview.Text("text", [a, TOKENIZER.eos_id, b], [False, False, True])
    row = preview.Preview("f, line 1", "x", {"a": np.float32(1)}, [text])
    assert json.loads(preview.to_json(row, TOKENIZER))["texts"][0]["text"] == "a<|endoftext|>b"

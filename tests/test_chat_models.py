"""A chat model is asked through its own chat template: the same ids in transformers, the Generator,
every stage, evaluations and multi-turn conversations.
"""

import json

import asked_runs
import chat_families
import numpy as np
import pytest
import transformers
from builders import slow
from chat_families import ANSWER, SYSTEM, USER

from rlhf_jax import sampling, training
from rlhf_jax.algorithms import vpg
from rlhf_jax.config import Network, RLStage, RunConfig
from rlhf_jax.data import chat, check, encoding
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters, load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import bench, evaluate
from rlhf_jax.generation import environment
from rlhf_jax.generation.environment import Environment
from rlhf_jax.generation.generator import Generator, LanguageModel, responses
from rlhf_jax.report import export
from rlhf_jax.training.supervised import store
from rlhf_jax.types import Rollout

build_once = asked_runs.build_once

TURNS = ([USER], [SYSTEM, USER], [USER, ANSWER, USER], [SYSTEM, USER, ANSWER, USER])
DATE = {"date_string": "26 Jul 2024"}  # ours, whatever the day
SAMPLING = sampling.SamplingConfig(5, eos_id=1, pad_id=0)
END = "<|im_end|>"
SHOWN = "System:\nbe kind\n\nUser:\nhi\n\nAssistant:\n"


def theirs(folder, messages):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    how = {"add_generation_prompt": True, "return_dict": False}
    return tokenizer.apply_chat_template(messages, **how, **DATE)


@pytest.mark.parametrize("family", chat_families.FAMILIES)
def test_ids_are_those_of_transformers(family, tmp_path):
    chat_families.write(tmp_path, family)
    tokenizer = load_tokenizer(tmp_path)
    template = chat.template_of(tokenizer, "auto")
    refused = 0
    for messages in TURNS:
        try:
            expected = theirs(tmp_path, messages)
        except Exception as error:
            refused += 1
            with pytest.raises(UserError, match=f"row: the chat template failed.*{error}"):
                template.prompt(messages, "row")
        else:
            assert list(template.prompt(messages, "row")) == expected
    if family.startswith(("smol", "qwen", "llama")):  # where EOS ends each turn
        setting = Environment(lambda *_: USER, tokenizer, chat.template_of(tokenizer), 9)
        reply, *_ = environment._ask(setting, [USER, ANSWER], {}, "", is_closed=True)
        said = [*theirs(tmp_path, [USER]), *tokenizer.encode("hello"), tokenizer.eos_id]
        assert said + reply == theirs(tmp_path, [USER, ANSWER, USER])
    assert refused == (2 if family in ("gemma2", "mistral") else 0)
    rows = [Row("hi", (), "row")]
    assert encoding.prompt_ids(rows, tokenizer, "auto") == [theirs(tmp_path, [USER])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_families.write_model(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="module")
def generator(folder):
    return Generator(folder, max_new_tokens=5, temperature=0)


def test_a_plain_prompt_is_a_users_message_and_a_list_of_messages_a_prompt(folder, generator):
    asked = ["hi", [USER], [SYSTEM, USER]]
    said = generator(asked)
    # The same ids are the same prompt: its second sample, which at temperature 0 is the first.
    assert said.texts[0] == said.texts[1] != said.texts[2]
    bare = Generator(folder, max_new_tokens=5, temperature=0, template="{prompt}")
    plain = bare(asked)
    assert plain.texts[0] != said.texts[0]
    assert plain.texts[1:] == said.texts[1:]
    assert plain.log_probs[1:].tolist() == said.log_probs[1:].tolist()
    for message, prompt in (
        (r"prompts\[1\]: .* '<\|im_end\|>'", "x<|im_end|>"),
        (r"prompts\[1\]: message 1 ", ["hi"]),
        (r"prompts\[1\]: .* an empty list", []),
        (r"prompts\[1\], 'System:.* \d+ tokens", [SYSTEM, USER, ANSWER] * 9 + [USER]),
    ):
        with pytest.raises(UserError, match=message):
            generator(["hi", prompt])


def test_pad_that_is_eos_becomes_the_unknown_token_and_the_vocabulary_stays(folder, tmp_path):
    policy = LanguageModel.load(folder)
    tokenizer = policy.tokenizer
    config = policy.model.config
    unknown, end = map(tokenizer.backend.token_to_id, ("<|endoftext|>", "<|im_end|>"))
    assert (tokenizer.pad_id, tokenizer.eos_ids) == (unknown, (end,))
    assert config.vocab_size == tokenizer.vocab_size == tokenizer.backend.get_vocab_size()
    # transformers reads a reward model's score at the last token that is no pad: EOS, if it is none
    assert (config.pad_token_id, config.eos_token_id) == (unknown, end)
    policy.save(tmp_path, template="auto", config=SAMPLING)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (len(again), again.pad_token_id) == (config.vocab_size, unknown)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == unknown
    named = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "special_tokens_map.json").unlink()
    for change, pad in (({"pad_token": None}, "<|endoftext|>"), ({"unk_token": END}, "<|pad|>")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | change))
        left = load_tokenizer(tmp_path)
        assert left.pad_id == left.backend.token_to_id(pad)


class Encoded(Exception):
    """Stops a run when its rows are tokens."""


@pytest.fixture
def encoded(monkeypatch):
    """Runs what is called until its rows are encoded; gives their ids without padding."""

    def stopped(encode):
        def wrapper(*args, **how):
            raise Encoded(encode(*args, **how))

        return wrapper

    encode_texts = stopped(encoding.encode_texts)
    monkeypatch.setattr(store, "encode_texts", encode_texts)
    monkeypatch.setattr(encoding, "encode_texts", encode_texts)
    monkeypatch.setattr(encoding, "encode_prompts", stopped(encoding.encode_prompts))

    def call(run, *args):
        with pytest.raises(Encoded) as stop:
            run(*args)
        [result] = stop.value.args
        if isinstance(result, encoding.EncodedTexts):
            return [texts[0].tolist() for texts in result.tokens]
        return result.tokens[0][result.attention_mask[0] == 1].tolist()

    return call


def config_of(folder, data, output, **sections):
    network = Network(hidden_size=8, num_layers=1, num_heads=1, max_length=64)
    return RunConfig(
        model=str(folder),
        data=(data,),
        output_dir=str(output),
        network=network,
        **sections,
    )


NO = {"role": "assistant", "content": "no"}
STAGES = {
    "sft": ({"prompt": "hi", "response": "hello"}, {"messages": [USER, ANSWER]}),
    "reward_model": (
        {"prompt": "hi", "chosen": "hello", "rejected": "no"},
        {"chosen": [USER, ANSWER], "rejected": [USER, NO]},
    ),
    "kto": (
        {"prompt": "hi", "response": "hello", "desirable": True},
        {"messages": [USER, ANSWER], "desirable": True},
    ),
    "rl": ({"prompt": "hi"}, {"prompt": [USER]}),
}
STAGES["dpo"] = STAGES["reward_model"]


@pytest.mark.parametrize(
    "stage", ["sft", "rl", slow("reward_model"), slow("kto"), slow("dpo")]
)  # the slow ones encode as the first
def test_stages_read_a_prompt_as_transformers_does(
    stage,
    folder,
    tmp_path,
    write,
    encoded,
    capsys,
):
    expected = theirs(folder, [USER])
    tokenizer = load_tokenizer(folder)
    response, other = ([*tokenizer.encode(text), tokenizer.eos_id] for text in ("hello", "no"))
    texts = [expected + response, expected + other]
    whole = [texts[0] + tokenizer.encode("\n")]  # what the template writes behind the turn
    run = getattr(training, stage).run
    for i, row in enumerate(STAGES[stage]):
        ids = encoded(run, config_of(folder, write([row]), tmp_path / f"{stage}{i}"))
        assert ids == {"rl": expected, "sft": whole, "kto": texts[:1]}.get(stage, texts)
    line = f"text.template auto: the chat template of {folder}; a plain prompt is a user's message"
    assert capsys.readouterr().out.count(line) == 2


def test_an_evaluation_reads_a_prompt_as_transformers_does(
    folder,
    tmp_path,
    write,
    encoded,
    capsys,
):
    expected = theirs(folder, [USER])
    for row in STAGES["rl"]:
        where = {"prompts": (write([row]),), "output": str(tmp_path / "out")}
        asked = evaluate.Config(**where, max_new_tokens=32)
        assert encoded(evaluate.run, folder, asked) == expected
    assert "a plain prompt is a user's message" in capsys.readouterr().out


ENVIRONMENT = """import json

def note(conversation, row):
    with open("talks.jsonl", "a") as file:
        print(json.dumps(conversation), file=file)
"""


@pytest.mark.slow
def test_a_run_shows_messages_as_text_and_leaves_a_model_that_is_asked_the_same(
    folder,
    generator,
    tmp_path,
    write,
    capsys,
):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("hello")
    rows = [{"prompt": [SYSTEM, USER]}, {"prompt": "hi"}]
    rows.append({"prompt": ids, "responses": ["a", "b"], "best": 0})
    write(ENVIRONMENT, "env.py")
    settings = RLStage(
        num_iterations=1,
        batch_size=4,
        max_new_tokens=4,
        validation_data=(write(rows, "others.jsonl"),),
        show_examples=3,
        environment="env.py:note",
    )
    config = config_of(
        folder,
        write(rows[:1]),
        tmp_path / "run",
        reward=("length",),
        rl=settings,
    )
    result = training.rl.run(config, vpg)
    lines = (result.folder / "samples.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [SHOWN, "hi", "hello"] * 2
    assert capsys.readouterr().out.count(f"Prompt:    {SHOWN}\nGenerated: ") == 2
    lines = (tmp_path / "talks.jsonl").read_text("utf-8").splitlines()
    talks = [json.loads(line)[:-1] for line in lines]
    as_text = {"role": "user", "content": "hello"}
    assert talks[:3] == [[SYSTEM, USER], [USER], [as_text]]
    assert talks[3:7] == [[SYSTEM, USER]] * 4
    assert theirs(result.model_folder, [SYSTEM, USER]) == theirs(folder, [SYSTEM, USER])
    left = load_tokenizer(result.model_folder)
    assert left.config["chat_template"] == tokenizer.config["chat_template"]
    card = (export.export(result.folder, tmp_path / "out") / "README.md").read_text("utf-8")
    assert "It reads a prompt as a user's message of its chat template." in card


@pytest.mark.slow
def test_an_evaluation_at_temperature_0_says_what_the_generator_says(
    folder,
    generator,
    tmp_path,
    write,
):
    prompts = (write([{"prompt": [SYSTEM, USER]}, {"prompt": "hi"}]),)
    asked = evaluate.Config(
        prompts=prompts, temperature=0, max_new_tokens=5, output=str(tmp_path / "out")
    )
    evaluate.run(folder, asked)
    lines = (tmp_path / "out" / evaluate.SAMPLES).read_text("utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["prompt"] for sample in samples] == [SHOWN, "hi"]
    expected = generator([[SYSTEM, USER], "hi"]).texts
    assert [sample["response"] for sample in samples] == expected


def test_transcripts_show_replies_without_special_tokens(folder):
    tokenizer = load_tokenizer(folder)
    prompt, whole = (theirs(folder, messages) for messages in ([USER], [USER, ANSWER, USER]))
    tokens = np.array([[*whole, *tokenizer.encode("ok"), tokenizer.eos_id]])
    mask = np.zeros_like(tokens)
    spoken = len(tokenizer.encode("hello")) + 1
    mask[0, len(prompt) : len(prompt) + spoken] = 1
    mask[0, len(whole) :] = 1
    rollout = Rollout(tokens, np.ones_like(tokens), mask, np.zeros(tokens.shape))
    assert responses(rollout, tokenizer) == ["hellook"]
    shown = "hello\nuser\nhi\nassistant\nok"
    assert responses(rollout, tokenizer, with_replies=True) == [shown]
    tokens[0, len(whole)] = tokenizer.backend.token_to_id(
        "<|im_start|>"
    )  # said by the policy itself
    assert "assistant\n<|im_start|>" in responses(rollout, tokenizer, with_replies=True)[0]


def test_prompts_are_shown_to_people_as_text(folder, write):
    tokenizer = load_tokenizer(folder)
    prompt = chat.template_of(tokenizer).prompt([SYSTEM, USER], "")
    rows = [Row(prompt, ("a", "b"), "1", messages=[SYSTEM, USER]), Row("hi", ("a", "b"), "2")]
    ids = tokenizer.encode("hello")
    rows.append(Row(tuple(ids), ("a", "b"), "3"))
    for template, plain in (("auto", "hi"), ("Q: {prompt}", "Q: hi")):
        shown = encoding.encode_texts(rows, tokenizer, template=template).prompts
        assert shown == [SHOWN, plain, "hello"]
    file = write([{"prompt": [SYSTEM, USER]}, {"prompt": ids, "responses": ["a", "b"], "best": 0}])
    preview = check.preview(file, tokenizer, kind="prompts")
    for text in (SHOWN, "hello"):
        lines = "\n".join(f"    | {line}" for line in text.split("\n"))
        assert f"  prompt:\n{lines}" in preview


def test_a_text_template_of_a_run_is_used_again_and_never_twice(folder, tmp_path):
    policy = LanguageModel.load(folder)
    for name, frame in (("framed", "Q: {prompt} A:"), ("bare", "{prompt}")):
        left = tmp_path / name
        policy.save(left, template=frame, config=SAMPLING)
        tokenizer = load_tokenizer(left)
        hi = Row("hi", (), "")
        ids = Row((3, 4), (), "")
        expected = tokenizer.encode(frame.replace("{prompt}", "hi"))
        assert encoding.prompt_ids([hi, ids], tokenizer, "auto") == [expected, [3, 4]]
        template = chat.template_of(tokenizer, "auto")
        for messages in TURNS:
            assert list(template.prompt(messages, "")) == theirs(left, messages)
        line = chat.describe("auto", tokenizer, "here")
        assert line == f"text.template auto: {frame!r}, with which here was trained"
        LanguageModel.load(left).save(tmp_path / "again", template="auto", config=SAMPLING)
        assert load_tokenizer(tmp_path / "again").config == tokenizer.config
    asked = Generator(tmp_path / "framed", max_new_tokens=5, temperature=0)
    given = ["hi", [USER], "be kind\n\nhi", [SYSTEM, USER]]
    rows = [asked.row(prompt, "", {}, asked.tokenizer) for prompt in given]
    plain, user, framed, system = asked.ask(rows).ids
    assert (plain, framed) == (user, system)
    assert chat.describe("Q{prompt}", tokenizer, "here") == "text.template: 'Q{prompt}'"


def test_a_model_without_a_chat_template_reads_prompts_as_they_are():
    tokenizer = characters("hi Userbknd:Ayt\nSmao")
    template = chat.template_of(tokenizer, "auto")
    assert template.source == chat.PLAIN
    rows = [Row("hi", (), ""), Row(template.prompt([SYSTEM, USER], ""), (), "")]
    expected = [tokenizer.encode(text) for text in ("hi", SHOWN)]
    assert encoding.prompt_ids(rows, tokenizer, "auto") == expected
    line = "text.template auto: {prompt}; there is no chat template"
    assert chat.describe("auto", tokenizer, None) == line
    assert chat.with_text_template(tokenizer, "auto").config["chat_template"] == chat.PLAIN
    called = [USER, {**ANSWER, "tool_calls": [{"name": "é"}]}]
    shown = chat.shown(Row((3,), (), "", messages=called), tokenizer)
    assert shown == 'User:\nhi\n\nAssistant:\nhello[{"name": "é"}]'


def test_runs_of_unlike_templates_are_not_compared(folder, tmp_path):
    policy = bench.load(str(folder), evaluate.Config())
    assert policy.template == "auto"
    run = tmp_path / "run"
    LanguageModel.load(folder).save(run / "model", template="auto", config=SAMPLING)
    (run / "config.yaml").write_text("text: {template: auto}")
    bench.check_template(policy, str(run), evaluate.Config())
    (run / "config.yaml").write_text("text: {template: '{prompt}'}")
    with pytest.raises(UserError, match=r"was trained with the template '\{prompt\}'"):
        bench.check_template(policy, str(run), evaluate.Config())
    bench.check_template(policy, str(run), evaluate.Config(template="{prompt}"))

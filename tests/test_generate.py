"""rlhf-jax generate: what it writes, and that the file depends on the seed, the model and the
prompts alone.
"""

import functools
import json
import re

import asked_runs
import jax
import pytest
from asked_runs import NEW
from builders import json_lines

from rlhf_jax import cli, sampling
from rlhf_jax.data import formats
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import bench
from rlhf_jax.generation.generator import Generator, LanguageModel
from rlhf_jax.inference import asking, generate

PROMPTS = ["abc", "d", "a much longer prompt", "abc", "hi", "abcd efgh", "d"]
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who"}]


build_once = asked_runs.build_once


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return asked_runs.write(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def prompts(runs):
    file = runs / "prompts.jsonl"
    lines = [{"prompt": text, "want": i} for i, text in enumerate(PROMPTS)]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"messages": MESSAGES}]))
    return str(file)


@pytest.fixture
def write(runs, prompts, tmp_path):
    """Calls the command; the rows that it wrote."""

    def write(*flags, name="out.jsonl", policy="policy"):
        out = tmp_path / name
        argv = [
            "generate",
            str(runs / policy),
            "--prompts",
            prompts,
            "--out",
            str(out),
        ]
        cli.run([*argv, *flags])
        return json_lines(out)

    return write


def test_the_rows_are_what_the_generator_says(runs, write, capsys):
    rows = write(
        "--n",
        "2",
        "--log-probs",
        "--reward",
        str(runs / "reward"),
        "--seed",
        "3",
    )
    assert "wrote 16 responses" in capsys.readouterr().out
    policy = runs / "policy" / "model"
    reward = runs / "reward" / "model"
    how = {"max_new_tokens": NEW, "temperature": 0.7, "top_k": 9, "template": "{prompt}:"}
    expected = Generator(policy, reward, **how)([*PROMPTS, MESSAGES], seed=3, num_samples=2)
    assert [row["response"] for row in rows] == expected.texts
    assert [row["prompt"] for row in rows[::2]] == [*PROMPTS, MESSAGES]
    assert [row["prompt"] for row in rows[1::2]] == [*PROMPTS, MESSAGES]
    assert [row["log_prob"] for row in rows] == pytest.approx(expected.log_probs, abs=1e-3)
    assert [row["score"] for row in rows] == pytest.approx(expected.rewards, abs=1e-3)
    assert len({row["response"] for row in rows}) > 12
    plain = write("--n", "2", "--seed", "3", name="plain.jsonl")
    assert plain == [{key: row[key] for key in ("prompt", "response")} for row in rows]


def test_its_settings_are_the_runs_unless_flags_say_otherwise(runs, write):
    other = {"max_new_tokens": 4, "temperature": 0, "template": "a{prompt}"}
    flags = ("--max-new-tokens", "4", "--temperature", "0", "--template", "a{prompt}")
    expected = Generator(runs / "policy" / "model", **other)([*PROMPTS, MESSAGES], seed=0)
    assert [row["response"] for row in write(*flags)] == expected.texts
    inner = write("--n", "2", name="inner.jsonl", policy="policy/model")
    assert inner == write("--n", "2", name="outer.jsonl")


# Values that no run has, in a config.yaml that may be somebody else's, and the key that is named.
STRANGE = [
    ("rl: {temperature: -1}", "rl: temperature must be at least 1e-06, got -1"),
    ("rl: {temperature: .inf}", "rl: temperature must be below inf"),
    ("rl: {temperature: .nan}", "rl: temperature must be at least 1e-06, got nan"),
    ("rl: {temperature: x}", "rl: temperature: Expected `float`, got `str`"),
    ("rl: {temperature: null}", "rl: temperature: Expected `float`, got `null`"),
    ("rl: {temperature: [1, [2]]}", "rl: temperature: Expected `float`, got `array`"),
    ("rl: {top_k: 0}", "rl: top_k must be at least 1, got 0"),
    ("rl: {top_k: true}", "rl: top_k: Expected `int | null`, got `bool`"),
    ("rl: {top_p: 1.5}", "rl: top_p must be at most 1, got 1.5"),
    ("rl: {min_p: -0.5}", "rl: min_p must be at least 0, got -0.5"),
    ("rl: {max_new_tokens: 0}", "rl: max_new_tokens must be at least 1, got 0"),
    ("rl: {max_new_tokens: 9999999999}", "rl: max_new_tokens must be at most 2147483647"),
    ("rl: {max_new_tokens: 1e400}", "rl: max_new_tokens: Expected `int`"),
    ("rl: {max_new_tokens: " + "9" * 40 + "}", "numbers of 64 bits"),
    ("rl: {stop: ['']}", "rl: stop: expected texts that are not empty"),
    ("rl: {stop: '.'}", "rl: stop: Expected `array`, got `str`"),
    ("rl: {max_turns: 2}", "rl: max_turns: conversations have an environment"),
    ("rl: {environment: 5}", "rl: environment: Expected `str | null`, got `int`"),
    ("rl: 5", "rl: Expected `object`, got `int`"),
    ("compute: {dtype: x}", "compute: dtype: Invalid enum value 'x'"),
    ("compute: {dtype: [float32]}", "compute: dtype: "),
    ("compute: null", "compute: Expected `object`, got `null`"),
    ("text: {template: hello}", "text: template must be auto or contain {prompt}"),
    ("text: {template: 1}", "text: template: Expected `str`, got `int`"),
    ("text: {special_tokens: x}", "text: special_tokens: "),
    ("text: [1]", "text: Expected `object`, got `array`"),
    ("reward: 5", "reward: Expected `array`, got `int`"),
    ("reward: [[a]]", "Expected `str`, got `array`"),
]


@pytest.mark.parametrize(("text", "message"), STRANGE)
def test_a_config_of_somebody_else_is_refused_with_its_file_and_key(runs, tmp_path, text, message):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "model").symlink_to(runs / "policy" / "model")
    (folder / "config.yaml").write_text(text)
    readers = (
        lambda: asking.open_policy(str(folder), asking.Settings()),  # generate, chat and serve
        lambda: bench.load(str(folder), bench.Config()),
    )
    for read in readers:
        with pytest.raises(UserError, match=re.escape(message)) as refused:
            read()
        assert str(refused.value).startswith(f"{folder}/config.yaml: ")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["{}", "a: 1", "rl: {}", "rl: {repetition_penalty: -1, engine: 5}", "rl: {top_k: null}"]
)
def test_what_no_other_command_reads_of_a_config_is_not_checked(runs, tmp_path, text):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "model").symlink_to(runs / "policy" / "model")
    (folder / "config.yaml").write_text(text)
    sampling = asking.open_policy(str(folder), asking.Settings()).config
    assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (1.0, None, 1.0)


def test_a_whole_number_as_a_temperature_is_a_float(runs, tmp_path):
    (tmp_path / "model").symlink_to(runs / "policy" / "model")
    (tmp_path / "config.yaml").write_text("rl: {temperature: 9223372036854775807}")
    temperature = asking.open_policy(str(tmp_path), asking.Settings()).config.temperature
    assert isinstance(temperature, float)  # JAX has no such int


@pytest.mark.slow
def test_neither_the_batch_size_nor_an_interruption_changes_a_byte(write, tmp_path, monkeypatch):
    flags = ("--n", "2", "--log-probs", "--reward", "length", "--batch-size", "2")
    write(*flags)
    whole = (tmp_path / "out.jsonl").read_bytes()
    write(*flags[:-1], "16", name="large.jsonl")
    assert (tmp_path / "large.jsonl").read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    sampled = []
    sample = Generator.sample

    def watched(self, asked, seed):
        sampled.append(len(asked.rows))
        return sample(self, asked, seed)

    monkeypatch.setattr(Generator, "sample", watched)
    for num_whole, parts in ((0, [4, 4]), (7, [4, 4]), (8, [4]), (11, [4]), (16, [])):
        sampled.clear()
        half = b"" if num_whole == 16 else lines[num_whole][:9]
        (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:num_whole]) + half)
        write(*flags)
        assert (tmp_path / "out.jsonl").read_bytes() == whole
        assert sampled == parts


def test_a_file_that_was_made_otherwise_is_refused(runs, write, tmp_path):
    write("--n", "2")
    before = (tmp_path / "out.jsonl").read_bytes()
    for flags, said in {
        ("--n", "3"): "was begun with n 2, and now it is 3; choose another --out",
        ("--n", "2", "--seed", "1"): "begun with seed 0, and now it is 1",
        ("--n", "2", "--temperature", "0.5"): "begun with temperature 0.7, and now it is 0.5",
        ("--n", "2", "--log-probs"): "begun with log_probs False, and now it is True",
        (
            "--n",
            "2",
            "--reward",
            "count:a",
        ): r"begun with reward {}, and now it is {'count:a': \[\]}",
    }.items():
        with pytest.raises(UserError, match=said):
            write(*flags)
    model, params, tokenizer = LanguageModel.load(runs / "policy" / "model")
    params = jax.tree.map(lambda leaf: leaf * 2, params)
    how = sampling.SamplingConfig(NEW, 0.7, eos_id=1, pad_id=0)
    LanguageModel(model, params, tokenizer).save(runs / "other", template="{prompt}:", config=how)
    with pytest.raises(UserError, match="begun with model '"):
        write("--n", "2", policy="other")
    assert (tmp_path / "out.jsonl").read_bytes() == before
    (tmp_path / "out.jsonl.settings.json").write_text("{}")
    with pytest.raises(UserError, match="begun with model None"):
        write("--n", "2")
    (tmp_path / "mine.jsonl").write_text('{"prompt": "mine"}\n')
    with pytest.raises(UserError, match=r"mine.jsonl: exists already, and no mine.jsonl.settings"):
        write(name="mine.jsonl")
    with pytest.raises(UserError, match="--batch-size must be at least 1, got 0"):
        generate.Config(prompts=("a",), out="b", batch_size=0)
    with pytest.raises(UserError, match="--columns prompt=nothing: no row has 'nothing'"):
        write("--columns", "prompt=nothing", name="none.jsonl")


def test_settings_that_could_not_be_read_again_are_refused(tmp_path):
    """Before anything is sampled: the file could not be completed. They are one level deeper than
    the options of a flag.
    """
    out = tmp_path / "out.jsonl"
    deep = functools.reduce(lambda inner, _: [inner], range(31), "x")
    with pytest.raises(UserError, match=r"out.jsonl.settings.json: is nested too deeply"):
        generate._take(out, tmp_path / "out.jsonl.part", {"template_options": {"a": deep}})
    assert not [*tmp_path.iterdir()]


def test_a_reward_in_python_sees_the_columns_and_may_leave_a_row_out(write, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def wanted(prompts, responses, want, messages):\n"
        "    both = zip(want, messages, strict=True)\n"
        "    return [None if n is None else n / 2 + len(talk) for n, talk in both]\n"
    )
    rows = write("--reward", f"{file}:wanted", "--n", "2")
    assert [row["score"] for row in rows[::2]] == [1, 1.5, 2, 2.5, 3, 3.5, 4, None]
    assert [row["score"] for row in rows[1::2]] == [row["score"] for row in rows[::2]]


def test_the_rows_are_demonstrations(write, tmp_path):
    rows = write("--n", "2")
    read = formats.read("demonstrations", tmp_path / "out.jsonl").rows
    assert [row.responses[0] for row in read] == [row["response"] for row in rows]
    assert [row.prompt for row in read[::2]][:7] == PROMPTS
    assert read[14].messages == MESSAGES


def test_prompt_and_response_fit_into_the_reward_model_too(runs, write, monkeypatch):
    assert bench.judge_positions(str(runs / "reward" / "model")) == 79
    monkeypatch.setattr(bench, "judge_positions", lambda entry: 20)
    with pytest.raises(UserError, match=r"line 3, 'a much.*: has 21 tokens, and 14 are left"):
        write("--reward", str(runs / "reward"))

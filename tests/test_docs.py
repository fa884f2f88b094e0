"""The documentation's commands and code run as written; its flags, keys, defaults, examples and
links are true.

In docs/ a command is a line ``$ ...`` of a ``console`` block, and lines ``> ...`` after it are
typed into it; a block that opens with ``# NAME.py`` is that file, other ``python`` blocks run.
``text`` blocks are not run, nor ``py`` blocks, which write_pages.py takes from programs that run.
In README a command is an indented line. A backslash at the end of a line continues it.
"""

import ast
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import chat_families
import forks
import pytest
import yaml
from builders import ROOT, json_lines
from fifteen_minutes import FIRST, PAGE, ends_as_shown
from page_commands import PAGES, README, commands, name
from pages import blocks, outputs, typed
from shakespeare import ShakespeareConfig

from rlhf_jax import cli, config, training
from rlhf_jax.cli import stages
from rlhf_jax.config import RunConfig
from rlhf_jax.data import check, demo
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.report import records
from rlhf_jax.rewards import texts
from rlhf_jax.training.common.layout import layout_of
from rlhf_jax.training.rl import method
from rlhf_jax.training.supervised.run import check_sizes

sys.path.append(str(ROOT / "docs"))
import pictures
import reference

COMING = ROOT / "docs" / "comparison.md"
PROGRAMS = sorted((ROOT / "docs" / "programs").glob("*.py"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
SETTINGS = ShakespeareConfig()
KEY = re.compile(r"^\| `([a-z0-9_.]+)` \| `((?!--)[^`]*)` \|", re.MULTILINE)  # no flags

RUN_BY_TEST_SCRIPTS = {
    *(f"rlhf-jax {name} --config tiny" for name in ("sft", "ppo")),
    "rlhf-jax pipeline --config tiny --output-dir runs/tiny",
    "rlhf-jax report runs/tiny",
}
RUNS = ROOT / "docs" / "runs.md"
OWN_MODEL = ROOT / "docs" / "your-own-chat-model.md"
CHOICES = ROOT / "docs" / "chat-preferences.md"
TRL = ROOT / "docs" / "from-trl.md"
OTHER_FLAGS = {"config", "help", "lexicon", "tokenizer", "devices", "memory", "length", "worker"}


def to_run(path):
    """The commands of a page that no other test runs."""
    elsewhere = set(commands(RUNS)) if path.stem == "settings" else set()
    return [c for c in commands(path) if c not in RUN_BY_TEST_SCRIPTS | elsewhere]


def file_of(block):
    """The name of the file that a block is, if it is one."""
    match = re.match(r"# ([\w-]+\.(?:py|yaml))\n", block.text)
    return match[1] if match else None


def snippets(path):
    """Python blocks that run."""
    return [b for b in blocks(path) if b.language == "python" and not file_of(b)]


def test_there_is_something_to_run():
    assert len([command for path in PAGES for command in commands(path)]) > 25
    assert len(snippets(README)) == 1
    assert len(PROGRAMS) > 8
    assert snippets(README)[0].text.count("\n") < 40
    languages = "console text python py json yaml {eval-rst}"
    assert {block.language for path in PAGES for block in blocks(path)} <= set(languages.split())


def all_flags(settings=SETTINGS):
    """All settings as the dotted flags that set them, without ``--``."""

    def walk(section, prefix):
        for key, value in section.items():
            flag = prefix + key.replace("_", "-")
            yield from walk(value, f"{flag}.") if isinstance(value, dict) else [flag]

    return set(walk(yaml.safe_load(config.to_yaml(settings)), ""))


def algorithms_on(path):
    """The modules of a page that are algorithms: programs with a ``Config``, and methods that are
    commands."""
    text = path.read_text("utf-8")
    yield from filter(
        None, map(stages.find_method, set(re.findall(r"^\$ rlhf-jax (\w+)", text, re.M)))
    )
    for program in PROGRAMS:
        source = program.read_text("utf-8")
        if f"programs/{program.name}" in text and "class Config(" in source:
            module = types.ModuleType(program.stem)
            exec(source, vars(module))
            yield module


def test_flags_on_the_pages_exist():
    ours = all_flags()
    for path in PAGES:
        flags = set(ours)
        for module in algorithms_on(path):
            flags |= all_flags(config.parse(RunConfig, [], algorithm=module))
        dotted = re.findall(
            r"--([a-z][a-z0-9-]*(?:\.[a-z0-9-]+)+)", path.read_text("utf-8").replace(".no-", ".")
        )
        assert set(dotted) <= flags, name(path)
        for command in (command for command in commands(path) if command.startswith("python")):
            assert set(re.findall(r"--(?!no-)([\w.-]+)", command)) <= flags | OTHER_FLAGS, command


@functools.cache
def defaults():
    return yaml.safe_load(config.to_yaml(RunConfig()))


@pytest.mark.parametrize(
    "path", [path for path in PAGES if KEY.search(path.read_text("utf-8"))], ids=name
)
def test_tables_name_real_keys_and_their_defaults(path):
    for key, default in KEY.findall(path.read_text("utf-8")):
        value = functools.reduce(lambda section, part: section[part], key.split("."), defaults())
        assert value == yaml.safe_load(default.replace("\\|", "|")), (
            f"{name(path)}: {key} is {value!r} by default"
        )


def test_the_reference_has_a_text_for_every_setting():
    """docs/write_pages.py puts these tables into the page of all settings."""
    rows = [row for table in reference.tables() for row in table.rows]
    assert {row.key for row in rows} == {key.replace("-", "_") for key in all_flags(RunConfig())}
    assert [row.key for row in rows if not row.text] == []
    texts = {row.key: row for row in rows}
    assert texts["rl.batch_size"].default == "64"
    assert texts["rl.batch_size"].text == "Episodes per iteration, over all devices."
    assert texts["dpo.optimizer.schedule"].default == "linear"
    assert texts["grpo.clip_low"].text == texts["ppo.clip_low"].text  # of the class both extend
    assert texts["sft.validation_fraction"].text != texts["dpo.validation_fraction"].text
    assert texts["sft.aggregate"].text.endswith("One of token, sequence, sum.")
    assert ("use_vllm, vllm_server_base_url", "rl.engine") in reference.other_names()


def test_every_flag_of_the_pipeline_is_mapped_to_one_that_exists():
    section = COMING.read_text("utf-8").partition("### RLHF pipeline")[2].partition("\n## ")[0]
    theirs = (
        "model_name data_path output_dir num_epochs batch_size base_model sft_model_path "
        "reward_model_path"
    )
    assert set(re.findall(r"`--(\w+)`", section)) >= {
        *theirs.split(),
        "prompts_path",
        "num_episodes",
        "use_wandb",
    }


def test_commands_that_train_gpt2_say_at_which_rate():
    """Those of the systems that they come from."""
    page = COMING.read_text("utf-8")
    commands = re.findall(r"`(rlhf-jax [^`]*--model gpt2[^`]*)`", page)
    assert len(commands) == 2
    assert all(
        re.search(r"--[a-z-]+\.optimizer\.learning-rate [1-5]e-[56]", command)
        for command in commands
    )


def test_the_pages_give_the_exit_code_of_a_reward_that_raises():
    def broken(prompts, responses):
        return [1 / 0]

    with pytest.raises(UserError) as caught:
        texts._result("broken", broken, [["p"], ["r"]], {})
    code = caught.value.exit_code
    for page, pattern in (
        ("rewards", r"An exception, any[^;]*? exit code (\d);"),
        ("troubleshooting", r"an exception inside your own [^;]*?exit code (\d) "),
        ("runs", r"\n\| (\d) \|[^\n]* your reward function raised an exception"),
    ):
        text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
        assert re.findall(pattern, text) == [str(code)], page
        said = re.findall(r"NaN or infinity[^.]*?\sexit\scode (\d)", text)
        assert said == [str(TrainingFault.exit_code)] * (page != "runs"), page


def test_troubleshooting_turns_settings_that_exist():
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    flags = all_flags()
    for heading in ("Out of memory", "Reward hacking", "Mode collapse", "Poor results"):
        part = text.partition(f"\n## {heading}")[2].partition("\n## ")[0]
        assert "| look at |" in part, heading
        turned = set(re.findall(r"^\| `--([\w.-]+)", part, re.MULTILINE))
        assert len(turned) >= 3, heading
        assert turned <= flags, heading


def test_the_examples_of_data_are_read(tmp_path):
    file = tmp_path / "example.jsonl"
    for text in [
        block.text for path in PAGES for block in blocks(path) if block.language == "json"
    ]:
        file.write_text(text, "utf-8")
        report = check.check([str(file)])
        assert report.num_problems == 0, report.text
        assert "example.jsonl: JSON lines, 2 rows," in report.text
        assert "dropped" not in report.text
        assert "no known form" not in report.text


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    for target in LINK.findall(path.read_text("utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{name(path)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name(path)}: {target}"


def test_every_page_is_in_a_table_of_contents():
    """docs/conf.py makes the sidebar of these lists."""
    index = ROOT / "docs" / "index.md"
    lists = re.findall(r"^## .*\n\n((?:- .*\n)+)", index.read_text("utf-8"), re.MULTILINE)
    listed = re.findall(r"^- \[.*?\]\((\S+)\)", "".join(lists), re.MULTILINE)
    pages = {path for path in PAGES if path not in (README, index)}
    assert sorted(pages) == sorted(index.parent / page for page in listed)


def check_end(done, where):
    assert done.returncode == 0, f"{where}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def page_folder(path, folder):
    """A working directory as a reader has it: the repository's scripts and configs, and files of
    one's own.
    """
    for part in ("experiments", "configs"):
        (folder / part).symlink_to(ROOT / part)
    for program in PROGRAMS:
        shutil.copy(program, folder)
    if path == TRL:
        chat_families.write_model(folder / "chat-model", max_length=1024)  # that of TRL
    for block in blocks(path):
        if file := file_of(block):
            (folder / file).write_text(block.text, "utf-8")
    if path in (OWN_MODEL, CHOICES):
        chat_families.write_model(folder / "smollm2", max_length=512)


# The generated corpus has fewer rows.
SMALL = """
from rlhf_jax.data import demo
for name in ("sft_data.json", "preference_data.json"):
    demo.FILES[name] = (256, demo.FILES[name][1])
"""


def run_command(command, typed, folder, **environment):
    words = shlex.split(command, comments=True)
    if words[0] not in ("python", "rlhf-jax"):
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, shell=True
        )
    return forks.run(words, folder, typed, SMALL, **environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if to_run(path) and path != PAGE],
    ids=name,
)
def test_the_commands_of_a_page_run(path, tmp_path):
    page_folder(path, tmp_path)
    lines = typed(path)
    pages = {"PAGES": "1"} if path == README else {}
    for command in to_run(path):
        done = run_command(command, lines.get(command, ""), tmp_path, **pages)
        check_end(done, f"{name(path)}: {command}")
        length = re.search(r"--(?:[\w-]+\.max-steps|rl\.num-iterations) (\d+)", command)
        if length and (folder := re.search(r"--output-dir (\S+)", command)):
            rows = records.read_rows(tmp_path / folder[1] / "metrics.jsonl")
            assert rows[-1]["step"] == int(length[1]), command
    if path.stem == "reproducibility":  # the runs that it compares learn in each iteration
        rows = (tmp_path / "runs" / "first" / "metrics.jsonl").read_text("utf-8").splitlines()
        assert [row["grad_norm"] > 0.1 for row in map(json.loads, rows) if "grad_norm" in row] == [
            True
        ] * 3


def test_readmes_commands_make_the_files_that_they_read(tmp_path, monkeypatch):
    """On a fresh checkout: what no command before has made would be a file of the reader's."""
    monkeypatch.chdir(tmp_path)
    for file, (_, rows) in demo.FILES.items():
        monkeypatch.setitem(demo.FILES, file, (64, rows))
    monkeypatch.setattr("rlhf_jax.cli.data.show", lambda text: None)
    made = {"demo", "runs"}  # what comes with the package, and what its commands write
    for command in commands(README):
        program, *words = shlex.split(command.partition(" #")[0])
        if program == "echo":
            assert words[-2] == ">"
            (tmp_path / words[-1]).write_text(" ".join(words[:-2]) + "\n")
        elif words[0] == "data":
            assert cli.run(words) in (None, 0)
        elif words[0] in stages.STAGES:
            sources = re.findall(r"--data (\S+)", command) + re.findall(r"'(\S+\.py):", command)
            for source in sources:
                assert Path(source).is_file() or source.partition("/")[0] in made, source
    text = Path("mine.py").read_text()
    exec(compile(text, "mine.py", "exec"), mine := {})
    assert mine["score"](["p"], ["12345"], other=[1]) == [0.05]


def test_readmes_first_screen_is_what_the_first_fifteen_minutes_run():
    """`.ci/run` starts that script, which follows the page of one's own preferences too."""
    first = README.read_text("utf-8").partition("\n## ")[2].partition("\n## ")[0]
    shown = re.findall(r"^    (?:pip install -e \. && )?(rlhf-jax .*)$", first, re.MULTILINE)
    assert shown == list(FIRST)[:2]
    assert first.index("python3 -m venv") < first.index("pip install")
    assert "tests/fifteen_minutes.py" in (ROOT / ".ci" / "run").read_text("utf-8")
    assert len(outputs(PAGE)) == 2
    assert set(outputs(PAGE)) < set(typed(PAGE)) == set(commands(PAGE))


def test_the_data_of_the_chat_model_page_is_what_the_page_says(tmp_path, monkeypatch):
    """Half the demonstrations earn the reward, and nothing held out was trained on."""
    monkeypatch.chdir(tmp_path)
    files = {file_of(block): block.text for block in blocks(OWN_MODEL) if file_of(block)}
    exec(files["make_data.py"], {})
    shown = json_lines(Path("demonstrations.jsonl"))
    asked = json_lines(Path("prompts.jsonl"))
    held_out = json_lines(Path("held_out.jsonl"))
    exec(files["cites.py"], page := {})

    def scores(rows, responses):
        prompts, notes, facts = ([row[k] for row in rows] for k in ("prompt", "note", "fact"))
        return page["cites"](prompts, responses, notes, facts)

    earned = scores(asked, [row["response"] for row in shown])
    assert 0.4 < sum(earned) / len(earned) < 0.6
    assert set(earned) == {0.0, 1.0}
    assert len({row["prompt"] for row in asked}) == len(asked) == 192
    assert len({row["prompt"] for row in held_out}) == len(held_out) == 48
    assert not {row["prompt"].partition("?")[0] for row in held_out} & {
        row["prompt"].partition("?")[0] for row in asked
    }
    last = held_out[0]
    good = f"The zoo opens {last['fact']}. [{last['note']}]"
    others = [good + " Bye.", good.replace(last["fact"], "at 9"), "so " * 15 + good]
    assert scores([last] * 4, [good, *others]) == [1, 0, 0, 0]
    assert check.check(sorted(map(str, tmp_path.glob("*.jsonl")))).num_problems == 0


def test_readmes_results_are_the_published_ones():
    """Of the first seed; those of the tutorial as its page says."""
    text = README.read_text("utf-8").partition("\n## What was learned\n")[2].partition("\n## ")[0]
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| [")]
    rows = {re.search(r"docs/([\w-]+)\.md", row[0])[1]: row[1:4] for row in cells}
    for page, variant, metric in (
        ("quickstart", "quickstart", "PPO beats SFT"),
        ("sums", "held out", "sampled after"),
    ):
        file = json.loads((ROOT / "docs" / "results" / f"{page}.json").read_text("utf-8"))
        value = {(row["variant"], row["seed"], row["metric"]): row["value"] for row in file["rows"]}
        found = [value[variant, 0, metric + edge] for edge in ("", " low", " high")]
        score, low, high = (f"{number:.2f}".removeprefix("0") for number in found)
        assert rows[page][2] == f"{score} ({low} to {high})"
    num, before, after = rows[OWN_MODEL.stem]
    page = OWN_MODEL.read_text("utf-8")
    assert f"| model | score, n = {num} |" in page
    assert f"\n| SmolLM2-135M-Instruct | {before} |" in page
    assert re.search(rf"^\| after GRPO, .* \| {re.escape(after)} \|", page, re.MULTILINE)


def test_a_picture_of_a_terminal_is_compared_without_numbers_and_answers():
    shown = (pictures.PICTURES / "chat.svg").read_text("utf-8")
    same = re.sub(r"score&#160;-?[\d.]+", "score&#160;9.999", shown)
    same = re.sub("nobody", "somebody", same)
    assert same != shown
    assert pictures.said_in(same) == pictures.said_in(shown)
    assert "--compareruns/quickstart/sft" in pictures.said_in(shown)
    for line in ("/quit", "reset"):
        assert pictures.said_in(shown.replace(line, "other")) != pictures.said_in(shown)
    run = (pictures.PICTURES / "console.svg").read_text("utf-8")
    alerted = run.replace("no&#160;alert.", "1&#160;alert:&#160;KL&#160;explosion.")
    assert alerted != run
    assert pictures.said_in(alerted) == pictures.said_in(run)
    assert re.search(r"savedruns/shown/report.htmlNext,.*rlhf-jaxexport", pictures.said_in(run))


def test_an_output_is_compared_up_to_its_numbers():
    shown = "6 of 6 pairs: 5 preferences\nout.jsonl: 6 rows\n"
    assert ends_as_shown("a:\n\n6 of 6 pairs: 4 preferences\nout.jsonl: 12 rows\n", shown)
    assert not ends_as_shown("6 of 6 pairs: 5 preferences\nout.jsonl: no rows\n", shown)
    assert not ends_as_shown(shown + "and more\n", shown)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if snippets(path)], ids=name)
def test_the_python_of_a_page_runs(path, tmp_path):
    page_folder(path, tmp_path)
    texts = [
        "\n" * (block.line - 1) + block.text for block in snippets(path)
    ]  # where the page has it, for tracebacks
    lines = [f"exec(compile({text!r}, {name(path)!r}, 'exec'), main)" for text in texts]
    script = tmp_path / "page.py"
    script.write_text("\n".join(["main = {'__name__': '__main__'}", *lines, ""]), "utf-8")
    done = forks.run(["python", script], tmp_path)
    check_end(done, f"{name(path)}, its python blocks")
    if path == README:
        assert float(re.search(r"token 7 ([\d.]+) times out of 8", done.stdout)[1]) > 7


@pytest.mark.slow
@pytest.mark.parametrize("path", PROGRAMS, ids=name)
def test_a_program_runs_and_is_on_a_page(path, tmp_path):
    """Programs end with their own checks."""
    check_end(forks.run(["python", path], tmp_path), name(path))
    included = [page for page in PAGES if f"programs/{path.name}" in page.read_text("utf-8")]
    assert len(included) == 1


def test_the_tests_that_a_page_names_exist():
    """`FILE::TEST` in the table of faults, and the files of the table of features."""
    text = (ROOT / "docs" / "reproducibility.md").read_text("utf-8")
    named = set(re.findall(r"`(\w+)::(\w+)`", text))
    assert len(named) > 8
    for module, function in named:
        source = (ROOT / "tests" / f"{module}.py").read_text("utf-8")
        assert re.search(rf"^def {function}\(", source, re.MULTILINE), f"{module}: no {function}"
    features = COMING.read_text("utf-8").partition("\n## Features\n")[2]
    rows = [line.rpartition(" | ")[2] for line in features.splitlines() if "`test_" in line]
    assert len(rows) > 15
    for file in re.findall(r"`(test_\w+)`", "\n".join(rows)):
        assert (ROOT / "tests" / f"{file}.py").exists(), file


@pytest.mark.slow
def test_the_same_jobs_are_commands_that_parse():
    """Each example has their command and ours; ours reads every flag that it has."""
    part = COMING.read_text("utf-8").partition("## The same job")[2].partition("\n## ")[0]
    examples = re.findall(r"^rlhf-jax .*(?:\n    .*)*", part, re.MULTILINE)
    ran = []
    for example in examples:
        _, name, *flags = shlex.split(example.replace("\n", " "))
        stage = stages.STAGES[name]
        kind = name.replace("-", "_")
        given = config.parse(RunConfig, flags, sections=(*stage.reads, kind))
        assert given.model
        assert given.data
        ran.append(name)
    assert ran == ["sft", "reward-model", "dpo", "kto", "ppo", "grpo"]


@pytest.mark.slow
def test_twenty_public_jobs_are_commands_of_five_lines_that_fit():
    """Every flag is read by its stage, and batches divide."""
    text = COMING.read_text("utf-8").partition("\n## Public jobs\n")[2].partition("\n## ")[0]
    jobs = re.findall(r"^rlhf-jax .*(?:\n    .*)*", text, re.MULTILINE)
    assert len(jobs) == 20
    for job in jobs:
        assert len(job.splitlines()) <= 5, job
        _, name, *flags = shlex.split(job.replace("\n", " "))
        kind = name.replace("-", "_")
        given = config.parse(RunConfig, flags, sections=(*stages.STAGES[name].reads, kind))
        if name in config.ALGORITHMS:
            method.check_settings(name, given.rl, getattr(given, name), layout_of(given))
        else:
            check_sizes(
                getattr(training, kind).TASK, getattr(given, kind), given.text, layout_of(given)
            )


def test_an_unknown_flag_of_theirs_is_told_ours_as_the_page_says():
    with pytest.raises(UserError) as caught:
        config.parse(RunConfig, ["--num_generations", "8"], sections=("grpo.group_size",))
    assert f"error: {caught.value}\n" in COMING.read_text("utf-8")


def script_of(file):
    """A script of the page of those who come from TRL."""
    return next(block.text for block in blocks(TRL) if file_of(block) == file)


def keywords_of(file, function):
    """The arguments of a call in a script for TRL that are numbers or texts, by their names."""
    calls = [node for node in ast.walk(ast.parse(script_of(file))) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if getattr(node.func, "id", "") == function)
    return {word.arg: ast.literal_eval(word.value) for word in call.keywords}


@pytest.fixture
def trained(monkeypatch):
    """What the page's Python asks for in its section on PPO: the two configs, without training."""
    asked = []
    monkeypatch.setitem(sys.modules, "rows", rows := types.ModuleType("rows"))
    exec(script_of("rows.py"), vars(rows))

    def run(config, *given, data):
        asked.append((config, data))
        return types.SimpleNamespace(rows=[])

    for stage in (training.reward_model, training.rl):
        monkeypatch.setattr(stage, "run", run)
    (snippet,) = (block.text for block in snippets(TRL) if "reward_model.run(" in block.text)
    exec(snippet, {})
    (reward, pairs), (policy, prompts) = asked
    assert (pairs, prompts) == (rows.pairs, rows.prompts)
    assert policy.reward == (reward.output_dir,)
    assert policy.model == reward.model
    return reward.reward_model, policy.ppo, policy.rl


def test_a_reward_model_and_ppo_of_trl_have_the_settings_of_ours_beside_them(trained):
    reward, ppo, rl = trained
    theirs = keywords_of("trl_reward.py", "RewardConfig")
    assert theirs["max_steps"] == reward.max_steps
    assert theirs["learning_rate"] == reward.optimizer.learning_rate
    assert theirs["per_device_train_batch_size"] == reward.batch_size
    assert reward.normalize_samples == reward.validation_fraction == 0

    theirs = keywords_of("trl_ppo.py", "PPOConfig")
    assert theirs["total_episodes"] == rl.num_iterations * rl.batch_size
    assert theirs["per_device_train_batch_size"] == rl.batch_size
    assert theirs["learning_rate"] == rl.optimizer.learning_rate
    names = ("kl_coef", "response_length", "temperature")
    values = (rl.kl_coef, rl.max_new_tokens, rl.temperature)
    assert tuple(theirs[name] for name in names) == values
    assert theirs["stop_token"] == "eos"
    assert (rl.optimizer.max_grad_norm, rl.validation_fraction) == (None, 0)

    defaults = {name: ast.literal_eval(there) for name, there, *_ in settings_of_ppo() if there}
    passes = defaults["num_ppo_epochs"], defaults["num_mini_batches"]
    assert passes == (ppo.num_epochs, ppo.num_minibatches)
    assert (defaults["lam"], defaults["gamma"]) == (ppo.gae_lambda, ppo.gamma)
    assert defaults["cliprange"] == ppo.clip_low == ppo.clip_high
    value = defaults["cliprange_value"], defaults["vf_coef"]
    assert value == (ppo.value_clip, ppo.value_coef)
    assert (ppo.value, ppo.value_from, ppo.normalize_returns) == ("separate", "reward", False)


def test_the_two_commands_of_ppo_by_trl_are_the_python_above_them(trained):
    reward, ppo, rl = trained
    typed = {}
    for command in commands(TRL):
        _, stage, *flags = shlex.split(command)
        if "runs/reward-trl" in flags:
            sections = (*stages.STAGES[stage].reads, stage.replace("-", "_"))
            typed[stage] = config.parse(RunConfig, flags, sections=sections)
    assert typed["reward-model"].reward_model == reward
    assert typed["ppo"].reward == (typed["reward-model"].output_dir,)
    assert typed["ppo"].ppo == ppo
    assert typed["ppo"].rl.kl_coef in (None, 0.05)
    assert replace(typed["ppo"].rl, kl_coef=rl.kl_coef) == rl


def settings_of_ppo():
    """(name, default there, {key: default here}, {key: value by `--config trl`}) of a table; a
    default that is no plain number or word is an empty text."""
    table = TRL.read_text("utf-8").partition("| `PPOConfig`, 1.12 |")[2].partition("\n\n")[0]
    plain = re.compile(r"^(None|True|False|[\d.]+(?:e-\d+)?)(?=$|[,:;])")
    for theirs, there, here, by_trl in re.findall(
        r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", table, re.MULTILINE
    ):
        found = dict(re.findall(r"`([a-z]+\.[\w.]+)` ([\w.-]+?)(?=[:,]|$)", here))
        preset = dict(re.findall(r"`([a-z]+\.[\w.]+)` ([\w.-]+)", by_trl))
        if not preset and (said := re.match(r"[\d.e-]+|null|true|false", by_trl)):
            preset = dict.fromkeys(found, said[0])
        yield theirs, there if plain.fullmatch(there) else "", found, preset


def test_the_table_of_ppos_settings_has_the_defaults_here_and_of_the_preset():
    preset = yaml.safe_load(config.to_yaml(config.parse(RunConfig, ["--config", "trl"])))
    rows = list(settings_of_ppo())
    assert len(rows) == 20
    seen = 0
    for theirs, _, here, by_trl in rows:
        for given, values in ((here, defaults()), (by_trl, preset)):
            for key, said in given.items():
                value = functools.reduce(lambda part, name: part[name], key.split("."), values)
                assert value == yaml.safe_load(said), (theirs, key, said)
                seen += 1
    assert seen > 30


def run_by_torch(file, folder):
    """A script of the page, by the Python of the tests."""
    settings = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, file],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **settings},
    )
    check_end(done, file)
    return done.stdout


@pytest.mark.parity
def test_the_scripts_for_trl_run(tmp_path):
    """All but that of PPO, which the newest TRL does not have."""
    pytest.importorskip("trl")
    page_folder(TRL, tmp_path)
    for stage in ("sft", "dpo", "reward", "grpo"):
        run_by_torch(f"trl_{stage}.py", tmp_path)
        assert (tmp_path / "trl" / stage / "model.safetensors").exists(), stage
    files = {file_of(block) for block in blocks(TRL)}
    assert sum(str(file).startswith("trl_") for file in files) == 5


@pytest.mark.parity
def test_the_script_for_trls_ppo_runs(tmp_path):
    ppo = pytest.importorskip("trl.experimental.ppo")  # of the TRL of the extra "benchmarks"
    page_folder(TRL, tmp_path)
    for stage in ("sft", "reward", "ppo"):
        said = run_by_torch(f"trl_{stage}.py", tmp_path)
    scores = json.loads(said.strip().splitlines()[-1])
    assert len(scores) == 3
    assert all(-100 < score < 100 for score in scores)
    for theirs, there, *_ in settings_of_ppo():
        value = ppo.PPOConfig.__dataclass_fields__[theirs].default
        assert not there or value == ast.literal_eval(there), theirs

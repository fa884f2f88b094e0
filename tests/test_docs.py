"""The documentation's commands and code run as written; its flags, keys, defaults, examples and links are true.

In docs/ a command is a line ``$ ...`` of a ``console`` block; a block that opens with ``# NAME.py`` is that file, other
``python`` blocks run. ``text`` blocks are not run. In README a command is an indented line. A backslash at the end of a
line continues it.
"""

import dataclasses
import functools
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tyro
import yaml
from shakespeare import ShakespeareConfig

from rlhf_jax import cli, config
from rlhf_jax.data import check, demo

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PROGRAMS = ROOT / "docs" / "compose.md"  # each of its blocks runs without the others
PAGES = [README, *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
BLOCK = re.compile(r"^```(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
KEY = re.compile(r"^\| `([a-z0-9_.]+)` \| `([^`]*)` \|", re.MULTILINE)

RUN_BY_TEST_SCRIPTS = {
    *(f"python experiments/{name}.py --config configs/tiny.yaml" for name in ("sft", "dpo", "ppo")),
    "python experiments/pipeline.py --config configs/tiny.yaml --output-dir runs/tiny",
    "rlhf-jax report runs/tiny",
}
# What README says that this test does not run.
NOT_RUN = {
    "pip install": "changes the environment; .ci/run starts with these commands",
    "python experiments/quickstart.py": "takes minutes; tests/test_quickstart.py runs it",
    "pytest": "is what runs this test",
}
MINE = "def score(prompts, responses):\n    return [float(len(response) > 10) for response in responses]\n"


class Block(NamedTuple):
    """A fenced block, or a command: the word after the fence, its text, and the line on which that text starts."""

    language: str
    text: str
    line: int


def name(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path):
    text = path.read_text("utf-8")
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in BLOCK.finditer(text)]


def commands(path):
    """In the order of the page; a command that goes on in the next line, after a backslash, is one."""
    found = []
    if path == README:
        text = BLOCK.sub(lambda match: "\n" * match[0].count("\n"), path.read_text("utf-8"))
        sources, mark = [Block("", text, 1)], "    "
    else:
        sources, mark = [block for block in blocks(path) if block.language == "console"], "$ "
    for block in sources:
        for number, line in enumerate(re.sub(r" *\\\n *", " ", block.text).rstrip("\n").split("\n"), block.line):
            assert line.startswith(mark) or path == README, f"{name(path)}, line {number}: no '$ ' before a command"
            if line.startswith(mark) and not line.removeprefix(mark).startswith(tuple(NOT_RUN)):
                found.append(Block("", line.removeprefix(mark), number))
    return found


def file_of(block):
    """The name of the file that a block is, if it is one."""
    match = re.match(r"# ([\w-]+\.(?:py|yaml))\n", block.text)
    return match[1] if match else None


def snippets(path):
    """Python blocks that run; README's is run by tests/test_readme.py."""
    return [b for b in blocks(path) if b.language == "python" and not file_of(b) and path != README]


def each(blocks_of):
    """A test of every block that ``blocks_of`` finds on a page."""
    found = [(path, block) for path in PAGES for block in blocks_of(path)]
    return pytest.mark.parametrize(("path", "block"), found, ids=[f"{name(p)}:{block.line}" for p, block in found])


def test_there_is_something_to_run():
    assert len([command for path in PAGES for command in commands(path)]) > 25
    assert {name(path) for path in PAGES if snippets(path)} >= {"docs/updates.md", "docs/rewards.md"}
    assert len(snippets(PROGRAMS)) == 4
    languages = "console text python json yaml {toctree} {eval-rst} {literalinclude}"
    assert {block.language for path in PAGES for block in blocks(path)} <= set(languages.split())


class UnderstoodError(Exception):
    """Carries what a command line was read as, in place of the work that would follow."""


def understood_as(program, argv, monkeypatch):
    """What a script or ``rlhf-jax`` reads its flags as: a config, or the name of the function that it would call."""
    parse, read, read_one = config.parse, tyro.cli, tyro.extras.subcommand_cli_from_dict

    def named(function):
        return functools.wraps(function)(lambda *arguments, **keywords: function.__name__)

    def parse_only(*arguments, **keywords):
        raise UnderstoodError(parse(*arguments, **keywords))

    def read_only(function, **keywords):
        if dataclasses.is_dataclass(function):  # from within config.parse
            return read(function, **keywords)
        raise UnderstoodError(read(named(function), **keywords))

    def read_one_only(functions, **keywords):
        raise UnderstoodError(read_one({name: named(function) for name, function in functions.items()}, **keywords))

    monkeypatch.setattr(config, "parse", parse_only)
    monkeypatch.setattr(tyro, "cli", read_only)
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", read_one_only)
    monkeypatch.setattr(sys, "argv", [program, *argv])
    with pytest.raises(UnderstoodError) as understood:
        cli.main() if program == "rlhf-jax" else runpy.run_path(program, run_name="__main__")
    return understood.value.args[0]


@each(lambda path: [command for command in commands(path) if "--help" not in command.text])
def test_a_command_is_understood(path, block, monkeypatch):
    program, *argv = shlex.split(block.text, comments=True)
    monkeypatch.chdir(ROOT)
    if program == "python":
        program, *argv = argv
    elif program == "cmp":
        return
    assert isinstance(understood_as(program, argv, monkeypatch), (config.RunConfig, str))


@pytest.mark.parametrize("path", [path for path in PAGES if KEY.search(path.read_text("utf-8"))], ids=name)
def test_tables_name_real_keys_and_their_defaults(path):
    settings = yaml.safe_load(config.to_yaml(config.RunConfig()))
    for key, default in KEY.findall(path.read_text("utf-8")):
        value = functools.reduce(lambda section, part: section[part], key.split("."), settings)
        assert value == yaml.safe_load(default.replace("\\|", "|")), f"{name(path)}: {key} is {value!r} by default"


def all_flags():
    """All settings as the dotted flags that set them, without ``--``."""

    def walk(section, prefix):
        for key, value in section.items():
            flag = prefix + key.replace("_", "-")
            yield from walk(value, f"{flag}.") if isinstance(value, dict) else [flag]

    return set(walk(yaml.safe_load(config.to_yaml(ShakespeareConfig())), ""))


def test_every_flag_of_the_pipeline_is_mapped_to_one_that_exists():
    page = (ROOT / "docs" / "coming_from.md").read_text("utf-8")
    section = page.partition("## RLHF pipeline")[2].partition("\n## ")[0]
    theirs = "model_name data_path output_dir num_epochs batch_size base_model sft_model_path reward_model_path"
    assert set(re.findall(r"`--(\w+)`", section)) >= {*theirs.split(), "prompts_path", "num_episodes", "use_wandb"}
    assert set(re.findall(r"--([a-z][a-z0-9-]*(?:\.[a-z0-9-]+)+)", page)) <= all_flags()


def test_commands_that_train_gpt2_say_at_which_rate():
    """The defaults of SFT and reward models are for random weights."""
    page = (ROOT / "docs" / "coming_from.md").read_text("utf-8")
    commands = re.findall(r"`(python [^`]*--model gpt2[^`]*)`", page)
    assert len(commands) == 2
    assert all(re.search(r"--[a-z-]+\.optimizer\.learning-rate [1-5]e-[56]", command) for command in commands)


def test_troubleshooting_turns_settings_that_exist():
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    parts = re.split(r"^## (.*)$", page, flags=re.MULTILINE)
    assert parts[1:8:2] == ["Out of memory", "Reward hacking", "Mode collapse", "Poor results"]
    for heading, text in zip(parts[1:8:2], parts[2:9:2], strict=True):
        assert "| look at |" in text
        turned = re.findall(r"^\| `--([\w.-]+)", text, re.MULTILINE)
        assert len(turned) >= 3, heading
        assert set(turned) <= all_flags(), heading


@each(lambda path: [block for block in blocks(path) if block.language == "json"])
def test_an_example_of_data_is_read(path, block, tmp_path):
    file = tmp_path / "example.jsonl"
    file.write_text(block.text, "utf-8")
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
    listed = "\n".join(block.text for block in blocks(ROOT / "docs" / "index.md")).split("\n")
    pages = {name(path).removeprefix("docs/").removesuffix(".md") for path in PAGES if path != README}
    assert pages - {"index"} <= set(listed)


def run(command, where, folder):
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{where}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def page_folder(path, folder):
    """A working directory as a reader has it: the repository's scripts and configs, and files of one's own."""
    for part in ("experiments", "configs"):
        (folder / part).symlink_to(ROOT / part)
    if path == README:
        demo.write(folder, num_demonstrations=256, num_pairs=256, num_prompts=96)
        (folder / "mine.py").write_text(MINE, "utf-8")
    for block in blocks(path):
        if file := file_of(block):
            (folder / file).write_text(block.text, "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(p, id=name(p)) for p in PAGES if commands(p)])
def test_the_commands_of_a_page_run(path, tmp_path):
    page_folder(path, tmp_path)
    for command in commands(path):
        if command.text in RUN_BY_TEST_SCRIPTS:
            continue
        run(shlex.split(command.text, comments=True), f"{name(path)}, line {command.line}: {command.text}", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(p, id=name(p)) for p in PAGES if snippets(p)])
def test_the_python_of_a_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles in half the time
    page_folder(path, tmp_path)
    texts = ["\n" * (block.line - 1) + block.text for block in snippets(path)]  # where the page has it, for tracebacks
    names = "{**main}" if path == PROGRAMS else "main"
    lines = [f"exec(compile({text!r}, {name(path)!r}, 'exec'), {names})" for text in texts]
    script = tmp_path / "page.py"
    script.write_text("\n".join(["main = {'__name__': '__main__'}", *lines, ""]), "utf-8")
    run([sys.executable, str(script)], f"{name(path)}, its python blocks", tmp_path)

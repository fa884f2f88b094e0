"""reasoning-gym: its rows as data, and its verifiers as rewards."""

import json

import pytest

from rlhf_jax import cli
from rlhf_jax.data import check
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError
from rlhf_jax.graders import spec, verifiable
from rlhf_jax.graders.worker import Worker

pytest.importorskip("reasoning_gym")  # its dependencies are compiled: no part of [test]
LEGS = "leg_counting/0/0"  # 500 legs


@pytest.fixture(scope="module")
def score():
    fn = verifiable.gym("leg_counting")
    return lambda response, prompt="": fn([prompt], [response], [LEGS])[0]


def worker_score(name, answer):
    told = verifiable._gym.ask([name, answer], 60)
    return 0.0 if isinstance(told, str) else told


def test_rows_are_a_function_of_task_seed_and_number(tmp_path, capsys):
    command = ["data", "gym", "leg_counting", "--count"]
    cli.run([*command, "3", "--out", str(tmp_path / "a.jsonl")])
    written = (tmp_path / "a.jsonl").read_text()
    assert capsys.readouterr().out == ""
    cli.run([*command, "4"])
    longer = capsys.readouterr().out
    assert longer.startswith(written)
    rows = list(map(json.loads, longer.splitlines()))
    assert [row["gym"] for row in rows] == [f"leg_counting/0/{number}" for number in range(4)]
    assert verifiable._gym.ask(["leg_counting/0/500"], 60)["prompt"] != rows[0]["prompt"]
    assert rows[0]["answer"] == "500"
    # Worked out by hand: 8 legs of a spider, 6 of an insect, 10 of a crab, 14 of a woodlouse.
    legs = 5 * 6 + 8 * 0 + 6 * 4 + 10 * 8 + 15 * 8 + 15 * 6 + 4 * 6 + 9 * 10 + 3 * 14
    assert "5 grasshoppers, 8 jellyfishs, 6 tigers, 10 scorpions, 15 spiders" in rows[0]["prompt"]
    assert legs == 500
    cli.run([*command, "4", "--seed", "1"])
    others = map(json.loads, capsys.readouterr().out.splitlines())
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in others}
    report = check.check([str(tmp_path / "a.jsonl")])
    assert report.num_problems == 0
    assert "3 prompts kept" in report.text


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("500", 1),
        (" 500\n", 1),
        ("5 and 8 ... <answer>500</answer> or so", 1),
        ("<answer>1</answer> no, <answer> 500 </answer>", 1),
        ("so \\boxed{500}", 1),
        ("<answer>\\boxed{500}</answer>", 1),
        ("<think>501?</think>500", 1),
        ("<answer>499</answer>", 0),
        ("\\boxed{500} or <answer>499</answer>", 0),
        ("<think>500", 0),
        ("<answer></answer> 500", 0),
        ("  ", 0),
        ("", 0),
    ],
)
def test_the_answer_of_a_response_is_verified(score, response, expected):
    assert score(response) == expected


def test_a_part_of_an_answer_has_what_the_verifier_gives_it(score):
    assert score("It is 500") == pytest.approx(3 / 9)  # its share of the text
    assert score("500", prompt="... <think>") == 0


def test_a_row_of_another_task_is_named(score):
    fn = verifiable.gym("gcd")
    for name in (LEGS, None, "gcd/0", "gcd/0/0/0", 7):
        with pytest.raises(UserError, match=r"'How many\?' has .* `rlhf-jax data gym gcd"):
            fn(["How many?"], ["1"], [name])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("leg_countin --count 1", "no task 'leg_countin'; did you mean leg_counting?"),
        ("composite --count 1", "no task 'composite'"),
        ("gcd --count 0", "count from 1 .* 0"),
        ("gcd --count 1000001", "count from 1 .* 1000001"),
        ("gcd --count 1 --seed 4001", "4001"),
        ("gcd --count 1 --seed -1", "-1"),
        ("gcd --count 1 --out /dev/null/x", "/dev/null/x"),
    ],
)
def test_what_cannot_be_written_is_said(line, says):
    with pytest.raises(UserError, match=says):
        cli.run(["data", "gym", *line.split()])


def test_the_reward_of_a_run_needs_the_rows(monkeypatch):
    def build(entry, columns):
        return spec.build_reward([entry], tokenizer=characters("ab"), load=None, columns=columns)

    assert build("gym:gcd", ["gym"]).host is not None
    with pytest.raises(UserError, match=r"--reward gym:gcd: .*`rlhf-jax data gym gcd`"):
        build("gym:gcd", ["answer"])
    with pytest.raises(UserError, match="'gdc'; did you mean gcd"):
        build("gym:gdc", ["gym"])
    assert spec.named("gym:gcd*2") == ("nothing", [])
    monkeypatch.setattr(verifiable.metadata, "distributions", lambda name: [])
    with pytest.raises(UserError, match=r"reasoning_gym 0\.1\.25; pip install"):
        build("gym:gcd", ["gym"])


def test_a_verifier_that_raises_gives_0_and_says_why(monkeypatch, caplog, score):
    assert score("500") == 1
    ask = verifiable._gym.ask
    told = "ValueError: nothing to read"
    monkeypatch.setattr(
        verifiable._gym, "ask", lambda line, *more: told if len(line) == 2 else ask(line, *more)
    )
    assert score("500") == 0
    assert f"{LEGS}: 0 for '500': {told}" in caplog.text


def test_a_verifier_that_hangs_gives_0_and_the_run_goes_on(tmp_path, monkeypatch, caplog, score):
    program = tmp_path / "sleeps.py"
    program.write_text(
        "import json, sys, time\n"
        "for line in sys.stdin:\n"
        "    print(1, flush=True) if len(json.loads(line)) == 1 else time.sleep(60)\n"
    )
    monkeypatch.setattr(verifiable, "_gym", Worker(program))
    monkeypatch.setattr(verifiable, "SECONDS", 0.2)
    assert score("500") == 0
    assert f"{LEGS}: 0 for '500': no score after 0.2 s" in caplog.text


EVALUATED = [
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
]


def attacks(file):
    call = f"__import__('os').system('touch {file}')"
    return [
        call,
        f"[{call}]",
        f"open('{file}', 'w')",
        f"[open('{file}', 'w') for x in [1]]",
        f"(lambda: open('{file}', 'w'))()",
        f"sin('''{call}''')",
        f"S('_' '_import_' '_(' 'o')+{call}",
        f"ｏｐｅｎ('{file}', 'w')",
        f"().__class__.__base__.__subclasses__()[0]+open('{file}', 'w')",
        "[0]*10**12",
        "[[0]*10**12]",
    ]


@pytest.mark.parametrize("task", EVALUATED)
def test_no_answer_is_run_as_a_program(task, tmp_path):
    """Nor does one that asks for much memory end the process, whose next replies would be slow."""
    file = tmp_path / "touched"
    process = verifiable._gym._process
    for attack in attacks(file):
        assert worker_score(f"{task}/0/0", attack) < 0.1
    assert not file.exists()
    assert process is None or verifiable._gym._process is process


def test_answers_that_are_evaluated_still_can_be_right():
    assert worker_score("countdown/0/0", verifiable.gym_rows("countdown", 0, 1)[0]["answer"]) == 1
    right = verifiable.gym_rows("simple_integration", 0, 1)[0]["answer"]
    assert worker_score("simple_integration/0/0", f"0 + {right.removesuffix(' + C')} + C") == 1
    assert worker_score("simple_integration/0/0", f"{right} + 7*sin(7*X)") < 1


NO_ORACLE = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


@pytest.mark.slow
def test_every_task_gives_its_own_answer_1_and_another_less():
    """After a journey through JSON, in a process that has made other rows before."""
    tasks = verifiable._gym.ask([""], 600)
    assert len(tasks) == 104
    without = set()
    again = Worker(verifiable._gym.program)
    for task in tasks:
        rows = json.loads(json.dumps(verifiable.gym_rows(task, 3, 3)))
        for row in rows:
            assert worker_score(row["gym"], "wrong zzz") < 1, row
            if row["answer"] is None:
                without.add(task)
                continue
            assert worker_score(row["gym"], row["answer"]) == 1, row
        assert again.ask([rows[-1]["gym"]], 600) == rows[-1]
    assert without == NO_ORACLE

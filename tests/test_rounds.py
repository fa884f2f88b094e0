"""Rounds of feedback: which part gets what from which, and how a job that stops goes on. Models are
stood in for by files that say what they were made from; a slow test trains real ones.
"""

import hashlib
import json
import re
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from builders import json_lines, save_base

from rlhf_jax import cli, config
from rlhf_jax.config import RewardModelStage, RLStage, Rounds, RunConfig, Text
from rlhf_jax.data import demo
from rlhf_jax.errors import Stopped, UserError, logger
from rlhf_jax.inference import rounds
from rlhf_jax.inference.labelling import pairs, serve
from rlhf_jax.inference.rounds import compare, job, page
from rlhf_jax.inference.rounds.folders import Round
from rlhf_jax.runs.writing import write_atomically

PROMPTS = [{"prompt": f"prompt {i}", "kind": "odd" if i % 2 else "even"} for i in range(12)]
JUDGE = """
def longer(first, second, kind):
    return [0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(first, second)]

def first_is_better(first, second):
    return [1.0 for _ in first]

def unsure(prompts, first, second, kind):
    better = [float(a > b) for a, b in zip(first, second)]
    return [None if k == "odd" else share for k, share in zip(kind, better)]

def gold(prompts, responses, kind):
    return [float(len(text)) for text in responses]
"""


def digest(*parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def content(folder):
    """What a stand-in's model was made from."""
    return (Path(folder) / "made.txt").read_bytes()


class Stands:
    """Stand-ins of all that computes. ``calls`` has what each was given; after the part of number
    ``stop_after`` the process ends, before the next is begun.
    """

    def __init__(self, stop_after=None):
        self.calls = []
        self.num_done = 0
        self.stop_after = stop_after

    def done(self):
        self.num_done += 1
        if self.num_done == self.stop_after:
            raise KeyboardInterrupt

    def open_policy(self, folder, settings, *, batch_size):
        made = content(folder)
        self.calls.append(("sample", str(folder), settings))

        def sample(asked, seed):
            names = [f"{seed} {row.prompt} {i}".encode() for row in asked.rows for i in range(2)]
            return [digest(made, name)[: 4 + len(name) % 3] for name in names], None

        return SimpleNamespace(ask=lambda rows, number: SimpleNamespace(rows=rows), sample=sample)

    def trained(self, kind, given, data):
        self.calls.append((kind, given, data))
        read = [Path(name).read_bytes() for name in data if Path(name).exists()]
        seed = str(given.seed).encode()
        made = digest(kind.encode(), content(given.model), seed, *read)
        run = Path(given.output_dir)
        metrics = {"reward_model": "validation/accuracy", "rl": "objective/kl"}
        (run / "model").mkdir(parents=True, exist_ok=given.resume)
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, metrics[kind]: 0.5}) + "\n")
        (run / "model" / "made.txt").write_text(made)
        (run / "model" / "config.json").write_text("{}")
        (run / "report.html").write_text(made)
        self.done()

    def reward_model(self, given):
        self.trained("reward_model", given, given.reward_model.data)

    def rl(self, given, algorithm):
        reward = given.reward[0].removeprefix("mean:")
        self.trained("rl", given, [f"{reward}/made.txt"])
        self.calls[-1] += (algorithm.__name__,)

    def evaluate(self, folder, how):
        self.calls.append(("evaluate", folder, how))
        value = int(digest(content(folder)), 16) / 16**12
        ends = {"value": value, "low": value / 2, "high": (1 + value) / 2, "n": 4}
        rows = [
            {"category": category, "metric": metric, "unit": "prompts", "note": "", **ends}
            for category, metric in (page.WIN_RATE, page.QUALITY)
        ]
        Path(how.output).mkdir(parents=True)
        write_atomically(Path(how.output, "evaluation.json"), json.dumps({"rows": rows}))
        self.done()

    def write_rows(self, path, rows):
        write_rows(path, rows)
        self.done()

    def named(self, kind):
        return [call for call in self.calls if call[0] == kind]


write_rows = compare.write_rows


@pytest.fixture
def stand(monkeypatch):
    """Puts stand-ins in the place of what computes."""

    def stands(**given):
        made = Stands(**given)
        monkeypatch.setattr(compare.asking, "open_policy", made.open_policy)
        monkeypatch.setattr(compare.asking, "as_given", lambda row, tokenizer: row.prompt)
        monkeypatch.setattr(compare, "write_rows", made.write_rows)
        monkeypatch.setattr(job.reward_model, "run", made.reward_model)
        monkeypatch.setattr(job.rl, "run", made.rl)
        monkeypatch.setattr(job.evaluate, "run", made.evaluate)
        monkeypatch.setattr(job, "set_up", lambda config, folders: config)
        return made

    tokenizer = SimpleNamespace(fingerprint="one")
    monkeypatch.setattr(job, "load_tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr(job.chat, "template_of", lambda tokenizer, template: None)
    monkeypatch.setattr(compare.chat, "frame", lambda template, tokenizer: "")
    monkeypatch.setattr(compare.chat, "shown", lambda row, tokenizer: row.prompt)
    monkeypatch.setattr(page.page, "render", lambda *parts: repr(parts))
    return stands


@pytest.fixture
def given(tmp_path):
    """The settings of three rounds by a judge, in a folder of their own."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "made.txt").write_text("base")

    def made(output="job", number=3, choose="random", **of_rounds):
        how = {"pairs": 4, "judge": f"{tmp_path}/judge.py:longer"} | of_rounds
        how |= {"held_out": (str(tmp_path / "prompts.jsonl"),)}
        return RunConfig(
            model=str(tmp_path / "base"),
            data=(str(tmp_path / "prompts.jsonl"),),
            output_dir=str(tmp_path / output),
            rounds=Rounds(number=number, choose=choose, **how),
        )

    return made


def test_each_part_gets_what_the_rounds_before_made(stand, given, tmp_path):
    stands = stand()
    how = given()
    result = rounds.run(how)
    folders = [tmp_path / "job" / f"round-{i}" for i in (1, 2, 3)]
    policies = [how.model, *(str(folder / "rl" / "model") for folder in folders)]
    assert [call[1] for call in stands.named("sample")] == policies[:3]
    learned = [call[1] for call in stands.named("reward_model")]
    prefs = [str(folder / "prefs.jsonl") for folder in folders]
    assert [own.reward_model.data for own in learned] == [(*prefs[:i],) for i in (1, 2, 3)]
    assert {own.model for own in learned} == {how.model}
    trained = [call[1] for call in stands.named("rl")]
    assert [own.model for own in trained] == policies[:3]
    rewards = [str(folder / "reward_model" / "model") for folder in folders]
    assert [own.reward for own in trained] == [(reward,) for reward in rewards]
    judged = stands.named("evaluate")
    assert [call[1] for call in judged] == policies[1:]
    assert [call[2].reward_model for call in judged] == rewards
    assert {call[2].against for call in judged} == {how.model}
    assert result.model_folder == folders[2] / "rl" / "model"
    assert [row["rows of preferences"] for row in result.figures] == [4, 4, 4]


def test_the_runs_of_a_round_have_settings_of_their_own(stand, given, tmp_path):
    stands = stand()
    own_rows = RewardModelStage(data=("before.jsonl",))
    how = replace(given(method="grpo"), reward_model=own_rows, columns=("prompt=prompt",))
    rounds.run(how)
    learned, trained = ([call[1] for call in stands.named(kind)] for kind in ("reward_model", "rl"))
    assert {call[3] for call in stands.named("rl")} == {"rlhf_jax.algorithms.grpo"}
    assert {own.reward_model.data[0] for own in learned} == {"before.jsonl"}
    assert {own.columns for own in learned} == {()}  # our rows have our keys
    assert {own.columns for own in trained} == {how.columns}
    for own in (*learned, *trained):
        assert own.rounds == Rounds()  # the runs of a job that is made longer stay the same
    seeds = [own.seed for own in learned]
    assert seeds == [own.seed for own in trained]
    assert len(set(seeds)) == 3
    sampled = stands.named("sample")[0][2]
    assert (sampled.max_new_tokens, sampled.temperature) == (how.rl.max_new_tokens, 1.0)


def test_an_ensemble_rewards_by_its_mean_and_chooses(stand, given, tmp_path, monkeypatch):
    stands = stand()
    asked = []

    def margins(folder, sampled):
        asked.append(folder)
        sign = (-1) ** len(asked)
        return np.array([sign * float(pair.number == 7) for pair in sampled])

    monkeypatch.setattr(pairs, "_margins", margins)
    models = [tmp_path / "job" / f"round-{i}" / "reward_model" / "model" for i in (1, 2)]
    monkeypatch.setattr(
        job.spec, "members", lambda folder: [Path(folder, f"member_{i}") for i in (0, 1)]
    )
    how = given(number=2, choose="disagreement", prompts=12, random_share=0.25)
    rounds.run(replace(how, reward_model=RewardModelStage(ensemble_size=2)))
    assert [call[1].reward for call in stands.named("rl")] == [
        (f"mean:{model}",) for model in models
    ]
    assert asked == [str(models[0] / f"member_{i}") for i in (0, 1)]
    first, second = (json_lines(tmp_path / "job" / f"round-{i}" / "pairs.jsonl") for i in (1, 2))
    assert {row["chosen_by"] for row in first} == {"random"}
    assert sorted(row["chosen_by"] for row in second) == ["disagreement"] * 3 + ["random"]
    order = np.random.default_rng(how.seed).permutation(12)
    assert order[7] in [row["row"] for row in second]
    for row in (*first, *second):
        assert row["prompt"] == PROMPTS[row["row"]]["prompt"]


@pytest.mark.slow
def test_a_job_that_stops_after_any_part_ends_with_the_same_bytes(stand, given, tmp_path):
    def files(folder):
        return {
            path.relative_to(folder): path.read_bytes().replace(bytes(folder), b"")
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    how = given("whole", number=2, gold=f"{tmp_path}/judge.py:gold")
    whole = stand()
    rounds.run(how)
    expected = files(tmp_path / "whole")
    assert whole.num_done == 11  # pairs, rows, two runs and an evaluation each, and the first one's
    for part in range(1, 12):
        stopped = tmp_path / f"stopped-{part:02}"
        how = replace(how, output_dir=str(stopped))
        stand(stop_after=part)
        with pytest.raises(KeyboardInterrupt):
            rounds.run(how)
        later = stand()
        rounds.run(replace(how, resume=True))
        assert later.num_done == 11 - part  # nothing is made twice
        assert files(stopped).keys() == expected.keys()
        for path, data in files(stopped).items():
            assert data == expected[path], (part, path)


def test_more_rounds_follow_and_other_settings_are_refused(stand, given, tmp_path):
    stand()
    how = given(number=1)
    rounds.run(how)
    stands = stand()
    longer = replace(how, resume=True, rounds=replace(how.rounds, number=2))
    first = tmp_path / "job" / "round-1" / "rl"
    (first / "report.html").unlink()  # killed when the model was saved, and the page was not
    assert len(rounds.run(longer).rounds) == 2
    again, second = (call[1] for call in stands.named("rl"))
    assert (again.output_dir, again.resume) == (str(first), True)
    assert not second.resume
    with pytest.raises(UserError, match=r"rounds\.pairs was 4 "):
        rounds.run(replace(longer, rounds=replace(how.rounds, pairs=5)))
    for name, said in (("judge.py", "pairs:"), ("base/made.txt", "model"), ("prompts.jsonl", "")):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(before + b"\n")
        with pytest.raises(UserError, match=f"{said}.* was '.* and is now"):
            rounds.run(longer)
        (tmp_path / name).write_bytes(before)
    assert len(rounds.run(longer).rounds) == 2


@pytest.mark.parametrize(
    ("changes", "of_rounds", "said"),
    [
        ({"model": None}, {}, "give --model"),
        ({}, {"judge": None}, "--rounds.annotators"),
        ({}, {"choose": "disagreement"}, "--reward-model.ensemble-size"),
        ({}, {"held_out": ()}, "--rounds.held-out"),
        ({"rl": RLStage(environment="a.py:f")}, {}, "--rl.environment"),
        ({"processes": "auto"}, {}, "--processes"),
        ({"overwrite": True}, {}, "people's judgements"),
        ({"resume": True}, {}, "does not exist"),
        ({}, {"judge": None, "annotators": ("ana",), "per_pair": 2}, "--per-pair 2"),
        ({}, {"pairs": 13}, "asks 13 prompts, and the data has 12"),
        ({}, {"judge": "no.py:f"}, "--rounds.judge no.py:f: no such file"),
    ],
)
def test_wrong_settings_are_a_sentence(changes, of_rounds, said, stand, given):
    stand()
    how = given()
    how = replace(how, rounds=replace(how.rounds, **of_rounds), **changes)
    with pytest.raises(UserError, match=said):
        rounds.run(how)


def test_settings_that_contradict_each_other():
    for given, said in (
        ({"pairs": 8, "prompts": 7}, "each of another prompt"),
        ({"judge": "a.py:f", "annotators": ("ana",)}, "either compares"),
    ):
        with pytest.raises(ValueError, match=said):
            Rounds(**given)


def test_a_folder_with_something_else_is_left_alone(stand, given, tmp_path):
    stand()
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds thesis.txt already"):
        rounds.run(given())
    rounds.run(given("other", number=1))
    with pytest.raises(UserError, match="give --resume"):
        rounds.run(given("other", number=1))


def test_no_prompt_comes_again_before_all_were_asked():
    rows = compare.Prompts([None] * 10, None, "auto")
    how = RunConfig(rounds=Rounds(pairs=2, prompts=5))
    drawn = [compare.prompts_of_round(rows, number, how.rounds, how.seed) for number in (1, 2, 3)]
    assert sorted(drawn[0] + drawn[1]) == [*range(10)]
    assert drawn[2] == drawn[0]
    assert drawn[0] != sorted(drawn[0])
    assert compare.prompts_of_round(rows, 1, how.rounds, 1) != drawn[0]


def compared(*responses):
    return [
        {"prompt": f"prompt {i}", "responses": [*both], "chosen_by": "random", "row": i}
        for i, both in enumerate(responses)
    ]


def judged(how, tmp_path, *responses, judge="longer"):
    rows = [SimpleNamespace(prompt=row["prompt"], columns={"kind": row["kind"]}) for row in PROMPTS]
    for row in rows:
        row.conversation = None
    tokenizer = SimpleNamespace(fingerprint="one")
    prompts = compare.Prompts(rows, tokenizer, "auto")
    how = replace(how, rounds=replace(how.rounds, judge=f"{tmp_path}/judge.py:{judge}"))
    return compare.by_judge(
        compared(*responses), prompts, how.rounds.judge, how.compute, how.judge, tmp_path / "judge"
    )


def test_a_judge_says_what_people_would_say(stand, given, tmp_path):
    how = given()
    first, second, tie = judged(how, tmp_path, ("long", "no"), ("no", "long"), ("abc", "xyz"))
    assert (first["chosen"], first["rejected"], first["annotator"]) == ("long", "no", "longer")
    assert (second["chosen"], second["rejected"]) == ("long", "no")
    assert (tie["responses"], tie["ranks"]) == (["abc", "xyz"], [0, 0])
    rows = judged(how, tmp_path, ("b", "a"), ("b", "a"), ("a", "b"), judge="unsure")
    assert [(row["prompt"], row["chosen"]) for row in rows] == [
        ("prompt 0", "b"),
        ("prompt 2", "b"),
    ]
    # A judge that prefers whatever stands first prefers nothing.
    (row,) = judged(how, tmp_path, ("b", "a"), judge="first_is_better")
    assert row["ranks"] == [0, 0]


def test_pairs_that_somebody_changed_are_refused(tmp_path):
    prompts = compare.Prompts([None] * 2, None, "auto")
    file = tmp_path / "pairs.jsonl"
    for row, said in (
        (compared(("a", "b"))[0] | {"row": 2}, "line 1: 'row' "),
        ({"prompt": "p"}, "expected keys prompt, responses, chosen_by, row"),
    ):
        write_rows(file, [row])
        with pytest.raises(UserError, match=said):
            compare.read_pairs(file, prompts)


def test_answers_that_are_all_equal_are_nothing_to_compare(stand, given, monkeypatch):
    stand()
    same = SimpleNamespace(
        ask=lambda rows, number: SimpleNamespace(rows=rows),
        sample=lambda asked, seed: (["same"] * 2 * len(asked.rows), None),
    )
    monkeypatch.setattr(compare.asking, "open_policy", lambda *args, **more: same)
    with pytest.raises(UserError, match="nothing to compare"):
        rounds.run(given())


def write_figures(own, win_rate, accuracy):
    """What the page reads of a round."""
    for run, metric in (("reward_model", "validation/accuracy"), ("rl", "objective/kl")):
        (own.folder / run).mkdir(parents=True, exist_ok=True)
        row = {"step": 3, metric: accuracy}
        (own.folder / run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    ends = {"value": win_rate, "low": win_rate - 0.1, "high": win_rate + 0.1, "n": 4}
    rows = [
        {"category": category, "metric": metric, "unit": "", "note": "", **ends}
        for category, metric in (page.WIN_RATE, page.QUALITY)
    ]
    own.evaluation.mkdir(parents=True, exist_ok=True)
    (own.evaluation / "evaluation.json").write_text(json.dumps({"rows": rows}))
    write_rows(own.prefs, [{"prompt": "p", "chosen": "a", "rejected": "b"}] * own.number)


@pytest.mark.parametrize("gold", [None, "judge.py:gold"])
def test_the_page_has_one_curve_over_the_rounds_and_says_who_judged(gold, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(page.figures, "element", lambda plot, salt: drawn.append(plot) or "<svg/>")
    every = [Round(number, tmp_path) for number in (0, 1, 2)]
    for own in every:
        write_figures(own, 0.25 * (1 + own.number), accuracy=0.5 + own.number / 8)
    rows = page.write(every[1:], Rounds(gold=gold, judge="a.py:f"))
    assert [row["win rate"] for row in rows] == [0.5, 0.75]
    assert rows[1]["win rate, 95% interval"] == "0.650 to 0.850"
    assert [row["rows of preferences"] for row in rows] == [1, 2]
    assert [row["reward model accuracy"] for row in rows] == [0.625, 0.75]
    curves = {plot.y_label: next(iter(plot.series.values())) for plot in drawn}
    rate = curves["share, ties half"]
    assert (rate.x, rate.y, rate.low) == ([1, 2], [0.5, 0.75], [0.4, 0.65])
    text = (tmp_path / "report.html").read_text("utf-8")
    if gold is None:
        assert list(curves) == ["share, ties half"]
        assert "the round&#39;s own reward model" in text
        assert "another reward model" in text
    else:
        assert (curves["score"].x, curves["score"].y) == ([0, 1, 2], [0.25, 0.5, 0.75])
        assert "the gold reward judge.py:gold" in text
        assert "another reward model" not in text


# --- People


class Person(threading.Thread):
    """Judges what the page shows, over HTTP, at most so often; then calls ``leave``."""

    def __init__(self, address, most, leave):
        super().__init__(daemon=True)
        self.origin, _, self.token = address.rpartition("/")
        self.most = most
        self.leave = leave

    def run(self):
        with httpx.Client(base_url=self.origin, headers={"Origin": self.origin}) as client:
            state = client.get(f"/{self.token}/pair").json()
            for _ in range(self.most):
                if state["pair"] is None:
                    break
                said = {"id": state["pair"]["id"], "choice": "a", "seconds": 1}
                state = client.post(f"/{self.token}/judgement", json=said).json()
        self.leave()


@pytest.fixture
def people(monkeypatch):
    """Starts a person at each address that the page logs. ``most``: their judgements; ``leave``:
    what they do then, given the server. ``tokens``: of their addresses.
    """
    how = SimpleNamespace(most=99, leave=lambda server: None, tokens=[])
    servers = []

    class Server(serve.uvicorn.Server):
        def __init__(self, *args):
            super().__init__(*args)
            servers.append(self)

    def note(message, *args):
        found = re.match(r"\w+: (http://\S+)$", str(message))
        if found:
            how.tokens.append(found[1].rpartition("/")[2])
            Person(found[1], how.most, lambda: how.leave(servers[-1])).start()

    monkeypatch.setattr(serve.uvicorn, "Server", Server)
    monkeypatch.setattr(logger, "info", note)
    monkeypatch.setattr(serve, "_WRITE_EVERY", 0.05)
    return how


def end(server):
    """As Ctrl-C does."""
    server.should_exit = True


def test_the_page_ends_when_all_is_judged_and_goes_on_if_it_was_ended(given, people, tmp_path):
    how = given(judge=None, annotators=("ana",), port=0)
    write_rows(tmp_path / "pairs.jsonl", compared(("a", "b"), ("c", "d"), ("e", "f")))
    asked = compare.page_of(
        tmp_path / "pairs.jsonl", tmp_path / "labels.jsonl", how.rounds, how.seed
    )
    people.most = 2
    people.leave = end
    with pytest.raises(Stopped, match="2 of 3 judgements so far") as stopped:
        compare.by_people(asked, tmp_path / "annotators")
    assert stopped.value.exit_code == 128 + signal.SIGINT
    people.most = 99
    people.leave = lambda server: None
    rows = compare.by_people(asked, tmp_path / "annotators")
    assert [row["prompt"] for row in rows] == ["prompt 0", "prompt 1", "prompt 2"]
    assert len(people.tokens) == 2
    assert len(set(people.tokens)) == 1


def test_a_page_of_no_job_stays_open(given, people, tmp_path):
    how = given(judge=None, annotators=("ana",), port=0)
    write_rows(tmp_path / "pairs.jsonl", compared(("a", "b")))
    stayed = []

    def leave(server):
        time.sleep(0.3)
        stayed.append(not server.should_exit)
        end(server)

    people.leave = leave
    serve.run(
        None,
        compare.page_of(tmp_path / "pairs.jsonl", tmp_path / "labels.jsonl", how.rounds, how.seed),
    )
    assert stayed == [True]


def test_people_have_one_address_in_all_rounds(stand, given, people, tmp_path):
    stand()
    how = given(judge=None, annotators=("ana,ben",), per_pair=2, port=0, number=2)
    result = rounds.run(how)
    first, second = (json_lines(own.prefs) for own in result.rounds)
    assert len(first) == len(second) == 4
    assert {tuple(row["annotators"]) for row in (*first, *second)} <= {
        ("ana", "ben"),
        ("ben", "ana"),
    }
    assert len(people.tokens) == 4
    assert len(set(people.tokens)) == 2
    text = (tmp_path / "job" / "report.html").read_text("utf-8")
    assert "16 of 8 pairs" in text  # a pair of the second round is no pair of the first


# --- Real models


def small_job(folder):
    """A file with the settings of two small rounds, and what they need."""
    data = folder / "data"
    sizes = {"prompts.json": 24, "heldout_prompts.json": 8, "sft_data.json": 64}
    demo.write(data, sizes=sizes)
    save_base(folder / "base", data)
    (folder / "judge.py").write_text(JUDGE.replace("kind", "category"))
    how = RunConfig(
        model=str(folder / "base"),
        data=(str(data / "prompts.json"),),
        output_dir=str(folder / "whole"),
        text=Text(template="{prompt}:", bucket_multiple=64),
        reward_model=RewardModelStage(batch_size=4, normalize_samples=8, ensemble_size=2),
        rl=RLStage(num_iterations=2, batch_size=4, max_new_tokens=4, validation_prompts=4),
        rounds=Rounds(
            number=2,
            pairs=6,
            prompts=8,
            choose="disagreement",
            judge=f"{folder}/judge.py:unsure",
            gold=f"{folder}/judge.py:gold",
            held_out=(str(data / "heldout_prompts.json"),),
        ),
    )
    file = folder / "job.yaml"
    file.write_text(config.to_yaml(how))
    return str(file)


@pytest.mark.slow
def test_real_rounds_and_one_that_stopped_in_the_middle_of_rl(tmp_path, monkeypatch):
    how = ["rounds", "--config", small_job(tmp_path), "--trust-config"]
    whole = tmp_path / "whole"
    assert not cli.run(how)
    assert not cli.run(["report", str(whole)])
    assert (whole / "stages.html").is_file()
    how += ["--output-dir", str(tmp_path / "stopped"), "--rounds.number", "1"]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job.rl, "run", partial(job.rl.run, on_step=stop))
        with pytest.raises(KeyboardInterrupt):
            cli.run(how)
    assert not cli.run([*how, "--resume"])
    one = Round(1, whole)
    other = Round(1, tmp_path / "stopped")
    members = "reward_model/model/member_1/model.safetensors"
    for name in ("pairs.jsonl", "prefs.jsonl", members, "rl/model/model.safetensors"):
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes(), name
    second = Round(2, whole)
    reasons = [row["chosen_by"] for row in json_lines(second.pairs)]
    assert sorted(set(reasons)) == ["disagreement", "random"]
    manifest = json.loads((second.reward_model / "manifest.json").read_text())
    assert {str(one.prefs), str(second.prefs)} <= manifest["data"].keys()
    assert not cli.run(["export", str(second.rl), str(tmp_path / "exported")])

"""The experiment of sums: which are held out, and how shares of right answers are counted."""

import pytest
import sums


def question(text):
    return f"What is {text}? Reply with the number only."


def test_an_answer_is_right_if_it_ends_with_the_number():
    said = ["12", "3 + 9 = 12.", "12 = 3 + 9", "112", "Twelve", "12 13"]
    assert sums.is_answer([], said, ["12"] * 6) == [1, 1, 0, 0, 0, 0]


def test_all_sums_are_there_once():
    rows = sums.problems(range(2, 5))
    texts = {question(f"{a} + {b}"): str(a + b) for a in (2, 3, 4) for b in (2, 3, 4)}
    assert {row["prompt"]: row["answer"] for row in rows} == texts
    assert len(rows) == 9
    assert rows == sums.problems(range(2, 5))


def test_sums_are_told_apart_by_their_mirrors_and_digits():
    held_out = [{"prompt": question(text)} for text in ("3 + 9", "2 + 11", "11 + 4", "4 + 4")]
    trained_on = [{"prompt": question(text)} for text in ("9 + 3", "1 + 21", "4 + 11", "1 + 12")]
    kinds = sums.kinds_of(held_out, trained_on)
    assert kinds["held out"] == held_out
    assert kinds["held out, mirror trained on"] == [held_out[0], held_out[2]]
    assert kinds["held out, mirror not trained on"] == [held_out[1], held_out[3]]
    assert kinds["held out, one digit before two"] == [held_out[1]]
    assert kinds[sums.TRAINED] == trained_on[1:]
    assert kinds["held out, other digits"] == [held_out[0], *held_out[2:]]
    larger = {row["prompt"] for row in kinds[sums.LARGE]}
    trained = {row["prompt"] for row in sums.problems(sums.NUMBERS)}
    assert len(larger) == 64
    assert not larger & trained
    carried = {row["prompt"] for row in kinds[f"{sums.LARGE}, with a carry"]}
    assert question("17 + 23") in carried
    assert question("17 + 22") not in carried
    assert larger - carried == {row["prompt"] for row in kinds[f"{sums.LARGE}, without a carry"]}


def test_shares_count_a_sum_once_and_are_means_over_seeds():
    rows = sums.problems(range(1, 3))
    prompts = [row["prompt"] for row in rows]
    found = {
        1: {"sampled after": dict.fromkeys(prompts, 0.0)},
        4: {"sampled after": dict(zip(prompts, (1.0, 0.5, 0.5, 0.0), strict=True))},
    }
    kinds = {"all": rows, "first": rows[:1]}
    values = {
        (row["variant"], row["seed"], row["metric"]): row["value"]
        for row in sums.table(kinds, found, 7)
    }
    assert values["all", 1, "sampled after"] == 0
    assert values["all", 4, "sampled after"] == 0.5
    assert values["first", 4, "sampled after"] == 1
    assert values["all", "all", "sampled after"] == 0.25
    assert values["first", "all", "sampled after"] == 0.5
    # Wilson's interval of 1 of 4
    assert values["all", "all", "sampled after low"] == pytest.approx(0.0456, abs=1e-4)
    assert values["all", "all", "sampled after high"] == pytest.approx(0.6994, abs=1e-4)


class Said:
    """In place of a generator: what it was made with, and answers."""

    made = ()

    def __init__(self, model, **how):
        Said.made += ((model, how),)

    def __call__(self, prompts, *, seed, num_samples):
        self.texts = [f"{number % 3}" for number in range(len(prompts) * num_samples)]
        assert seed == 5
        return self


def test_each_sum_is_asked_greedily_and_eight_times_before_and_after(tmp_path, monkeypatch):
    """And once: the answers are kept."""
    monkeypatch.setattr(sums, "Generator", Said)
    monkeypatch.setattr(Said, "made", ())
    rows = [{"prompt": "a", "answer": "0"}, {"prompt": "b", "answer": "1"}]
    (tmp_path / "run").mkdir()
    for _ in range(2):
        found = sums.asked(tmp_path / "model", tmp_path / "run", rows, 12, 5)
    models = [tmp_path / "model"] * 2 + [tmp_path / "run" / "model"] * 2
    assert [(model, how["temperature"]) for model, how in Said.made] == list(
        zip(models, [0, 1] * 2, strict=True)
    )
    assert {how["max_new_tokens"] for _, how in Said.made} == {12}
    assert list(found) == ["greedy before", "sampled before", "greedy after", "sampled after"]
    assert found["greedy before"] == {"a": 1, "b": 1}  # 0 and 1
    assert found["sampled after"] == {
        "a": 3 / 8,
        "b": 2 / 8,
    }  # of 0 1 2 0 1 2 0 1 and 2 0 1 2 0 1 2 0


def test_a_curve_is_of_the_validations():
    metrics = [{"step": 0, "validation/score": 0.25}, {"step": 1}, {"step": 2, "loss": 1.0}]
    rows = sums.curve(metrics, 3)
    assert {(row["seed"], row["step"]) for row in rows} == {(3, 0)}
    values = {row["metric"]: row["value"] for row in rows}
    assert values["held-out score"] == 0.25
    assert values["held-out score low"] < 0.25 < values["held-out score high"]

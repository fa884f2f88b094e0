"""The loop of an RL run, whose parts here only note what they are given: prompts are numbers, a
rollout is named after those that it answers, and an update adds 1 to the policy, which is 0.
"""

import collections
import contextlib
import importlib
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import Killed, json_lines, metric_rows
from recorded import rl_job

from rlhf_jax import iteration, training, vpg
from rlhf_jax.config import Optimizer, RLStage, RunConfig
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.graders import spec
from rlhf_jax.iteration import LoopState
from rlhf_jax.training.common import opening
from rlhf_jax.training.common.optimizer import Patience
from rlhf_jax.training.common.progress import Validation
from rlhf_jax.training.rl.method import Given, Method, completed
from rlhf_jax.training.rl.score import Scored
from rlhf_jax.types import Rollout, TrainState

loop = importlib.import_module("rlhf_jax.training.rl.run")  # ``rl.run`` is its function


def named(*numbers):
    """The rollout of these prompts."""
    ones = np.ones((len(numbers), 2), np.float32)
    return Rollout(ones, ones, ones, ones, np.array(numbers), extras={"part": ones[:, 0]})


def names(rollout):
    return rollout.row_ids.tolist()


def policy_of(state):
    return float(state.train.params["w"])


class Parts:
    """A job of three steps, and ``notes``, {part: what it was given} of their calls."""

    num_prompts = 2  # it is the schedule too

    def __init__(self, folder):
        self.notes = collections.defaultdict(list)
        settings = RLStage(num_iterations=3, validation_interval=2, kl_coef=0.5, kl_target=1.0)
        self.config = RunConfig(output_dir=str(folder / "run"), rl=settings)
        self.fields = {}  # of the job
        self.choose = None
        self.algorithm = completed(vpg)
        self.reference = None
        self.faulty = None  # the number of the step whose update is not finite
        self.failing = None  # the prompts that cannot be scored

    def run(self, on_step=None, rl=None, **changes):
        settings = replace(self.config.rl, **rl or {})
        return training.rl.run(replace(self.config, rl=settings, **changes), vpg, on_step=on_step)

    @contextlib.contextmanager
    def open_job(self, config, *given):
        settings = config.rl
        penalty = iteration.kl_penalty(settings.kl_coef, target=settings.kl_target, horizon=10)
        programs = ("rescored", "learn", "informative", "refill", "observe", "choose")
        parts = {
            "method": Method(self.algorithm, vpg.Config(), settings, penalty, None),
            "inputs": {"reward": spec.Reward(examples=({"note": "an example"},))},
            "programs": {name: getattr(self, name) for name in programs},
            "held_out": "held out",
            "schedule": self,
        }
        with opening.open_run(config, "vpg", {}) as run:
            yield rl_job(**parts | {"run": run} | self.fields)

    def rows(self, step):
        return step

    def batches(self, step, rows=None):
        return [10 * (step if rows is None else rows) + i for i in range(3)]

    def sources(self, rows):
        return [f"prompts.json, line {rows + 1}"]

    def first_state(self, job):
        state = optax.ScaleByScheduleState(count=jnp.int32(0))
        train = TrainState(jnp.int32(0), {"w": jnp.float32(0.0)}, state)
        behind = None
        if job.ahead is not None:
            behind = TrainState(jnp.int32(0), {"w": jnp.float32(-1.0)}, ())
        return LoopState(train, jnp.float32(0.125), self.reference, behind)

    def check_memory(self, job, state):
        self.notes["check_memory"].append(policy_of(state))

    def sample(self, job, state, prompts):
        self.notes["sample"].append((prompts, policy_of(state)))
        return named(prompts), {"first": float(prompts)}

    def rescored(self, state, sampled, functions):
        return replace(sampled, log_probs=sampled.log_probs + 1), {}

    def score(self, job, rollout, prompts):
        self.notes["score"].append((prompts, names(rollout), float(rollout.log_probs[0, 0])))
        if prompts == self.failing:
            raise UserError("the server is gone")
        return Scored(rollout, {"objective/score": float(prompts), "reward/note": 1.0})

    def learn(self, state, rollout, key, functions):
        self.notes["learn"].append((names(rollout), policy_of(state)))
        self.notes["keys"].append(jax.random.key_data(key).tolist())
        self.notes["coefficients"].append(float(state.kl_coef))
        self.notes["extras"].append(rollout.extras)
        if state.reference is not None:
            self.notes["references"].append(float(state.reference["w"]))
        train = state.train
        count = optax.ScaleByScheduleState(count=train.opt_state.count + 2)
        train = TrainState(train.step + 1, {"w": train.params["w"] + 1}, count)
        return replace(state, train=train), {"nonfinite": float(train.step == self.faulty)}

    def informative(self, state, rollout, key, functions):
        """Of two groups none in the first draw, and one in each further draw."""
        self.notes["asked"].append((names(rollout), policy_of(state), rollout.extras))
        return np.array([rollout.row_ids[0] % 10 > 0, False])

    def refill(self, rollout, fresh, wanting, offered):
        assert offered.tolist() == [True, False]
        self.notes["wanting"].append(wanting.tolist())
        return named(*rollout.row_ids, *fresh.row_ids), named(*-fresh.row_ids)

    def observe(self, state, rollout):
        self.notes["observed"].append((names(rollout), policy_of(state)))
        return state, {}

    def validate(self, job, state):
        self.notes["validate"].append((job.held_out, policy_of(state)))
        return Validation({"validation/score": policy_of(state)})

    def save(self, job, state, row):
        self.notes["save"].append(policy_of(state))
        return row


@pytest.fixture
def parts(monkeypatch, tmp_path):
    made = Parts(tmp_path)
    for name in ("sample", "score", "validate", "check_memory", "open_job"):
        monkeypatch.setattr(loop, name, getattr(made, name))
    monkeypatch.setattr(loop, "_state_of", made.first_state)
    monkeypatch.setattr(loop, "_save", made.save)
    return made


def test_a_step_samples_scores_and_learns_and_the_next_goes_on_from_there(parts):
    seen = []

    def on_step(step, state, row, rollout):
        seen.append((step, policy_of(state), row["first"], row["nonfinite"], names(rollout)))
        assert rollout.extras is not None

    row = parts.run(on_step)
    notes = parts.notes
    assert notes["check_memory"] == [0.0]
    assert notes["sample"] == [(0, 0.0), (10, 1.0), (20, 2.0)]
    assert notes["score"] == [(0, [0], 2.0), (10, [10], 2.0), (20, [20], 2.0)]
    assert notes["learn"] == [([0], 0.0), ([10], 1.0), ([20], 2.0)]
    assert notes["extras"] == [None] * 3
    key = opening.stream_key(0, "vpg", "update")
    expected = [jax.random.key_data(jax.random.fold_in(key, step)).tolist() for step in range(3)]
    assert notes["keys"] == expected
    assert seen == [(1, 1.0, 0.0, 0.0, [0]), (2, 2.0, 10.0, 0.0, [10]), (3, 3.0, 20.0, 0.0, [20])]
    assert notes["validate"] == [("held out", 0.0), ("held out", 2.0), ("held out", 3.0)]
    assert notes["save"] == [3.0]
    assert (row["first"], row["validation/score"]) == (20.0, 3.0)


def test_a_rollout_is_gone_when_the_next_is_sampled(parts, monkeypatch):
    """It may be large: with ``rl.top_k`` it has the likeliest ids of each token."""
    rollouts = []

    def sample(*given):
        assert not [rollout for rollout in rollouts if rollout() is not None]
        rollout, metrics = parts.sample(*given)
        # Of its arrays only numbers and scores of rows are kept, in case the update is not finite.
        rollouts.append(weakref.ref(rollout.tokens))
        return rollout, metrics

    monkeypatch.setattr(loop, "sample", sample)
    parts.run(lambda step, state, row, rollout: None)
    assert len(rollouts) == 3


def test_without_held_out_prompts_some_rollouts_are_kept_and_none_twice(parts, monkeypatch):
    """At the first step, every second and the last: those that were learned from. A run that is
    killed before it saves goes on to the same bytes.
    """
    parts.fields["held_out"] = None
    monkeypatch.setattr(loop, "training_samples", lambda job, rollout: [{"of": names(rollout)}])

    def kill(step, *_):
        if step == 4:
            raise Killed

    how = {"rl": {"num_iterations": 5, "dynamic_sampling": 2}}
    file = Path(parts.config.output_dir, "samples.jsonl")
    parts.run(**how)
    straight = file.read_bytes()
    rows = [(row["step"], row["of"]) for row in json_lines(file)]
    assert rows == [(k, [10 * k - 10 + i for i in range(3)]) for k in (1, 2, 4, 5)]
    with pytest.raises(Killed):
        parts.run(kill, overwrite=True, **how)
    assert json_lines(file)[-1]["step"] == 4
    parts.run(resume=True, **how)
    assert file.read_bytes() == straight


def test_a_run_with_validations_keeps_no_training_rollouts(parts, monkeypatch):
    monkeypatch.setattr(loop, "training_samples", pytest.fail)
    parts.run()


def test_a_row_of_metrics_is_that_of_its_step_also_if_nobody_waits_for_it(parts):
    parts.run()
    rows = metric_rows(parts.config.output_dir)
    found = [(row["step"], row.get("first"), row.get("validation/score")) for row in rows]
    assert found == [(0, None, 0.0), (1, 0.0, None), (2, 10.0, 2.0), (3, 20.0, 3.0)]


def test_uninformative_groups_are_replaced_by_those_of_the_next_batches(parts):
    """The metrics are those of the first draw; on_step gets what was learned from."""
    seen = []
    row = parts.run(
        lambda step, state, row, rollout: seen.append(names(rollout)), rl={"dynamic_sampling": 2}
    )
    assert parts.notes["sample"][:3] == [(0, 0.0), (1, 0.0), (2, 0.0)]
    assert seen == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
    assert [numbers for numbers, _ in parts.notes["learn"]] == seen
    assert (row["first"], row["objective/score"]) == (20.0, 20.0)
    assert (row["sampling/rounds"], row["sampling/uninformative"]) == (2.0, pytest.approx(2 / 3))
    assert parts.notes["asked"][:3] == [([0], 0.0, None), ([1], 0.0, None), ([2], 0.0, None)]
    assert parts.notes["wanting"][:2] == [[True, True], [False, True]]
    assert not parts.notes["observed"]


def test_groups_that_are_not_learned_from_are_observed_after_the_update(parts):
    parts.algorithm = replace(parts.algorithm, observe=lambda state, rollout, **_: state)
    parts.run(rl={"dynamic_sampling": 2})
    assert parts.notes["observed"] == [([-10 * k - i], 1.0 + k) for k in range(3) for i in (1, 2)]


@pytest.mark.parametrize(("changes", "expected"), [({}, 0.125), ({"kl_coef": 0.25}, 0.25)])
def test_a_resumed_run_takes_the_coefficient_of_the_settings_if_it_changed(
    parts, changes, expected
):
    parts.run(lambda step, *_: step == 2)
    parts.run(rl=changes, resume=True, allow_changed=("rl.kl_coef",))
    assert parts.notes["learn"] == [([0], 0.0), ([10], 1.0), ([20], 2.0)]
    assert parts.notes["coefficients"] == [0.125, 0.125, expected]
    assert parts.notes["check_memory"] == [0.0, 0.0]
    assert parts.notes["save"] == [2.0, 3.0]
    parts.run(rl=changes, resume=True)  # it has no step left
    assert parts.notes["check_memory"] == [0.0, 0.0]
    assert parts.notes["save"] == [2.0, 3.0, 3.0]


@pytest.mark.parametrize("asks", [False, True])
def test_an_update_that_is_not_finite_is_named_with_its_own_prompts(parts, asks):
    """Also when it is found while the next step is under way."""
    parts.faulty = 1
    seen = []
    message = r"at step 1; .* checkpoint is step 0 in .* of this batch: prompts\.json, line 1$"
    with pytest.raises(TrainingFault, match=message):
        parts.run((lambda step, *_: seen.append(step)) if asks else None)
    assert not seen
    assert len(parts.notes["learn"]) == 2 - asks
    assert [row["step"] for row in metric_rows(parts.config.output_dir)] == [0, 1]


def test_a_step_that_cannot_be_scored_leaves_the_one_before_it(parts):
    parts.failing = 10
    with pytest.raises(UserError, match=r"the server is gone\nStep 1 of 3 is saved\. When that is"):
        parts.run()
    assert [row.get("first") for row in metric_rows(parts.config.output_dir)] == [None, 0.0]
    parts.failing = None
    parts.run(resume=True)
    assert parts.notes["learn"] == [([0], 0.0), ([10], 1.0), ([20], 2.0)]


def test_a_first_validation_that_fails_has_nothing_to_go_on_from(parts, monkeypatch):
    def validate(job, state):
        raise UserError("the judge is gone")

    monkeypatch.setattr(loop, "validate", validate)
    with pytest.raises(UserError, match=r"^the judge is gone$"):
        parts.run()


def test_ahead_the_policy_before_each_update_samples_the_next_rollout(parts):
    def start(job, state, step):
        parts.notes["start"].append((step, policy_of(state)))
        return TrainState(jnp.int32(step), {"w": state.train.params["w"]}, ())

    def sample(job, state, prompts):
        parts.notes["ahead"].append((prompts, float(state.behind.params["w"])))
        return named(prompts), {"first": float(prompts)}

    parts.fields["ahead"] = SimpleNamespace(start=start, sample=sample)
    row = parts.run()
    assert parts.notes["start"] == [(1, 0.0), (2, 1.0), (3, 2.0)]
    assert parts.notes["ahead"] == [(0, -1.0), (10, 0.0), (20, 1.0)]
    assert not parts.notes["sample"]
    assert row["first"] == 20.0


def test_the_log_probs_of_an_engine_are_compared_with_those_of_the_policy(parts):
    def compare(state, sampled, rescored):
        parts.notes["compare"].append((policy_of(state), names(sampled)))
        return {"gap": float(np.mean(rescored.log_probs - sampled.log_probs))}

    parts.fields["client"] = SimpleNamespace(compare=compare)
    row = parts.run()
    assert parts.notes["compare"] == [(0.0, [0]), (1.0, [10]), (2.0, [20])]
    assert row["gap"] == 1.0


def test_the_reference_moves_before_the_step_that_is_due(parts):
    def move(reference, policy):
        return {"w": reference["w"] - policy["w"]}

    parts.fields["move_reference"] = move
    parts.reference = {"w": jnp.float32(9.0)}
    parts.run(rl={"reference_refresh": 2})
    assert parts.notes["references"] == [9.0, 9.0, 7.0]


@pytest.mark.parametrize(("schedule", "times"), [("linear", 1), ("constant", 0)])
def test_a_schedule_that_counts_other_steps_is_said_once(parts, schedule, times, capsys):
    """An update takes two steps, and its settings say one."""
    parts.fields["given"] = Given(algorithm=vpg)  # of Python
    parts.run(rl={"optimizer": Optimizer(schedule=schedule)})
    assert capsys.readouterr().out.count("an iteration took 2 optimizer steps") == times


def test_early_stopping_looks_for_the_highest_score(parts):
    parts.run(early_stopping_patience=1, rl={"validation_interval": 1})
    assert len(parts.notes["learn"]) == 3


def test_validations_lower_the_rate_of_the_schedule_plateau(parts, monkeypatch):
    seen = []

    def lowered(patience, state, rows):
        seen.append((patience.settings.schedule, policy_of(state), len(rows)))
        return replace(state, kl_coef=state.kl_coef / 2)

    monkeypatch.setattr(Patience, "lowered", lowered)
    parts.run(rl={"optimizer": Optimizer(schedule="plateau"), "validation_interval": 1})
    assert seen == [("plateau", 1.0, 2), ("plateau", 2.0, 3), ("plateau", 3.0, 4)]
    assert parts.notes["coefficients"] == [0.125, 0.0625, 0.03125]


def test_an_alert_shows_an_example_of_its_metric(parts):
    parts.run(alerts=("reward/note > 0",))
    [alert, *_] = metric_rows(parts.config.output_dir, "alerts.jsonl")
    assert alert["step"] == 1
    assert alert["message"].endswith("as in 'an example'")

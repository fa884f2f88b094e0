"""The parts of experiments/label_value.py by hand, and a short form of the whole."""

import json

import jax
import jax.numpy as jnp
import label_value
import numpy as np
import pytest
import results
from label_value import END, LENGTH, PAD, UNKNOWN, Sizes
from numpy.testing import assert_allclose

SIZES = Sizes(seeds=1, labels=31, wrong=4, steps=2, chosen=1)
KINDS = ("left out", "turned round")


def write_sentences(folder, num: int) -> None:
    """Positive ones have "good" as their fourth word, negative ones "bad"."""
    generator = np.random.default_rng(0)
    for name, word in (("pos", "good"), ("neg", "bad")):
        lines = []
        for number in range(num):
            words = [f"w{i}" for i in generator.integers(9, size=8 + number % 9)]
            lines.append(" ".join([*words[:3], word, *words[4:]]))
        (folder / f"rt-polarity.{name}.txt").write_text("\n".join(lines), "utf-8")


def test_an_edit_changes_one_label_or_one_weight():
    best, weight = label_value.edits(3, 1)
    assert best.tolist() == [[1, 0, 0]] * 5 + [[0, 0, 0], [1, 1, 0], [1, 0, 1]]
    left_out = [[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert weight.tolist() == [*left_out, *[[1, 1, 1]] * 4]


def test_sentences_of_a_fitting_length_are_read(tmp_path, monkeypatch):
    """Each ends with END; a word that is not among the commonest is unknown."""
    monkeypatch.setattr(label_value, "WORDS", 2)
    positive = ["a " * 7, "a " * 8, "b " * 22 + "rare", "a " * 24, "a " * 9]
    for name, lines in (("pos", positive), ("neg", positive[:-1])):
        (tmp_path / f"rt-polarity.{name}.txt").write_text("\n".join(lines), "utf-8")
    a, b = END + 2, END + 1
    rows = [[a] * 8 + [END] + [PAD] * 15, [b] * 22 + [UNKNOWN, END]]
    assert label_value.read(tmp_path).tolist() == [rows, rows]
    assert len(rows[1]) == LENGTH


def test_margins_are_of_the_first_sentence(monkeypatch):
    """By a score that is the number of a sentence's tokens without padding."""
    monkeypatch.setattr(label_value, "SCORE_FN", lambda params, tokens, mask, key: mask.sum(axis=1))
    pairs = np.zeros((2, 2, LENGTH), int)
    pairs[0, 0, :5] = pairs[0, 1, :2] = pairs[1, 1, :1] = 7
    assert label_value.margins({}, jnp.array(pairs)).tolist() == [3, -1]


def test_each_row_comes_once_in_a_pass(monkeypatch):
    """Batches of 3 of the 4 passes over 6 rows: those of a pass are in an order of its own."""
    monkeypatch.setattr(label_value, "EPOCHS", 4)
    monkeypatch.setattr(label_value, "BATCH", 3)

    def update(state, rows):
        seen = state.params["seen"].at[state.step].set(rows)
        return state.replace(step=state.step + 1, params={"seen": seen}), None

    params = {"seen": jnp.zeros((8, 3))}
    seen = label_value.fit(jax.random.key(0), params, 6, update)["seen"].reshape(4, 6)
    assert (np.sort(seen, axis=1) == np.arange(6)).all()
    assert len(np.unique(seen, axis=0)) > 1


def test_influence_is_that_of_dense_matrices():
    """DataInf by the mean of N inverses, Gauss-Newton by one inverse over both arrays, of three
    parameters together; the third array has no gradient, and no effect.
    """
    generator = np.random.default_rng(0)
    num, widths = 5, (1, 2)
    margin = generator.normal(size=num)
    jacobian = [generator.normal(size=(num, width)) for width in widths]
    target = [generator.normal(size=width) for width in widths]
    best = np.array([1, 0, 0, 1, 0])
    arrays = ([*jacobian, np.zeros((num, 2))], [*target, np.zeros(2)])
    found = label_value.influence(margin, *arrays, best)
    sign = np.array([-1, 1, 1, -1, 1])
    signed = [sign[:, None] * rows for rows in jacobian]  # of the margins that the labels ask for
    slope = 1 / (1 + np.exp(sign * margin))
    losses = [-slope[:, None] * rows for rows in signed]
    dampings = [0.1 * np.mean(rows**2) for rows in losses]
    closed = np.zeros(num)
    for rows, own, aim, damping in zip(signed, losses, target, dampings, strict=True):
        each = [np.linalg.inv(damping * np.eye(len(aim)) + np.outer(one, one)) for one in own]
        closed += rows @ np.mean(each, axis=0) @ aim
    rows, aim = np.concatenate(signed, axis=1), np.concatenate(target)
    curvature = rows.T @ np.diag(slope * (1 - slope)) @ rows / num
    full = rows @ np.linalg.solve(curvature + np.diag(np.repeat(dampings, widths)), aim)
    expected = {"DataInf": closed, "Gauss-Newton": full, "gradients": rows @ aim}
    for name, along in expected.items():
        effects = [-slope * along / num, -along / num]
        assert_allclose(found[name], effects, rtol=1e-8, err_msg=name)
    assert_allclose(found["own loss"], [-np.logaddexp(0, -sign * margin)] * 2, rtol=1e-8)


def test_the_gradient_of_a_label_tells_what_its_edit_does():
    """Of a linear score, trained by one small step: leaving out and turning round, exactly."""
    generator = np.random.default_rng(1)
    rows, aim = generator.normal(size=(4, 3)), generator.normal(size=3)
    best, weight = label_value.edits(4, 1)
    sign = 1 - 2 * best

    def loss_after(sign, weight):
        """Of weights 0 after a step against the mean gradient; the slope of all losses is 1/2."""
        return -aim @ (1e-3 * (weight * sign) @ rows / 2 / 4) * -1

    after = np.array([loss_after(*edit) for edit in zip(sign, weight, strict=True)])
    truth = (after - after[0]).reshape(2, -1)[:, 1:]
    found = label_value.influence(np.zeros(4), [rows], [aim], best[0])["gradients"]
    assert_allclose(1e-3 * found, truth, rtol=1e-8)


def test_what_is_found_of_labels():
    """The wrong labels' removal lowers the loss; a guess of the opposite order calls them right."""
    loss = np.array([-4.0, -3.0, -2.0, -1.0, *range(1, 17)]) / 1000
    effect = np.stack([loss, loss[::-1]])
    accuracy = np.where(effect < 0, 0.02, -0.01)
    guess = -np.exp(effect)  # ranks alone count
    found = label_value.of_labels(effect, accuracy, {"opposite": guess}, 0, 4)
    wrong, right = (found[f"a {name} label {KINDS[0]}"] for name in ("wrong", "right"))
    assert_allclose(wrong["loss added, 1e-3 nats"], -2.5)
    assert_allclose(wrong["its standard deviation"], np.std([1, 2, 3, 4]))
    assert_allclose(wrong["accuracy added, points"], 2)
    assert_allclose(right["largest change of accuracy, points"], 1)
    assert_allclose(right["loss added, 1e-3 nats"], 8.5)
    assert_allclose(found[f"a wrong label {KINDS[1]}"]["loss added, 1e-3 nats"], 14.5)
    assert_allclose(found[f"a wrong label {KINDS[1]}"]["accuracy added, points"], -1)
    for name, sign in (("the truth", 1), ("opposite", -1)):
        for edge in ("", " low", " high"):
            for kind in KINDS:
                assert_allclose(found[name][f"rank correlation, {kind}{edge}"], sign)
        area = found[name][f"AUROC of wrong labels, {KINDS[0]}"]
        assert area == (1 + sign) / 2
        assert found[name][f"AUROC of wrong labels, {KINDS[1]}"] == 1 - area


def test_ranks_and_their_intervals_by_hand():
    """Of 1 2 3 4 5 and 1 3 2 5 4: 1 - 6 * 4 / (5 * 24); wrong are the first two, of which one is
    above all right ones and one above two of three.
    """
    loss = np.tile([1.0, 2, 3, 4, 5], (2, 1))
    guess = np.tile([1.0, 3, 2, 5, 4], (2, 1))
    found = label_value.of_labels(loss, loss, {"guess": guess}, 0, 2)["guess"]
    assert_allclose(found[f"rank correlation, {KINDS[0]}"], 0.8)
    assert_allclose(found[f"AUROC of wrong labels, {KINDS[0]}"], 5 / 6)


def test_what_is_found_of_policies():
    """Two answers each: half as likely as not to be better than those of the policy of no edit."""
    odds = np.log([1.0, 3])  # of 1/2 and 3/4
    judged = np.array([[0.0, 0], [1, 1], [1, 1 + odds[1]], *[[1, 1 - odds[1]]] * 2])
    measured = {"judged": judged, "KL from no edit": np.array([5.0, 0, 1, 2, 4])}
    found = label_value.of_policies(measured, np.array([-3.0, 2.0]))
    assert_allclose(found["policy: no edit"]["preferred"], 0.5)
    assert_allclose(found["policy: largest effects"]["preferred"], 0.625)
    assert_allclose(found["policy: labels at random"]["preferred"], 0.375)
    assert_allclose(found["policy: labels at random"]["preferred, from a half"], 0.125)
    assert_allclose(found["policy: other keys"]["KL from no edit"], 4)
    assert_allclose(found["policy: the first"]["KL from no edit"], 5)
    ranks = found["policy: rank correlation of labels"]
    assert_allclose(ranks["size and KL from no edit"], -1)
    assert_allclose(ranks["effect and KL from no edit"], 1)
    assert_allclose(ranks["effect and preferred"], -1)


@pytest.mark.slow
def test_the_short_form(tmp_path, monkeypatch):
    """An edit changes what a reward model becomes. The policies, whose compilation takes a minute,
    are only traced; they are given the reward models and keys of the labels.
    """
    policies, in_turn, given, members = label_value.policies, label_value.IN_TURN, [], []

    def recorded(*inputs):
        members.append(in_turn(*inputs))
        return members[-1]

    def traced(*inputs):
        given.append(inputs[-1])
        generator = np.random.default_rng(0)
        return jax.tree.map(lambda x: generator.random(x.shape), jax.eval_shape(policies, *inputs))

    values = {
        "HELD_OUT": 20,
        "MEASURED": 5,
        "ANSWERS": 4,
        "EPOCHS": 2,
        "policies": traced,
        "IN_TURN": recorded,
        "AT_ONCE": in_turn,  # which is compiled anyway
    }
    for name, value in values.items():
        monkeypatch.setattr(label_value, name, value)
    write_sentences(tmp_path, num=31 + 20 + 31)  # the judge is compiled with the single runs
    out = tmp_path / "label_value.json"
    label_value.main(tmp_path, out, SIZES)
    rows = json.loads(out.read_text("utf-8"))["rows"]
    found = {
        (row["variant"], row["metric"]): row["value"] for row in rows if row["seed"] == results.ALL
    }
    for name in ("in turn", "at once"):
        assert found["programs", f"largest difference of parameters {name}, 1e-6"] < 10
    for kind in KINDS:
        assert found["the truth", f"rank correlation, {kind}"] == 1
        assert found[f"a right label {kind}", "its standard deviation"] > 0
        assert found["Gauss-Newton", f"rank correlation, {kind}"] > 0
    (params, keys) = given[0]
    kernels = params["score"]["kernel"].reshape(6, -1)
    assert (kernels[3:] == kernels[0]).all()
    of_members, loss, _ = members[0]
    largest = 33 + np.abs(loss[33:] - loss[32]).argmax()  # behind 31 left out and both of no edit
    assert (kernels[1] == of_members["score"]["kernel"].reshape(64, -1)[largest]).all()
    assert len(np.unique(kernels, axis=0)) == 3
    data = np.asarray(jax.random.key_data(keys)).reshape(6, -1)
    assert (data[1:3] == data[0]).all()
    assert len(np.unique(data, axis=0)) == 4

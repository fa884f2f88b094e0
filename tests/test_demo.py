"""The demo corpus: sizes, determinism, what is held out, and how its labels come about."""

import collections
import hashlib
import itertools
import json
import re

import pytest

from rlhf_jax.data import demo
from rlhf_jax.errors import UserError

PHRASINGS, HELDOUT = (list(itertools.chain(*some.values())) for some in (demo.PHRASINGS, demo.HELDOUT_PHRASINGS))
SUBJECTS = {
    demo.fill(phrasing, topic): (category, topic)
    for category, topics in demo.TOPICS.items()
    for topic in topics
    for phrasing in demo.PHRASINGS[category] + demo.HELDOUT_PHRASINGS[category]
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo.write(folder)
    return folder


def load(folder, name):
    return json.loads((folder / name).read_text())


def words(text):
    return re.findall("[a-z]+", text)


def scores(category, topic):
    """response -> score, for all responses to a topic."""
    found = {}
    for wording in demo.WORDINGS[category]:
        others = [other for other in demo.TOPICS[category] if other != topic]
        for about in others if wording.off_topic else [topic]:
            score = wording.score + demo.DETAIL * (about != topic and about.first == topic.first)
            for close in ["", *demo.CLOSES] if wording.may_close else [""]:
                text = demo.fill(wording.template, about) + (f" {close}" if close else "")
                found[text] = score + demo.DETAIL * bool(close) - 0.03 * max(0, len(words(text)) - 24)
    return found


SCORES = {(category, topic): scores(category, topic) for category, topics in demo.TOPICS.items() for topic in topics}


def test_sizes(corpus):
    assert [len(load(corpus, name)) for name in demo.FILES] == [2000, 3000, 600, 144, 300]
    prompts = load(corpus, "heldout_prompts.json")
    assert len({row["prompt"] for row in prompts}) == 144
    assert set(collections.Counter(row["category"] for row in prompts).values()) == {48}


def test_the_bytes_depend_on_the_seed_alone(corpus, tmp_path):
    demo.write(tmp_path, seed=1)
    # Whoever changes a byte changes every run on the corpus.
    for name, digest in zip(demo.FILES, ["d2a5c40b", "7ea22334", "f3955cb7", "6933fe1a", "9565fb67"], strict=True):
        assert hashlib.sha256((corpus / name).read_bytes()).hexdigest()[:8] == digest
        assert (tmp_path / name).read_bytes() != (corpus / name).read_bytes()


def test_heldout_phrasings_are_in_no_training_file(corpus):
    prompts = [{row["prompt"] for row in load(corpus, name)} for name in demo.FILES]
    assert not set.union(*prompts[:3]) & set.union(*prompts[3:])
    assert not set(PHRASINGS) & set(HELDOUT)
    assert set(words(" ".join(PHRASINGS))) >= set(words(" ".join(HELDOUT)))


def test_pairs_follow_the_scores_but_for_the_noise(corpus, tmp_path):
    def wrong(rows):
        def agree(row):
            chosen, rejected = (SCORES[SUBJECTS[row["prompt"]]][row[key]] for key in ("chosen", "rejected"))
            assert abs(chosen - rejected) > 1e-6
            return chosen > rejected

        return 1 - sum(map(agree, rows)) / len(rows)

    assert 0.08 < wrong(load(corpus, "preference_data.json")) < 0.12
    assert wrong(load(corpus, "heldout_preference_data.json")) == 0
    demo.write(tmp_path, shuffle_labels=True)
    shuffled = load(tmp_path, "preference_data.json")
    assert 0.46 < wrong(shuffled) < 0.54
    assert wrong(load(tmp_path, "heldout_preference_data.json")) == 0
    # The control differs from the real run in the labels alone.
    for row, other in zip(shuffled, load(corpus, "preference_data.json"), strict=True):
        assert row["prompt"] == other["prompt"]
        assert {row["chosen"], row["rejected"]} == {other["chosen"], other["rejected"]}


def test_more_prompts_than_there_are(tmp_path):
    with pytest.raises(UserError, match="has 720 distinct prompts of this kind, 721 asked for"):
        demo.write(tmp_path, num_prompts=721)

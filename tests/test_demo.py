"""The demo corpus: sizes, determinism, what is held out, and how its labels come about."""

import collections
import hashlib
import itertools
import json
import re

import pytest

from rlhf_jax.data import demo
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import rubric

PHRASINGS, HELDOUT = (
    list(itertools.chain(*some.values())) for some in (demo.PHRASINGS, demo.HELDOUT_PHRASINGS)
)
SUBJECTS = {
    demo.fill(phrasing, topic): {"category": category, "topic": topic.phrase}
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


def test_sizes(corpus):
    assert [len(load(corpus, name)) for name in demo.FILES] == [2000, 3000, 600, 144, 300]
    by_category = collections.defaultdict(set)
    for row in load(corpus, "heldout_prompts.json"):
        by_category[row["category"]].add(row["prompt"])
    assert [len(prompts) for prompts in by_category.values()] == [48] * 3


def test_the_bytes_depend_on_the_seed_alone(corpus, tmp_path):
    demo.write(tmp_path, seed=1)
    # Whoever changes a byte changes every run on the corpus.
    for name, digest in zip(
        demo.FILES, ["d2a5c40b", "7ea22334", "f3955cb7", "6933fe1a", "9565fb67"], strict=True
    ):
        assert hashlib.sha256((corpus / name).read_bytes()).hexdigest()[:8] == digest
        assert (tmp_path / name).read_bytes() != (corpus / name).read_bytes()


def test_heldout_phrasings_are_in_no_training_file(corpus):
    prompts = [{row["prompt"] for row in load(corpus, name)} for name in demo.FILES]
    assert not set.union(*prompts[:3]) & set.union(*prompts[3:])
    assert not set(PHRASINGS) & set(HELDOUT)
    assert set(words(" ".join(PHRASINGS))) >= set(words(" ".join(HELDOUT)))


def wrong(folder, name):
    """The share of pairs whose chosen response the rubric scores lower."""
    rows = load(folder, name)[:300]
    scores = [
        [rubric.score(SUBJECTS[row["prompt"]], row[key]) for key in ("chosen", "rejected")]
        for row in rows
    ]
    return sum(chosen < rejected for chosen, rejected in scores) / len(rows)


def test_pairs_follow_the_rubric_but_for_the_noise(corpus, tmp_path):
    demo.write(tmp_path, shuffle_labels=True)
    assert 0.06 < wrong(corpus, "preference_data.json") < 0.16
    assert 0.4 < wrong(tmp_path, "preference_data.json") < 0.6
    for folder in (corpus, tmp_path):
        assert wrong(folder, "heldout_preference_data.json") < 0.03
    # The control differs from the real run in the labels alone.
    texts = [
        [sorted(row.values()) for row in load(folder, "preference_data.json")]
        for folder in (corpus, tmp_path)
    ]
    assert texts[0] == texts[1]


def test_more_prompts_than_there_are(tmp_path):
    with pytest.raises(UserError, match=r"720 .* 721"):
        demo.write(tmp_path, sizes={"prompts.json": 721})

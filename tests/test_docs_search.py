"""The search of the built docs finds the page of what people look for: in Chromium, on the docs
that ``sphinx-build`` left in docs/_build/html.
"""

import pytest
from browsing import chromium
from builders import ROOT

BUILT = ROOT / "docs" / "_build" / "html"
FIRST = {
    "custom reward": "rewards",
    "multi GPU": "devices",
    "OOM": "troubleshooting",
    "vLLM": "engines",
    "my own model": "your-own-chat-model",
    "resume": "reproducibility",
    "resume training": "reproducibility",
    "own data": "data",
    "LoRA": "lora",
    "checkpoint": "runs",
}


@pytest.fixture(scope="module")
def page():
    if not (BUILT / "search.html").exists():
        pytest.skip("no built docs")
    with chromium() as started:
        yield started.new_page()


@pytest.mark.slow
@pytest.mark.parametrize("query", FIRST)
def test_the_first_hit_is_the_page_of_the_words(query, page):
    page.goto(f"{(BUILT / 'search.html').as_uri()}?q={query.replace(' ', '+')}")
    page.get_by_text("Search finished").wait_for()
    first = page.locator("#search-results ul.search > li a").first
    assert first.get_attribute("href").partition("#")[0] == f"{FIRST[query]}.html"

"""README's example runs as written and learns what it says."""

import re
from pathlib import Path

import jax

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_update_by_hand_learns_the_reward(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 1
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 30
    # The example's mean over rows broadcasts a scalar; a reader's process has JAX's default promotion too.
    with jax.numpy_rank_promotion("allow"):
        exec(blocks[0], {})
    said = re.search(r"token 7 ([\d.]+) times out of 8", capsys.readouterr().out)
    assert said is not None
    assert float(said[1]) > 7

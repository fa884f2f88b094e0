r"""A program that searches texts for a regular expression.

    echo '["a+", "caat"]' | python patterns.py        # prints true

A pattern with nested repeats, such as ``(\w+\s*)+$``, can take longer than any run lasts. Python's
search cannot be interrupted, so it runs in a process that can be ended (`graders.verifiable`).
"""

import json
import re
import sys


def main() -> None:
    """Answers each line of standard input, a pair [pattern, text]."""
    for line in sys.stdin:
        pattern, text = json.loads(line)
        sys.stdout.write(json.dumps(re.search(pattern, text) is not None) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

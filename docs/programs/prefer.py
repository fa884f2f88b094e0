"""prefer.py: a judge of pairs."""


def shorter(prompts, first, second):
    """How sure the first response is better, from 0 to 1."""
    return [
        0.5 + 0.5 * ((len(a) < len(b)) - (len(a) > len(b)))
        for a, b in zip(first, second, strict=True)
    ]

"""``python -m rlhf_jax`` is the command ``rlhf-jax``."""

from rlhf_jax.cli.commands import main

main()

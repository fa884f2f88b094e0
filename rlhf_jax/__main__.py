"""``python -m rlhf_jax`` is the command ``rlhf-jax``."""

from rlhf_jax import cli

cli.main()

"""Four fake CPU devices for the sharding tests, and strict rank promotion: a broadcast that was not meant is an error."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

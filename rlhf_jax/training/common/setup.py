"""What every run does first: it chooses the device and the mesh, and keeps compiled programs."""

import dataclasses
import functools
import os
from collections.abc import Iterable
from pathlib import Path

import jax

from rlhf_jax.config import RunConfig, model_source
from rlhf_jax.errors import logger
from rlhf_jax.models import hf
from rlhf_jax.parallel import sharding
from rlhf_jax.runs import devices, manifest, trackers
from rlhf_jax.training.common import layout


def set_up(
    config: RunConfig, folders: Iterable[Path] = (), threads: int | None = None
) -> RunConfig:
    """Chooses the device and prints which it is: the first thing that every run does.

    Returns the settings with ``model/`` in place of a run's folder in ``config.model``.

    Args:
        folders, threads: as in ``choose_devices``.

    Raises:
        UserError: there is no such device, an accelerator would lie idle, the mesh fits neither the
            devices nor the model, or the package of a tracker is missing.
    """
    trackers.check(config.track)
    choose_devices(config, folders, threads)
    enable_compilation_cache()
    dtype = config.compute.dtype
    used = "bfloat16 in place of float16, whose range overflows in training without loss scaling"
    parts = [f"{jax.default_backend()}: {jax.device_count()} x {jax.devices()[0].device_kind}"]
    if config.model:
        config = dataclasses.replace(config, model=hf.model_folder(config.model))
    mesh = layout.mesh_of(config.mesh)
    if sharding.is_cut(mesh):
        parts.append(" x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
    parts.append(used if dtype == "float16" else dtype)
    _say_once(", ".join(parts))
    if jax.default_backend() == "gpu" and not config.deterministic:
        _say_once(
            "the bits may differ from run to run on a GPU; --deterministic keeps them the same"
        )
    layout.check(model_source(config), mesh)
    return config


_say_once = functools.cache(logger.info)


def choose_devices(config: RunConfig, folders: Iterable[Path], threads: int | None = None) -> None:
    """``devices.choose`` by the settings. A run that is resumed gets as many threads as it had, on
    any number of cores, since its bits depend on them; with ``compute.blocks`` there are as many as
    blocks.

    Args:
        folders: of the run, or of a pipeline's stages, of which the first that was begun decides.
        threads: of the run that is repeated; None: of the one that is resumed.
    """
    if config.resume and threads is None:
        recorded = map(manifest.threads_of, folders)
        threads = next(filter(None, recorded), None)
    devices.choose(
        config.device,
        config.processes,
        deterministic=config.deterministic,
        threads=config.compute.blocks or threads,
    )


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs: in JAX_COMPILATION_CACHE_DIR, or ``cache_folder``."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (folder := cache_folder()):
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cache_folder() -> Path | None:
    """This package's part of the user's cache folder. None, which is said once, if it cannot be
    made: a user may be a bare number in a container, without a home.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_jax"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        _say_once(f"no cache folder, so nothing is kept for later runs: {error}")
        return None
    return folder

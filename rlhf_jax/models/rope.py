"""Rotary positions (Su et al. 2021): the angles of a head's columns at each position, and how they
are scaled for long texts. Equal to transformers' rope utils.
"""

import math

import numpy as np

from rlhf_jax.models.config import DecoderConfig, RopeScaling


def frequencies(config: DecoderConfig, is_local: bool = False) -> np.ndarray:
    """[Dr / 2] float32 angles per position, for the Dr columns of a head that positions turn.

    They are scaled by ``config.rope_scaling``, unless the layer is local and has a base of its own.
    All are 0 in layers without positions.
    """
    theta = config.rope_theta
    scaling = config.rope_scaling
    if is_local and config.local_rope_theta is not None:
        theta = config.local_rope_theta
        scaling = None
    width = config.rotary_size
    even = np.arange(0, width, 2, dtype=np.float64)
    inverse = 1.0 / theta ** (even / width)
    has_positions = is_local or config.global_rope
    if not has_positions:
        inverse = 0.0 * inverse
    elif scaling is not None:
        inverse = scaled(inverse, scaling, config)
    return inverse.astype(np.float32)


def scaled(inverse: np.ndarray, scaling: RopeScaling, config: DecoderConfig) -> np.ndarray:
    """The frequencies ``inverse`` [Dr / 2] after scaling."""
    if scaling.kind == "dynamic":
        return inverse
    if scaling.kind == "longrope":
        factors = scaling.short_factor
        if config.max_length > scaling.original_max_length:
            factors = scaling.long_factor
        return inverse / np.array(factors)
    stretched = inverse / scaling.factor
    if scaling.kind == "linear":
        return stretched
    kept = _kept(inverse, scaling)
    if scaling.kind == "yarn":
        kept = _kept_by_yarn(scaling, config)
    return kept * inverse + (1 - kept) * stretched


def _kept(inverse: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """How much of each frequency Llama 3.1 keeps, by its waves in a text of the original length."""
    waves = scaling.original_max_length * inverse / (2 * math.pi)
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    return np.clip((waves - low) / (high - low), 0.0, 1.0)


def _kept_by_yarn(scaling: RopeScaling, config: DecoderConfig) -> np.ndarray:
    """How much of each frequency YaRN keeps: all before index ``first``, none from ``last`` on."""
    width = config.rotary_size

    def index_of(waves: float) -> float:
        """The index of the frequency with that many waves in a text of the original length."""
        wavelength = scaling.original_max_length / waves
        turns = math.log(wavelength / (2 * math.pi))
        return width / 2 * turns / math.log(config.rope_theta)

    first = index_of(scaling.beta_fast)
    last = index_of(scaling.beta_slow)
    if scaling.truncate:
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, width - 1)
    if first == last:
        last += 0.001
    indices = np.arange(width // 2)
    ramp = (indices - first) / (last - first)
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def attention_factor(config: DecoderConfig, is_local: bool = False) -> float:
    """By which YaRN and LongRoPE multiply cosines and sines; 1 for the other kinds."""
    scaling = config.rope_scaling
    is_unscaled = is_local and config.local_rope_theta is not None
    if scaling is None or is_unscaled:
        return 1.0
    if scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = math.log(scaling.factor)
    if scaling.kind == "longrope":
        original = math.log(scaling.original_max_length)
        return math.sqrt(1 + growth / original)
    if scaling.mscale and scaling.mscale_all_dim:
        own = 0.1 * scaling.mscale * growth + 1
        of_all = 0.1 * scaling.mscale_all_dim * growth + 1
        return own / of_all
    return 0.1 * growth + 1

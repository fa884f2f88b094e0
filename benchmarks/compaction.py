"""Sampling with and without ``SamplingConfig.compact``, in turn in one process, as a markdown
table.

    python benchmarks/compaction.py    # on a machine that does nothing else

A GPT-2 of 4 layers of width 128 with random weights, 64 prompts of 64 tokens. So many ids end a
response that its mean length, which is geometric, is about a quarter of the slots; or none does.
"""

import statistics
import time
from typing import Any

import jax
from steps import PRESETS, Preset

from rlhf_jax import models, sampling
from rlhf_jax.runs import devices

PROMPTS = PRESETS["char-small"]._replace(response=0)


def row(preset: Preset, slots: int, ids: int, calls: int = 11) -> list[Any]:
    """Share of the slots that is filled, then milliseconds of a call and CPU seconds to compile,
    each twice.
    """
    model = models.build(preset.model)
    weights = model.init(jax.random.key(0))
    prompts = jax.random.randint(
        jax.random.key(1), (preset.batch, preset.prompt), 2, preset.model.vocab_size
    )
    programs: list[Any] = []
    compile_s: list[float] = []
    seconds: tuple[list[float], list[float]] = [], []
    for compact in (False, True):
        how = sampling.SamplingConfig(
            slots, compact=compact, eos_id=tuple(range(1, ids + 1)) or None, pad_id=0
        )

        def sample(weights: Any, key: jax.Array, how: sampling.SamplingConfig = how) -> Any:
            return sampling.generate(model, weights, prompts, prompts >= 0, key, config=how)

        started = time.process_time()
        jitted = jax.jit(sample, compiler_options=devices.compiler_options(preset.model.num_layers))
        programs.append(jitted.lower(weights, jax.random.key(2)).compile())
        compile_s.append(time.process_time() - started)
    for call in range(calls):
        for program, taken in zip(programs, seconds, strict=True):
            started = time.perf_counter()
            sampled = jax.block_until_ready(program(weights, jax.random.key(call)))
            taken += [time.perf_counter() - started] if call else []  # the first one warms up
    return [
        float(sampled.response_mask.sum()) / (preset.batch * slots),
        *(1e3 * statistics.median(taken) for taken in seconds),
        *compile_s,
    ]


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    devices.choose(None)
    print(
        "| slots | filled | whole batch, ms | compact, ms | ratio | CPU s to compile "
        "|\n|---|---|---|---|---|---|"
    )
    for slots in (48, 192):
        model = models.GPT2Config(65, PROMPTS.prompt + slots, 128, 4, 4)
        for ids in (round(4 * model.vocab_size / slots), 0):
            filled, whole, compact, *compiled = row(PROMPTS._replace(model=model), slots, ids)
            seconds = ", ".join(f"{x:.1f}" for x in compiled)
            print(
                f"| {slots} | {filled:.0%} | {whole:.0f} | {compact:.0f} | {compact / whole:.2f} | "
                f"{seconds} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""The end of a run: what it trained as folders of models, its report, its result."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from rlhf_jax import models
from rlhf_jax.config import ModelSource
from rlhf_jax.errors import logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.models import hf
from rlhf_jax.models.heads import HEADS
from rlhf_jax.runs import allocator, folder, processes, reading, writing
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.types import Params


class RunResult(NamedTuple):
    """The folders of a finished run, and its metrics."""

    folder: Path
    model_folder: Path
    metrics: dict[str, Any]  # of the last step, or of the best one with ``keep_best``
    rows: list[dict[str, Any]]  # of metrics.jsonl: each step's, with its "step" and validation

    def language_model(self) -> LanguageModel:
        """The trained model and its tokenizer, as ``LanguageModel.load`` reads ``model_folder``."""
        return LanguageModel.load(self.model_folder)


def finish(
    run: OpenRun,
    source: ModelSource,
    begun: LanguageModel,
    start: Trainable,
    trained: Mapping[str, Params],
    metrics: dict[str, Any],
    how: SamplingConfig | None = None,
    save: Callable[..., None] = LanguageModel.save,
) -> RunResult:
    """Saves ``model/`` with its tokenizer, LoRA's adapters merged in and in ``adapter/`` too;
    draws ``report.html``.

    Args:
        source: of the model that was trained.
        trained: {folder below ``model/`` and ``adapter/``: trained parameters}; "" is these
            folders themselves.
        how: the sampling settings that the folder tells others; None: those that the author of the
            model wrote, if any.
        save: ``save(language_model, folder, template=, config=)``.
    """
    allocator.give_back()  # of the last step, before saving makes copies
    if jax.process_count() > 1:  # only the first process computes from here on
        base, trained = processes.fetch((start.base, trained))
        start = start._replace(base=base)
    opened = run.folder
    template = source.text.template

    def write() -> None:
        saved = [str(opened.model)]
        with writing.replacing(opened.model) as new:
            for name, part in trained.items():
                merged = in_dtype(source, begun.params, start.merged(part), start.base is None)
                done = begun._replace(params=merged)
                save(done, new / name, template=template, config=how)
        kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(merged)}
        if kinds != {"float32"}:
            saved[0] += f" in {' and '.join(sorted(kinds))} (compute.save_dtype)"
        if start.base is not None:
            saved.append(str(opened.adapter))
            _save_adapters(opened, source, begun, start.base, trained)
        logger.info(f"saved {', '.join(saved)}")
        _draw_page(opened)

    processes.in_first(write)
    return RunResult(opened.path, opened.model, metrics, reading.read_rows(opened.metrics))


def in_dtype(source: ModelSource, loaded: Params, params: Params, is_full: bool) -> Params:
    """The parameters as ``compute.save_dtype`` says; heads stay as they are."""
    wanted = source.compute.save_dtype
    if wanted == "auto" and (source.model is None or not is_full):
        return params
    of_folder = flatten_dict(loaded)
    leaves = flatten_dict(params)
    for path, leaf in leaves.items():
        if path[0] not in HEADS:
            leaves[path] = leaf.astype(of_folder[path].dtype if wanted == "auto" else wanted)
    return unflatten_dict(leaves)


def _save_adapters(
    run: folder.Run,
    source: ModelSource,
    begun: LanguageModel,
    base: Params,
    trained: Mapping[str, Params],
) -> None:
    name_of_base = str(source.model)
    pad = begun.model.config.pad_token_id
    named = hf.read_config(hf.find_folder(name_of_base)).pad_token_id
    with writing.replacing(run.adapter) as new:
        for name, part in trained.items():
            adapters = jax.device_get(part)
            is_misread = "score" in adapters and pad != named
            place = f"pads_with_{pad}" if is_misread else ""
            base_model = None if is_misread else source.model
            models.lora.save(new / name / place, base, adapters, base_model=base_model)
            begun.save_tokenizer(new / name, source.text.template)
            if is_misread:
                text = _MISREAD.format(base=name_of_base, pad=pad, place=place)
                (new / name / "README.md").write_text(text, encoding="utf-8")


_MISREAD = """# Adapters of a reward model

transformers takes a reward model's score at the last token that is no pad. The padding token of
the base model, `{base}`, also ends an answer, or it has none: loaded as it is, the base would give
scores of another token. So the adapters lie in `{place}`, where PEFT finds them only if it is told,
and name no base model. Load both with another padding token:

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained(
    "{base}", num_labels=1, pad_token_id={pad}
)
model = PeftModel.from_pretrained(base, "adapter", subfolder="{place}")
```

The folder `model/` beside this one has the adapters merged and needs none of this.
"""


def _draw_page(run: folder.Run) -> None:
    """Draws ``report.html`` and prints a sentence about the result, or why it cannot."""
    from rlhf_jax.report import page, records, verdict  # a run needs them at its end alone

    try:
        page.write([run.path], run.report)
        logger.info(f"saved {run.report}")
        [group] = records.groups(records.find([run.path]))
        answers = verdict.rewarded(group)
        titled = ["Rewarded, for example:", *answers] if answers else []
        logger.info("\n    ".join([verdict.sentence(group), *titled]))
        for caution in verdict.cautions(group):
            logger.info(f"caution: {caution}")
    except Exception as error:  # whatever it is: the run is done and its result saved
        logger.info(f"{run.report} could not be drawn: {type(error).__name__}: {error}")

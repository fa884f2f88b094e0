"""``rlhf-jax plan``: the command says what a stage holds, by hand counts, and whether it fits; its
programs compile.
"""

import dataclasses
import json
import re
from pathlib import Path

import forks
import jax
import pytest
from builders import ROOT, initial_params

from rlhf_jax import models
from rlhf_jax.algorithms import grpo, ppo
from rlhf_jax.cli.planning import plan, shapes
from rlhf_jax.config import (
    Compute,
    DistillStage,
    DPOStage,
    KTOStage,
    LoRA,
    Mesh,
    Network,
    PPOStage,
    RewardModelStage,
    RLStage,
    RunConfig,
    SFTStage,
    Text,
    Tokenizer,
)
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.training.common import initial, memory, remat
from rlhf_jax.training.rl.job import rows_at_once
from rlhf_jax.training.rl.method import method_of

# One layer of width 64, 32 tokens, 4 heads of which 2 are key and value heads, an MLP of 128.
SIZES = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
LLAMA = {"model_type": "llama", **SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"max_position_embeddings": 16, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
# Embedding and output, q and o, k and v, the MLP's three, three norms; the value head of PPO:
# weights and a bias.
COUNT = 2 * 32 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 3 * 64
HEAD = 64 + 1
RL = ["--rl.max-prompt-length", "2", "--rl.max-new-tokens", "2", "--reward", "length"]
SHORT = [*RL, "--rl.batch-size", "4", "--ppo.num-epochs", "1"]


@pytest.fixture
def folder(tmp_path):
    """A model folder that holds config.json alone."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


def test_a_plan_names_a_dtype_that_no_file_has(folder):
    settings = RunConfig(model=folder)
    (Path(folder) / "config.json").write_text(json.dumps(LLAMA | {"dtype": "auto"}))
    with pytest.raises(UserError, match="dtype is 'auto', expected float32, bfloat16"):
        shapes.shapes_of(settings, "sft")


@pytest.fixture
def no_phases(monkeypatch):
    """Plans compile none but the phase of the reward: a second in place of many."""
    shapes_of = shapes.shapes_of

    def short(*args):
        held, programs, parts = shapes_of(*args)
        return shapes.Shapes(held, {"reward": programs["reward"]}, parts)

    monkeypatch.setattr(plan, "shapes_of", short)


def mebibytes(text):
    """{what: MiB} of the lines that a plan prints."""
    return {
        what: float(size)
        for size, what in re.findall(r"^ *([\d.]+) MiB  (.*)$", text, re.MULTILINE)
    }


def printed(capsys, *flags):
    assert plan.main([*flags, "--devices", "4"]) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("no_phases")
def test_ppo_prints_what_it_holds_its_peak_and_a_flag_that_helps(folder, capsys, monkeypatch):
    options = plan.options
    monkeypatch.setattr(
        plan, "options", lambda *args: {"--lora.rank 8": options(*args)["--lora.rank 8"]}
    )
    found = []  # how its plan samples
    recorded = initial.recorded
    monkeypatch.setattr(
        initial, "recorded", lambda *args: found.append(recorded(*args)) or found[-1]
    )
    text = printed(capsys, "ppo", "--model", folder, *SHORT, "--memory", "0.0004GB")
    said = mebibytes(text)
    model = 4 * (COUNT + HEAD) / 2**20
    assert said["parameters"] == pytest.approx(model, abs=6e-4)
    assert said["of it gradients"] == pytest.approx(model, abs=6e-4)
    assert said["optimizer"] == pytest.approx(2 * model, abs=6e-4)  # Adam's two moments, float32
    assert said["reference"] == pytest.approx(
        2 * COUNT / 2**20, abs=6e-4
    )  # in the file's bfloat16, without the head
    held = sum(
        said.get(part, 0) for part in ("parameters", "optimizer", "reference", "reward models")
    )
    assert said["at the peak"] == pytest.approx(held + said["more in the phase 'reward'"], abs=3e-3)
    assert "of the whole process at the peak" not in said
    best = re.match(
        r"needs (\S+) GiB at the peak; each device has 0\.000373 GiB: does not fit\. "
        r"What helps most: --lora\.rank 8, needs (\S+) GiB\nppo on 4 devices",
        text,
    )
    assert best, text
    assert float(best[1]) == pytest.approx(said["at the peak"] / 1024, rel=6e-3)
    assert float(best[2]) < float(best[1])
    assert {how.max_new_tokens for how in found} == {2}


def test_an_offloaded_reference_is_held_in_the_first_phase_alone(folder, monkeypatch):
    monkeypatch.setattr(memory, "needed", lambda phase: 0)
    rl = RLStage(batch_size=4, max_prompt_length=2, max_new_tokens=2)
    config = RunConfig(model=folder, reward=("length",), rl=rl)
    offload = dataclasses.replace(config.compute, offload=("reference",))
    config = dataclasses.replace(config, compute=offload)
    moved = plan.plan(config, "vpg", compile_phase=lambda case, phase, program: phase)
    assert "reference" not in moved.held
    assert moved.phases[shapes.SAMPLING] == 2 * COUNT
    assert moved.peak == sum(moved.held.values()) + 2 * COUNT
    assert {moved.phases["reward"], moved.phases["learn"]} == {0}


def test_a_phase_of_bfloat16_takes_half_but_for_the_gradients_of_the_update(folder, monkeypatch):
    needed = 10**6
    monkeypatch.setattr(memory, "needed", lambda phase: needed)
    rl = RLStage(batch_size=4, max_prompt_length=2, max_new_tokens=2)
    config = RunConfig(model=folder, reward=("length",), rl=rl, compute=Compute(dtype="bfloat16"))
    phases = plan.plan(config, "vpg", compile_phase=lambda case, phase, program: phase).phases
    exact = 2 * 4 * COUNT  # float32 gradients, and as much again
    assert phases[shapes.SAMPLING] == needed / 2
    assert phases["learn"] == exact + (needed - exact) / 2


def test_rows_that_share_a_prompt_are_counted_by_the_tokens_that_are_left():
    """Four of them: 8 + 4 * 4 tokens in place of 4 * (8 + 4), half as many."""
    rl = RLStage(batch_size=32, max_new_tokens=4)
    config = RunConfig(reward=("length",), rl=rl, grpo=grpo.Config(group_size=4))
    method = method_of(config, shapes.RL["grpo"], config.grpo)._replace(shared_by=4)
    assert rows_at_once(method, 8) == 16
    assert rows_at_once(method._replace(shared_by=1), 8) == 32
    assert rows_at_once(method, 4) == 20


@pytest.mark.slow
def test_a_value_model_of_another_folder_is_planned(folder, tmp_path):
    """It has two layers where the policy has one. Under LoRA its frozen body is held too."""
    rank = 2
    larger = tmp_path / "critic"
    larger.mkdir()
    (larger / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 2}))
    stage = RLStage(batch_size=4, max_prompt_length=2, max_new_tokens=2)
    settings = PPOStage(value="separate", value_from=str(larger), num_epochs=1)
    lora = LoRA(rank=rank, match="q_proj")
    config = RunConfig(model=folder, reward=("length",), lora=lora, rl=stage, ppo=settings)
    held, programs, _ = shapes.shapes_of(config, "ppo")
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    values = COUNT + layer
    sizes = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in held.items()}
    adapter = rank * (64 + 64) + 1
    assert sizes["parameters"] == 3 * adapter + HEAD
    assert sizes["frozen weights"] == COUNT + values
    learn, *arguments = programs["learn"]
    state, _ = jax.eval_shape(learn, *arguments)
    assert jax.tree.structure(state.train.params) == jax.tree.structure(held["parameters"])


def test_a_distillation_without_a_teacher_is_refused(folder):
    rl = RLStage(batch_size=4, max_prompt_length=2, max_new_tokens=2)
    with pytest.raises(UserError, match=r"no teacher; give --distill\.teacher"):
        shapes.shapes_of(RunConfig(model=folder, rl=rl), "distill")


@pytest.mark.parametrize("teacher", ["folder", "server"])
def test_the_update_of_a_distillation_is_planned(teacher, folder):
    """From whole distributions of a teacher in its file's bfloat16, or from what a server tells of
    the sampled tokens. Without a reward it scores the samples.
    """
    settings = DistillStage(teacher=folder)
    if teacher == "server":
        settings = DistillStage(teacher="openai:http://host:8000", divergence="sampled")
    stage = RLStage(batch_size=4, max_prompt_length=2, max_new_tokens=2)
    config = RunConfig(model=folder, rl=stage, distill=settings)
    held, programs, _ = shapes.shapes_of(config, "distill")
    assert memory.on_device(held["teacher"]) == (2 * COUNT if teacher == "folder" else 0)
    assert not memory.on_device([held[name] for name in ("reward models", "reference")])
    rewarded, *arguments = programs["reward"]
    rollout, _ = jax.eval_shape(rewarded, *arguments)
    assert rollout.scores.shape == (4,)
    learn, *arguments = programs["learn"]
    state, _ = jax.eval_shape(learn, *arguments)
    assert jax.tree.structure(state.train.params) == jax.tree.structure(held["parameters"])


def test_a_plan_of_rollouts_ahead_has_what_its_run_has(folder):
    """A second policy with its number of steps, and the weights that correct its log-probs."""
    rl = RLStage(batch_size=4, max_prompt_length=2, max_new_tokens=2, rollouts_ahead=1)
    held, programs, _ = shapes.shapes_of(RunConfig(model=folder, reward=("length",), rl=rl), "vpg")
    assert sum(x.size for x in jax.tree.leaves(held["policy that samples"])) == COUNT + 1
    collect, *arguments = programs[shapes.SAMPLING]
    _, metrics = jax.eval_shape(collect, *arguments)
    assert "policy/importance_limited" in metrics


GIB = 2**30
LARGE = "does not fit. What helps most:"


@pytest.mark.parametrize(
    ("limit", "free", "peaks", "verdict"),
    [
        (5, 0, {}, "needs 3 GiB at the peak; each device has 5 GiB: fits"),
        (3, 0, {}, "needs 3 GiB at the peak; each device has 3 GiB: fits"),
        (
            2,
            0,
            {"a": 3, "b": 1, "c": 2},
            f"needs 3 GiB at the peak; each device has 2 GiB: {LARGE} b, needs 1 GiB",
        ),
        (
            2,
            0,
            {"a": 3},
            f"needs 3 GiB at the peak; each device has 2 GiB: {LARGE} {plan.OTHERWISE}",
        ),
        (  # one that cannot run is no advice
            2,
            0,
            {"a": ValueError(), "b": UserError("c"), "d": 1, "e": TypeError()},
            f"needs 3 GiB at the peak; each device has 2 GiB: {LARGE} d, needs 1 GiB",
        ),
        # Four devices of this machine, each with a fourth of it, and the process.
        (None, 3.25, {}, "needs 12.5 GiB at the peak; this machine has 13 GiB free: fits"),
        (
            None,
            3.0625,
            {"b": 1},
            f"needs 12.5 GiB at the peak; this machine has 12.2 GiB free: {LARGE} b, needs 4.5 GiB",
        ),
        (None, 0, {}, "needs 12.5 GiB at the peak; give --memory to compare it"),
    ],
)
def test_the_verdict_is_one_size_against_another(limit, free, peaks, verdict, monkeypatch):
    """If it does not fit, with the flag that has the lowest peak."""
    monkeypatch.setattr(plan, "options", lambda case: peaks)
    monkeypatch.setattr(plan.devices, "free_memory", lambda: free * GIB)

    def planned(peak, *_):
        if isinstance(peak, Exception):
            raise peak
        return plan.Plan({"parameters": peak * GIB}, {"learn": 0}, {})

    monkeypatch.setattr(plan, "plan", planned)
    said = plan.report(3, "ppo", None, limit and limit * GIB)
    assert said[0] == verdict
    assert ("    12.500 GiB  of the whole process at the peak" in said) is (limit is None)


def test_flags_that_are_on_are_not_offered():
    four = Mesh(data=-1)
    base = RunConfig(model="m", mesh=four, sft=SFTStage(batch_size=32))
    microbatches = (
        "--sft.num-microbatches 8"  # 32 rows on 4 devices: one row of each device at once
    )
    assert [*plan.options(shapes.Case(base, "sft"))] == [
        microbatches,
        "--compute.remat",
        "--compute.dtype bfloat16",
        "--lora.rank 8",
    ]
    on = {"compute": Compute(remat=True, dtype="bfloat16"), "lora": LoRA(rank=4)}
    some_on = RunConfig(model="m", mesh=four, **on, sft=SFTStage(batch_size=32))
    assert [*plan.options(shapes.Case(some_on, "sft"))] == [microbatches]
    all_on = RunConfig(model="m", mesh=four, **on, sft=SFTStage(batch_size=32, num_microbatches=8))
    assert plan.options(shapes.Case(all_on, "sft")) == {}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("ppo", r"give --data FILE, --length or --rl.max-prompt-length"),
        ("sft --batch-size 8", r"did you mean --sft\.batch-size\?$"),
        ("sft --memory 80", "--memory 80: expected a number with GB or GiB, such as 80GB"),
    ],
)
def test_wrong_flags_are_named(flags, sentence, folder):
    with pytest.raises(UserError, match=sentence):
        plan.main([*flags.split(), "--devices", "4", "--model", folder])


@pytest.mark.parametrize(
    ("name", "length", "changes", "sentence"),
    [
        ("sfft", None, {}, "no stage 'sfft'; there are sft, reward_model, dpo, kto, ppo, vpg"),
        ("ppo", 15, {"rl": RLStage(max_new_tokens=2)}, "of 17 tokens are longer than the 16"),
        ("sft", 17, {}, "of 17 tokens are longer than the 16"),
        ("sft", 2, {"sft": SFTStage(batch_size=6)}, r"sft\.batch_size 6 .* 4 devices; use 4 or 8"),
        ("sft", 2, {"mesh": Mesh(tensor=4)}, r"mesh\.tensor 4 .* key and value heads of .*, 2"),
        ("reward_model", 2, {"reward_model": RewardModelStage(ensemble_size=2)}, "must be 1"),
    ],
)
def test_what_cannot_be_planned_is_named(name, length, changes, sentence, folder):
    config = dataclasses.replace(RunConfig(model=folder, reward=("length",)), **changes)
    with pytest.raises(UserError, match=sentence):
        shapes.shapes_of(config, name, length)


def test_the_answers_at_validations_are_a_phase(folder):
    """Six prompts on four devices are eight rows, which the model's 16 tokens leave 12 columns."""
    asked = DPOStage(batch_size=4, validation_prompts=6, max_new_tokens=4)

    def planned(section):
        return shapes.Case(RunConfig(model=folder, dpo=section), "dpo")

    made = shapes.shapes_of(planned(asked).config, "dpo").programs
    rollout = jax.eval_shape(*made[shapes.ANSWERING])
    assert rollout.tokens.shape == (8, 12 + 4)
    compare, state, text, functions = made[shapes.COMPARING]
    assert [array.shape for array in text] == [(8, 12 + 4)] * 3
    assert jax.eval_shape(compare, state, text, functions).shape == (8,)
    job = shapes._job(planned(asked))
    for other in ({"validation_prompts": 0}, {"max_new_tokens": 16}):
        none = planned(dataclasses.replace(asked, **other))
        assert shapes._answering(none, job, None, 16, None, None) == {}
    training = dataclasses.replace(asked, validation_fraction=0)  # training prompts are answered
    programs = shapes.shapes_of(planned(training).config, "dpo").programs
    assert jax.eval_shape(*programs[shapes.ANSWERING]).tokens.shape == (8, 12 + 4)


def test_the_reference_of_kto_is_counted(folder):
    config = RunConfig(model=folder, kto=KTOStage(batch_size=4))
    held, _, _ = shapes.shapes_of(config, "kto", None)
    assert memory.on_device(held["reference"]) == 2 * COUNT


def command(*flags):
    """The output of the command in a process of its own: it sets the number of devices itself."""
    done = forks.run(["python", "-m", "rlhf_jax", "plan", *flags], ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return mebibytes(done.stdout)


@pytest.mark.parametrize(
    "stage",
    [
        *(pytest.param(stage, marks=pytest.mark.soak) for stage in ("sft", "dpo", "kto")),
        pytest.param("grpo", marks=pytest.mark.slow),
    ],
)
def test_a_cut_mesh_takes_less_on_each_device(stage, folder):
    section = "rl" if stage == "grpo" else stage
    rows = (f"--{section}.batch-size", "8", *(RL if stage == "grpo" else ()))
    flags = (stage, "--devices", "4", "--model", folder, "--lora.rank", "4", *rows)
    whole = command(*flags)
    cut = command(*flags, "--mesh.fsdp", "2", "--mesh.tensor", "2")
    assert cut.keys() == whole.keys()
    assert any(what.startswith("more in the phase 'learn'") for what in cut)
    assert whole["frozen weights"] == pytest.approx(2 * COUNT / 2**20, abs=6e-4)
    assert cut["frozen weights"] == pytest.approx(
        whole["frozen weights"] / 4, abs=2e-3
    )  # all but the norms
    for what in ("parameters", "optimizer"):
        assert cut[what] < 0.8 * whole[what]  # adapters are cut by one of the two axes


@pytest.mark.slow
def test_all_phases_of_ppo_compile():
    """All phases of the shipped settings, with what each needs."""
    said = command(
        "ppo", "--config", "tiny", "--length", "4", "--devices", "2", "--rl.max-new-tokens", "2"
    )
    held = sum(said[part] for part in ("parameters", "optimizer", "reference"))
    phases = said.keys()
    more = [said[phase] for phase in phases if phase.startswith("more")]
    assert len(more) == 3
    assert said["at the peak"] == pytest.approx(held + max(more), abs=3e-3)
    assert jax.device_count() == 4  # the command's own are its process's


@pytest.fixture
def with_data(tmp_path):
    """A model folder of characters, and pairs of which the longest has 2 + 5 characters."""
    tokenizer = tokenizers.characters(["ab"])
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    model = models.build(models.GPT2Config(tokenizer.vocab_size, 32, 8, 1, 2, **ids))
    how = SamplingConfig(4, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    language_model = LanguageModel(model, initial_params(model), tokenizer)
    language_model.save(tmp_path / "m", template="{prompt}", config=how)
    pairs = [{"prompt": "ab", "chosen": "aaaaa", "rejected": "b"}] * 2
    pairs += [{"prompt": "aba", "chosen": "a", "rejected": "b"}]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    data = (str(tmp_path / "pairs.json"),)
    return RunConfig(model=str(tmp_path / "m"), data=data, rl=RLStage(max_new_tokens=8))


def test_the_length_of_a_plan_is_that_of_the_widest_batch(with_data):
    alone = dataclasses.replace(with_data, compute=Compute(share_prompts=False))
    narrow = dataclasses.replace(alone, text=Text(bucket_multiple=3))

    def longest(config, name):
        return plan.read_data(config, name)[1]

    assert longest(narrow, "dpo") == 9  # for 2 + 5 tokens and the end of the text
    wide = dataclasses.replace(alone, text=Text(bucket_multiple=50))
    assert longest(wide, "dpo") == 32  # as many as the model reads
    assert longest(with_data, "ppo") == 3
    bounded = dataclasses.replace(
        with_data, rl=dataclasses.replace(with_data.rl, max_prompt_length=2)
    )
    assert longest(bounded, "ppo") is None
    assert longest(dataclasses.replace(with_data, data=()), "dpo") is None
    network = Network(hidden_size=8, num_layers=1, num_heads=1, max_length=32)
    letters = {"tokenizer": Tokenizer(kind="characters"), "network": network}
    by_letters = dataclasses.replace(with_data, model=None, **letters)
    file = Path(with_data.data[0])
    file.write_text(file.read_text().replace("ab", "xy"))  # letters that only the data has
    assert longest(by_letters, "ppo") == 3  # of a tokenizer that the run would train
    assert longest(dataclasses.replace(by_letters, tokenizer=Tokenizer()), "ppo") < 3
    assert plan.describe_length("ppo", None, 3) == "longest prompt: 3 tokens, of the data"
    assert plan.describe_length("dpo", 8, 8) == "row: 8 tokens (--length)"


@pytest.mark.parametrize(
    "flags",
    [
        ["ppo", "--rl.batch-size", "8"],
        ["ppo", "--rl.max-prompt-length", "30", "--length", "9"],
        ["sft"],
    ],
)
def test_a_plan_counts_the_parameters_of_its_run(flags, monkeypatch, capsys, tmp_path):
    """Of a vocabulary that is trained on the data, and of plain text too."""
    stage, *rest = flags
    if stage == "sft":
        (tmp_path / "text.json").write_text(json.dumps([{"text": "ab ab abc. " * 40}] * 4))
        rest = ["--sft.data", str(tmp_path / "text.json")]
    planned = []
    monkeypatch.setattr(plan, "report", lambda *args: planned.append(args) or ["", ""])
    plan.main([stage, "--config", "tiny", "--devices", "4", *rest])
    settings = planned[0][0]
    params = shapes.Case(settings, stage).language_model(None).params
    if stage == "ppo":
        assert sum(x.size for x in jax.tree.leaves(params)) == 52_000  # as a run says
    else:
        assert settings.tokenizer.vocab_size < 300
    assert capsys.readouterr().out.strip().count("\n") <= 1


def test_a_plan_shares_the_prompts_of_comparisons_as_a_run_does(with_data):
    """2 + 6 + 2 tokens of a pair with its prompt, in place of two rows for 8."""
    narrow = dataclasses.replace(with_data, text=Text(bucket_multiple=3))
    config, columns = plan.read_data(narrow, "dpo")
    assert config.compute.share_prompts is True
    assert columns == 12
    made = shapes.shapes_of(config, "dpo", columns)
    _, _, batch, *_ = made.programs["learn"]
    assert batch.tokens.shape == (config.dpo.batch_size, 12)
    assert batch.documents.shape == (config.dpo.batch_size, 1, 2)
    alone = shapes.shapes_of(with_data, "dpo", 9)
    _, _, batch, *_ = alone.programs["learn"]
    assert batch.tokens.shape == (config.dpo.batch_size, 2, 9)
    with pytest.raises(UserError, match="rows of 65 tokens"):
        shapes.shapes_of(config, "dpo", 65)


@pytest.mark.parametrize(
    ("layers", "limit", "given", "chosen"),
    [
        (8, 1e6, "auto", True),
        (8, 1e12, "auto", False),
        (8, 0, "auto", False),
        (7, 1e6, "auto", False),
        (8, 1e6, False, False),
        (8, 1e12, True, True),
    ],
)
def test_a_plan_chooses_remat_as_a_run_does(layers, limit, given, chosen, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": layers}))
    config = RunConfig(model=str(tmp_path), compute=Compute(remat=given))
    assert plan.choose_remat(config, "sft", 16, limit).compute.remat is chosen


def test_rows_of_an_update_decide_about_remat(tmp_path):
    """A pair is two rows; minibatches and microbatches are as many parts of an iteration."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 8}))
    config = RunConfig(model=str(tmp_path), dpo=DPOStage(batch_size=4))
    model, params, _ = shapes.Case(config, "dpo").language_model(config.model)
    stored = remat.stored(model.config, 8 // jax.device_count(), 16)
    # The parameters as they are loaded, and five copies of each in float32.
    size = memory.on_device(jax.eval_shape(model.init, jax.random.key(0)))
    least = memory.on_device(params) + (stored + 5 * size) / 0.9
    assert plan.choose_remat(config, "dpo", 16, least - 4).compute.remat
    assert not plan.choose_remat(config, "dpo", 16, least + 4).compute.remat
    rl = RLStage(batch_size=32, max_new_tokens=8)
    config = dataclasses.replace(
        config, rl=rl, ppo=ppo.Config(num_minibatches=2, num_microbatches=2)
    )
    assert not plan.choose_remat(config, "ppo", 8, least + 4).compute.remat
    two = dataclasses.replace(
        config, ppo=PPOStage(num_minibatches=2, num_microbatches=2, value="separate")
    )
    assert plan.choose_remat(two, "ppo", 8, least + 4 * size).compute.remat


def test_a_checked_answer_is_no_part_of_a_plan(folder):
    config = RunConfig(model=folder, reward=("math",))
    planned = shapes.Case(config, "ppo")
    method = method_of(config, ppo, config.ppo)
    assert shapes._reward(planned, method, None) is None

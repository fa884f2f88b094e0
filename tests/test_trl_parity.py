"""Losses and gradients against TRL 1.16: the same rows and weights go into TRL's own trainers and
into ours, from messages or texts to the loss and every parameter's gradient.

Where TRL means something else by a name, the difference stands in the test.
"""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from jax.tree_util import Partial
from numpy.testing import assert_allclose
from tabular import numbers
from torch_models import assert_gradients_equal, torch_model

from rlhf_jax import dpo, grpo, kto, losses, models, reward_model, sft
from rlhf_jax.config import DPOStage
from rlhf_jax.data import batches, chat, encoding, formats
from rlhf_jax.data.tokenizers import load_tokenizer, train_bpe
from rlhf_jax.training.common import references
from rlhf_jax.types import Rollout, TrainState

pytestmark = pytest.mark.parity

# The line end stands before a turn, so that texts end with the token that ends a turn: TRL's reward
# model reads its score at the last token.
TEMPLATE = (
    "{% for m in messages %}{{ '' if loop.first else '\\n' }}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
IDS = {"<pad>": "pad_token", "<|im_end|>": "eos_token"}
WIDTH = 128  # of our arrays: one shape of six rows for all losses, compiled once
COMMON = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}


def says(role, content):
    return {"role": role, "content": content}


BRIEF = says("system", "Be brief.")
WARM = says("user", "Is ice warm?")
NO = says("assistant", "No.")
WHY = says("user", "Why?")
FROZEN = says("assistant", "It is frozen water.")
YES = says("assistant", "Yes, it is warm.")
TALKS = [
    [BRIEF, WARM, NO, WHY, FROZEN],
    [WARM, YES],
    [WHY, FROZEN, WARM, NO, WHY, NO],
    [WHY, NO],
    [BRIEF, WARM, YES],
    [WARM, NO, WHY, FROZEN],
]
PAIRS = [
    {"prompt": [BRIEF, WARM, NO, WHY], "chosen": [FROZEN], "rejected": [YES]},
    {"prompt": [WARM, NO, WHY], "chosen": [FROZEN], "rejected": [NO]},
    {"prompt": [WHY], "chosen": [NO], "rejected": [FROZEN]},
]


class Side:
    """A folder's weights in both: our model, and that of transformers."""

    def __init__(self, folder, kind="causal_lm", seed=0):
        import torch
        import transformers

        self.tokenizer = load_tokenizer(folder)
        self.theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ids = {"vocab_size": len(self.theirs), "max_position_embeddings": 128}
        ids |= {key + "_id": self.theirs.convert_tokens_to_ids(x) for x, key in IDS.items()}
        size = {"num_hidden_layers": 2, **({"num_labels": 1} if kind == "classifier" else {})}
        self.torch = torch_model("Llama", kind, **ids, **size)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.torch.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        path = folder / f"{kind} {seed}"
        self.torch.save_pretrained(path)
        self.path = str(path)
        self.model, self.params = models.load(path)
        has_head = kind == "classifier"
        self.fn = jax.jit((models.score_fn if has_head else models.policy_fn)(self.model))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tokenizer."""
    path = tmp_path_factory.mktemp("trl")
    backend = train_bpe([json.dumps(TALKS)] * 3, 300).backend
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special])
    backend.save(str(path / "tokenizer.json"))
    config = {name: token for token, name in IDS.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def policy(folder):
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    return Side(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return Side(folder, seed=3)


def trainer_of(name, side, rows, folder, given=(), **settings):
    """TRL's trainer of these rows, out of training: no dropout, no accumulation."""
    import datasets
    import trl

    args = getattr(trl, f"{name}Config")(output_dir=str(folder / "out"), **COMMON, **settings)
    data = datasets.Dataset.from_list(rows)
    trainer = getattr(trl, f"{name}Trainer")(
        side.torch, args=args, train_dataset=data, processing_class=side.theirs, **dict(given)
    )
    trainer.model.eval()
    return trainer


def batch_of(trainer):
    rows = [trainer.train_dataset[number] for number in range(len(trainer.train_dataset))]
    kept = trainer._signature_columns or rows[0]
    return trainer.data_collator([{k: v for k, v in row.items() if k in kept} for row in rows])


def our_batch(side, kind, rows, write, collate, template="auto"):
    chat_template = chat.template_of(side.tokenizer, template)
    found = formats.read(kind, write(rows), template=chat_template).rows
    encoded = encoding.encode_texts(found, side.tokenizer, template=template)
    return collate(encoded, np.arange(len(found)), WIDTH)


def real(tokens, mask):
    """The tokens of each row without padding."""
    rows = zip(np.asarray(tokens), np.asarray(mask) == 1, strict=True)
    return [row[kept].tolist() for row, kept in rows]


def assert_equal(side, ours, expected, gradients=True):
    """Our loss, a function of the parameters, and its gradients are those of TRL's."""
    if not gradients:
        return assert_allclose(numbers(ours)(side.params)[0], expected.item(), rtol=1e-5)
    (loss, _), found = jax.value_and_grad(numbers(ours), has_aux=True)(side.params)
    side.torch.zero_grad()
    expected.backward()
    assert_allclose(loss, expected.item(), rtol=1e-5)
    return assert_gradients_equal(side.model, found, side.torch)


# --- SFT

TEXTS = [("Is ice warm?", " No."), ("Why?", " It is frozen water."), ("Is it", " frozen?")] * 2
DEMONSTRATIONS = {
    "assistant_only_loss": ([{"messages": talk} for talk in TALKS], {}, "auto"),
    "completion_only_loss, messages": (
        [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in TALKS],
        {"completion": "response"},
        "auto",
    ),
    "completion_only_loss, texts": (
        [{"prompt": prompt, "completion": completion} for prompt, completion in TEXTS],
        {"completion": "response"},
        "{prompt}",
    ),
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_sft(name, policy, tmp_path, write):
    rows, names, template = DEMONSTRATIONS[name]
    option = name.split(",")[0]
    trainer = trainer_of("SFT", policy, rows, tmp_path, max_length=None, **{option: True})
    theirs = batch_of(trainer)
    expected = trainer.compute_loss(trainer.model, dict(theirs))
    ours = [{names.get(key, key): value for key, value in row.items()} for row in rows]
    batch = our_batch(policy, "demonstrations", ours, write, batches.demonstration_batch, template)
    ids = theirs["input_ids"]
    assert real(batch.tokens, batch.attention_mask) == real(ids, theirs["attention_mask"])
    assert real(batch.tokens, batch.response_mask) == real(ids, theirs["labels"] != -100)
    options = {"policy_fn": policy.fn, "config": sft.Config()}
    assert_equal(policy, lambda params: sft.loss(params, batch, None, **options), expected)


# --- Preferences

NORMAL = {"length_normalised": True}
KINDS = {
    "sigmoid": (dpo.Config(), {}),
    "hinge": (dpo.Config(kind="hinge", beta=0.2), {}),
    "robust": (dpo.Config(kind="robust", label_smoothing=0.2), {"label_smoothing": 0.2}),
    "ipo": (dpo.Config(kind="ipo", **NORMAL), {}),  # theirs is of means over tokens
    "apo_zero": (dpo.Config(kind="apo_zero"), {}),
    "apo_down": (dpo.Config(kind="apo_down"), {}),
    "sigmoid_norm": (dpo.Config(**NORMAL), {}),
    "aot_unpaired": (dpo.Config(label_smoothing=0.2), {"label_smoothing": 0.2}),
    "sigmoid, sft": (dpo.Config(sft_coef=0.5), {"loss_weights": [1.0, 0.5]}),
}


@pytest.fixture(scope="module")
def preferred(policy, reference, folder):
    """A DPOTrainer, whose loss is chosen later."""
    given = {"ref_model": reference.torch}
    return trainer_of("DPO", policy, PAIRS, folder, given, max_length=None)


@pytest.mark.parametrize("name", KINDS)
def test_dpo(name, policy, reference, preferred, write):
    """TRL has the smoothing of cDPO under the name aot_unpaired alone, which sorts the log-ratios
    of a batch: there the pairs are equal.
    """
    config, theirs = KINDS[name]
    numbers = [0, 0, 0] if name == "aot_unpaired" else [0, 1, 2]
    rows = [PAIRS[number] for number in numbers]
    preferred.loss_types = name.split(", ")
    preferred.loss_weights = theirs.get("loss_weights", [1.0])
    preferred.label_smoothing = theirs.get("label_smoothing", 0.0)
    preferred.beta = config.beta
    inputs = preferred.data_collator([preferred.train_dataset[i] for i in numbers])
    expected = preferred.compute_loss(preferred.model, dict(inputs))
    batch = our_batch(policy, "pairs", rows, write, batches.comparison_batch)
    for mask, same in (("attention_mask", "attention_mask"), ("response_mask", "completion_mask")):
        ours = [real(batch.tokens[:, k], getattr(batch, mask)[:, k]) for k in (0, 1)]
        assert [*ours[0], *ours[1]] == real(inputs["input_ids"], inputs[same])
    batch = dpo.with_reference(batch, Partial(policy.fn, reference.params))
    options = {"policy_fn": policy.fn, "config": config}
    assert_equal(policy, lambda params: dpo.loss(params, batch, None, **options), expected)


@pytest.fixture(scope="module")
def scorer(folder):
    return Side(folder, "classifier")


@pytest.mark.parametrize("margin", [None, 0.5])
def test_reward_model(margin, scorer, tmp_path, write):
    rows = PAIRS
    if margin is not None:
        rows = [row | {"margin": margin * number} for number, row in enumerate(PAIRS)]
    settings = {"center_rewards_coefficient": 0.05, "max_length": None}
    trainer = trainer_of("Reward", scorer, rows, tmp_path, **settings)
    expected = trainer.compute_loss(trainer.model, dict(batch_of(trainer)))
    batch = our_batch(scorer, "pairs", rows, write, batches.comparison_batch)
    assert (batch.margin is None) == (margin is None)
    options = {"score_fn": scorer.fn, "config": reward_model.Config(centering=0.05)}
    assert_equal(scorer, lambda params: reward_model.loss(params, batch, None, **options), expected)


def test_kto(policy, reference, tmp_path, write):
    """TRL joins a prompt with the answer of the row before, we with that of the row behind: the
    rows stand in opposite orders.
    """
    rows = [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row in PAIRS
        for key in ("chosen", "rejected")
    ]
    given = {"ref_model": reference.torch}
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    settings = {"per_device_train_batch_size": 6, "max_length": None, **weights}
    trainer = trainer_of("KTO", policy, rows[::-1], tmp_path, given, **settings)
    expected = trainer.compute_loss(trainer.model, dict(batch_of(trainer)))
    kl = trainer._metrics["eval"]["kl"][-1]
    names = {"completion": "response", "label": "desirable"}
    ours = [{names.get(key, key): value for key, value in row.items()} for row in rows]
    batch = our_batch(policy, "feedback", ours, write, batches.feedback_batch)
    batch = kto.with_reference(batch, Partial(policy.fn, reference.params))
    point = kto.reference_point(policy.params, batch, policy_fn=policy.fn)
    assert_allclose(point, kl, rtol=1e-5)
    assert kl > 0
    options = {"policy_fn": policy.fn, "config": kto.Config(**weights)}
    assert_equal(policy, lambda params: kto.loss(params, batch, None, **options), expected)


def test_kto_step_by_step(reference, folder, tmp_path, write):
    """Two desirable answers among ten, none of them in the second batch: reference points, losses
    and all weights of six steps of Adam. The longest of the mismatched texts is cut.
    """
    import torch

    side = Side(folder, seed=1)
    size = 5
    asked = [[WARM, NO, WHY], [WHY], [WARM], [BRIEF, WARM], [WARM]] * 2
    answers = [NO, FROZEN, YES, NO, FROZEN, NO, FROZEN, FROZEN, NO, YES]
    rows = [
        {"prompt": prompt, "completion": [answer], "label": number in (1, 3)}
        for number, (prompt, answer) in enumerate(zip(asked, answers, strict=True))
    ]
    weights = {"desirable_weight": 4.0, "undesirable_weight": 1.0}
    texts = [[*row["prompt"], *row["completion"]] for row in rows]
    longest = max(len(side.theirs.apply_chat_template(text)["input_ids"]) for text in texts)
    settings = {"per_device_train_batch_size": size, "max_length": longest, **weights}
    turned = [row for start in (0, size) for row in rows[start : start + size][::-1]]
    given = {"ref_model": reference.torch}
    trainer = trainer_of("KTO", side, turned, tmp_path, given, **settings)
    theirs = torch.optim.Adam(side.torch.parameters(), lr=3e-3)

    names = {"completion": "response", "label": "desirable"}
    ours = [{names.get(key, key): value for key, value in row.items()} for row in rows]
    chat_template = chat.template_of(side.tokenizer, "auto")
    found = formats.read("feedback", write(ours), template=chat_template).rows
    encoded = encoding.encode_texts(found, side.tokenizer, template="auto", max_length=longest)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
    state = TrainState.create(side.params, optimizer)
    is_cut = False
    points = []
    for step in range(6):
        numbers = np.arange(size) + size * (step % 2)
        inputs = trainer.data_collator([trainer.train_dataset[int(i)] for i in numbers])
        expected = trainer.compute_loss(trainer.model, dict(inputs))
        theirs.zero_grad()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(side.torch.parameters(), 1.0)
        theirs.step()
        batch = batches.feedback_batch(encoded, numbers, 8)
        batch = kto.with_reference(batch, Partial(side.fn, reference.params))
        others = real(batch.mismatched.tokens, batch.mismatched.attention_mask)
        assert others[::-1] == real(inputs["KL_input_ids"], inputs["KL_attention_mask"])
        whole = [len(row["prompt_ids"] + row["KL_completion_ids"]) for row in trainer.train_dataset]
        is_cut |= max(whole) > longest == max(map(len, others))
        state, metrics = kto.update(
            state,
            batch,
            None,
            policy_fn=side.fn,
            optimizer=optimizer,
            config=kto.Config(**weights),
        )
        assert_allclose(metrics["kto/loss"], expected.item(), rtol=1e-4)
        points.append(trainer._metrics["eval"]["kl"][-1])
        assert_allclose(metrics["kto/reference_point"], points[-1], rtol=1e-4, atol=1e-5)
    assert is_cut
    assert min(points) == 0 < max(points)
    side.torch.save_pretrained(tmp_path / "trained")
    _, trained = models.load(tmp_path / "trained")
    jax.tree.map(lambda x, y: assert_allclose(x, y, atol=2e-4), state.params, trained)


def test_losses_without_a_reference():
    """ORPO's odds ratio alone: TRL's likelihood is that of the prompt too."""
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    chosen = np.array([-0.3, -1.2, -2.0], np.float32)
    rejected = np.array([-0.9, -0.4, -2.5], np.float32)
    given = [torch.tensor(x, requires_grad=True) for x in (chosen, rejected)]
    device = SimpleNamespace(device="cpu")
    simpo = {"loss_type": "simpo", "simpo_gamma": 1.0, "label_smoothing": 0.1, "alpha": 0.0}
    simpo = SimpleNamespace(beta=2.0, accelerator=device, **simpo)
    odds = SimpleNamespace(beta=0.3, accelerator=device)
    for ours, theirs in (
        (
            {"gamma": 1.0, "label_smoothing": 0.1, "beta": 2.0, "kind": "simpo"},
            lambda: CPOTrainer.cpo_loss(simpo, *given)[0],
        ),
        (
            {"beta": 0.3, "kind": "orpo"},
            lambda: -given[0] - ORPOTrainer.odds_ratio_loss(odds, *given)[0],
        ),
    ):
        expected = theirs()
        gradients = torch.autograd.grad(expected.sum(), given)
        loss, backward = jax.vjp(lambda x, y, how=ours: losses.dpo(x, y, **how), chosen, rejected)
        assert_allclose(loss, expected.detach(), rtol=1e-5)
        assert_allclose(backward(jnp.ones(3)), gradients, rtol=1e-5)


# --- GRPO

GROUP = 3
REWARDS = [0.0, 1.0, 3.0, -1.0, 0.5, 0.5]
LENGTH = 8
OF_TOKENS = {"aggregate": "token"}
# TRL's loss_type, ours, and whether the ratio is that of a row.
POLICY_LOSSES = {
    "grpo": ({"aggregate": "sequence"}, "token"),
    "bnpo": (OF_TOKENS, "token"),
    "dapo": ({**OF_TOKENS, "clip_high": 0.28}, "token"),
    "dr_grpo": ({"aggregate": "fixed", "length": LENGTH, "scale": False}, "token"),
    "gspo": ({"ratio": "sequence"}, "sequence"),
    "luspo": ({"ratio": "sequence", "aggregate": "sum"}, "sequence"),
    "sapo": ({"surrogate": "sapo"}, "token"),
    # Theirs is clipped above alone, at epsilon_high itself.
    "cispo": ({**OF_TOKENS, "surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.1}, "token"),
    "vespo": ({**OF_TOKENS, "surrogate": "vespo", "ratio": "product"}, "token"),
}


@pytest.fixture(scope="module")
def sampled(policy, reference, folder):
    """A GRPOTrainer and the batch of two prompts, whose answers are given to it; the reference is
    what sampled them.
    """
    rng = np.random.default_rng(0)
    prompts = [policy.theirs(text)["input_ids"] for text, _ in TEXTS[:2]]
    answers = [rng.integers(5, 200, length).tolist() for length in (8, 3, 5, 1, 6, 4)]
    rollout = {
        "prompt_ids": [prompt for prompt in prompts for _ in range(GROUP)],
        "completion_ids": answers,
        "logprobs": [[0.0] * len(answer) for answer in answers],
    }
    given = {
        "reward_funcs": lambda completions, **columns: REWARDS,
        "rollout_func": lambda prompts, trainer: dict(rollout),
    }
    settings = {"num_generations": GROUP, "num_generations_eval": GROUP, "beta": 0.1}
    settings |= {"max_completion_length": LENGTH, "use_bias_correction_kl": True}
    settings |= {"per_device_train_batch_size": 6, "per_device_eval_batch_size": 6}
    policy.torch.config._name_or_path = reference.path  # TRL reads the reference from it
    rows = [{"prompt": text} for text, _ in TEXTS[:2]]
    trainer = trainer_of("GRPO", policy, rows, folder, given, **settings)
    inputs = [row for row in rows for _ in range(GROUP)]
    batch = trainer._generate_and_score_completions(inputs)
    batch["old_per_token_logps"] = batch["ref_per_token_logps"]
    return trainer, batch


def as_rollout(batch, of_reference):
    """TRL's tensors, in whose columns the prompts do not stand, as ours."""
    prompt = batch["prompt_ids"].shape[1]

    def placed(values, start=prompt):
        end = WIDTH - start - values.shape[1]
        return jnp.pad(jnp.asarray(np.asarray(values)), ((0, 0), (start, end)))

    tokens = placed(batch["prompt_ids"], 0) + placed(batch["completion_ids"])
    answer = placed(batch["completion_mask"])
    mask = placed(batch["prompt_mask"], 0) + answer
    rollout = Rollout(tokens, mask, answer, placed(batch["old_per_token_logps"]))
    return rollout.replace(scores=jnp.array(REWARDS), ref_log_probs=placed(of_reference))


@pytest.mark.parametrize(
    ("name", "beta"),
    [(name, 0.0) for name in POLICY_LOSSES] + [(name, 0.1) for name in POLICY_LOSSES][:-1],
)
def test_grpo(name, beta, policy, sampled):
    """With a KL the losses alone are equal: the ratio that weighs the KL term has a gradient in TRL
    and none here. Under VESPO that ratio is the token's in TRL, and the row's here.
    """
    trainer, batch = sampled
    ours, level = POLICY_LOSSES[name]
    config = grpo.Config(group_size=GROUP, kl_loss_coef=beta, **ours)
    trainer.loss_type = "grpo" if name == "gspo" else name
    trainer.importance_sampling_level = level
    trainer.epsilon_high = 1.0 + config.clip_high if name == "cispo" else config.clip_high
    trainer.beta = beta
    batch = dict(batch)
    if not config.scale:
        scores = np.array(REWARDS, np.float32).reshape(-1, GROUP)
        batch["advantages"] = batch["advantages"].new_tensor(
            (scores - scores.mean(axis=1, keepdims=True)).ravel()
        )
    generator = np.random.default_rng(1)
    noise = generator.normal(0.0, 0.3, batch["ref_per_token_logps"].shape)
    batch["ref_per_token_logps"] = batch["ref_per_token_logps"] + batch["advantages"].new_tensor(
        noise.astype(np.float32)
    )
    expected = trainer.compute_loss(trainer.model, batch)
    rollout = as_rollout(batch, batch["ref_per_token_logps"])
    prepared = grpo.prepare(rollout, config=config)
    assert_allclose(prepared.advantages.sum(1) / rollout.mask.sum(1), batch["advantages"], 1e-5)
    options = {"policy_fn": policy.fn, "config": config}
    assert_equal(
        policy, lambda params: grpo.loss(params, prepared, None, **options), expected, beta == 0.0
    )


# --- Functions of their own


@pytest.mark.parametrize(
    ("kind", "beta", "theirs"),
    [("forward_kl", 0.5, 0.0), ("reverse_kl", 0.5, 1.0), ("jsd", 0.3, 0.3), ("jsd", 0.5, 0.5)],
)
def test_divergences(kind, beta, theirs):
    """At its betas 0 and 1 TRL's function is the KL itself."""
    import torch
    from trl.experimental.gkd import GKDTrainer

    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 3, 4, 7)).astype(np.float32)
    mask = np.array([[1, 1, 0, 1]] * 3)
    labels = torch.tensor(np.where(mask, 5, -100))
    given = [torch.tensor(x) for x in (student, teacher)]
    expected = GKDTrainer.generalized_jsd_loss(*given, labels=labels, beta=theirs, temperature=0.7)
    ours = losses.divergence(student / 0.7, teacher_logits=teacher / 0.7, kind=kind, beta=beta)
    mean = losses.aggregate(ours, mask)
    assert_allclose(mean.value, expected.numpy(), rtol=1e-5)


def test_the_weights_of_a_reference_that_moves():
    import torch
    from trl.trainer.callbacks import SyncRefModelCallback

    policies = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    model, target = (torch.nn.Linear(3, 1, bias=False) for _ in range(2))
    target.weight.data = torch.tensor(policies[:1])
    settings = DPOStage(reference_ema=0.6)
    move = references.mover(settings)
    state = references.Followed.create({"w": jnp.asarray(policies[0])}, optax.sgd(1.0))
    for step in range(1, 8):
        if step > 1:
            model.weight.data = torch.tensor(policies[step - 1][None])
            SyncRefModelCallback._sync_target_model(model, target, 0.6)
        if references.is_due(settings, step):
            state = replace(state, reference=move(state.reference, state.params))
        expected = target.weight.data.numpy()[0]
        assert_allclose(state.reference["w"], expected, rtol=1e-6, atol=1e-7)
        state = replace(state, params={"w": jnp.asarray(policies[step])})

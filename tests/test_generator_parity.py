"""A run's model/ in transformers alone: its chat template asks as the run did, and it says what
Generator says.
"""

import pytest

from rlhf_jax import ppo, training
from rlhf_jax.config import RunConfig, parse
from rlhf_jax.generation import generator

pytestmark = pytest.mark.parity

PROMPTS = [
    "What is a cat?",
    "Name a prime number.",
    "Hi",
    "Tell me how to make a good cup of tea, please.",
]
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/ of a short PPO run from random weights, large enough that texts depend on their
    prompts.
    """
    argv = [
        "--config",
        "configs/tiny.yaml",
        "--network.initializer-range",
        "0.3",
        "--rl.num-iterations",
        "1",
    ]
    argv += [
        "--rl.validation-fraction",
        "0",
        "--output-dir",
        str(tmp_path_factory.mktemp("runs") / "ppo"),
    ]
    return str(training.rl.run(parse(RunConfig, argv), ppo).model_folder)


def test_the_snippet_says_what_the_generator_says(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generations = generator.Generator(folder, max_new_tokens=NEW, temperature=0)(PROMPTS)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    how = {"add_generation_prompt": True}
    assert (
        tokenizer.apply_chat_template(chats[2], tokenize=False, **how) == "Human: Hi\nAssistant: "
    )
    alone = []
    for asked in chats:
        inputs = tokenizer.apply_chat_template(asked, return_dict=True, return_tensors="pt", **how)
        outputs = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        alone.append(
            tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    assert alone == generations.texts
    assert len(set(alone)) == len(PROMPTS)
    inputs = tokenizer.apply_chat_template(
        chats, return_dict=True, return_tensors="pt", padding=True, **how
    )
    with torch.no_grad():
        outputs = model.generate(
            **inputs,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    width = inputs["input_ids"].shape[1]
    assert (
        tokenizer.batch_decode(outputs.sequences[:, width:], skip_special_tokens=True)
        == generations.texts
    )
    log_probs = torch.stack(outputs.logits, dim=1).log_softmax(dim=-1)
    said = outputs.sequences[:, width:, None]
    for i, expected in enumerate(log_probs.gather(2, said)[..., 0].numpy()):
        ours = generations.token_log_probs[i]
        assert ours == pytest.approx(expected[: len(ours)], abs=2e-4)

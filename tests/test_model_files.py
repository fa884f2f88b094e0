"""Model folders without torch: round trips, kept keys, and messages that name what is wrong."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax import models
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf

CONFIG = models.GPT2Config(vocab_size=7, max_length=5, hidden_size=4, num_layers=2, num_heads=2, eos_token_id=1)


@functools.cache
def tiny():
    model = models.build(CONFIG)
    return model, model.init(jax.random.key(0))


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert jax.tree.map(lambda x: x.dtype, left) == jax.tree.map(lambda x: x.dtype, right)


def assert_same_files(one, other):
    for name in ("config.json", "model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture
def folder(tmp_path):
    models.save(tmp_path / "model", *tiny())
    return tmp_path / "model"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, **changes):
    keys = config_of(folder) | changes
    (folder / "config.json").write_text(json.dumps({name: x for name, x in keys.items() if x != "REMOVED"}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_round_trip_is_bit_equal_and_named_as_gpt2_lm_head_model(folder, tmp_path):
    model, params = models.load(folder)
    assert model.config == CONFIG
    assert_same(params, tiny()[1])
    models.save(tmp_path / "again", model, params)
    assert_same_files(tmp_path / "again", folder)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == 4 + 2 * 12
    assert tensors["transformer.h.1.attn.c_attn.weight"].shape == (4, 12)
    assert "lm_head.weight" not in tensors
    keys = config_of(folder)
    assert keys["architectures"] == ["GPT2LMHeadModel"]
    assert (keys["model_type"], keys["n_positions"], keys["n_embd"], keys["n_layer"]) == ("gpt2", 5, 4, 2)
    assert (keys["eos_token_id"], keys["bos_token_id"], keys["dtype"]) == (1, None, "float32")


def test_scanned_layers_share_the_files(folder, tmp_path):
    model, params = models.load(folder, scan_layers=True)
    expected = dict(tiny()[1])
    expected["h"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), expected.pop("h_0"), expected.pop("h_1"))
    assert_same(params, expected)
    models.save(tmp_path / "scanned", model, params)
    assert_same_files(tmp_path / "scanned", folder)


def test_shards_and_missing_prefix(folder):
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[:9], "two.safetensors": names[9:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(models.load(folder)[1], tiny()[1])
    (folder / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"two\.safetensors: no such file; model\.safetensors\.index\.json lists it"):
        models.load(folder)


@pytest.mark.parametrize("shard", ["../one.safetensors", "/one.safetensors", "sub/one.safetensors", "..", "a\\b"])
def test_index_names_stay_in_the_folder(folder, shard):
    (folder / "model.safetensors").rename(folder.parent / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": shard}}))
    with pytest.raises(UserError, match="is not the name of a file in this folder"):
        models.load(folder)


def add_buffers_and_output_table(tensors):
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 5, 5), np.uint8)
    tensors["transformer.h.1.attn.masked_bias"] = np.array(-1e4, np.float32)


def move_token_table(tensors):
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")


@pytest.mark.parametrize("change", [add_buffers_and_output_table, move_token_table])
def test_buffers_are_ignored_and_the_output_table_is_the_token_table(folder, change):
    edit_tensors(folder, change)
    assert_same(models.load(folder)[1], tiny()[1])


def test_dtype_casts_and_is_kept(folder, tmp_path):
    model, params = models.load(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    models.save(tmp_path / "half", model, params)
    assert config_of(tmp_path / "half")["dtype"] == "bfloat16"
    assert_same(models.load(tmp_path / "half")[1], params)
    computed = models.load(folder, compute_dtype="bfloat16", remat=True)[0].config
    assert computed == dataclasses.replace(CONFIG, compute_dtype="bfloat16", remat=True)


def test_other_keys_are_kept(folder, tmp_path):
    edit_config(folder, pad_token_id=3, eos_token_id=[1, 2], summary_type="mean", own={"a": [1]}, torch_dtype="float16")
    model, params = models.load(folder)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (3, (1, 2))
    hash(model.config)
    models.save(tmp_path / "again", model, params)
    keys = config_of(tmp_path / "again")
    assert (keys["pad_token_id"], keys["eos_token_id"]) == (3, [1, 2])
    assert (keys["summary_type"], keys["own"], keys["dtype"]) == ("mean", {"a": [1]}, "float32")
    assert "torch_dtype" not in keys


def test_missing_keys_have_transformers_defaults_and_aliases_are_read(folder):
    edit_config(folder, n_embd="REMOVED", hidden_size=4, resid_pdrop="REMOVED", eos_token_id="REMOVED", n_inner=None)
    config = models.load(folder)[0].config
    assert (config.hidden_size, config.residual_dropout, config.eos_token_id) == (4, 0.1, 50256)


HARMLESS = {"add_cross_attention": False, "pruned_heads": {}, "tie_word_embeddings": True, "per_layer_config": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 8}, r"hidden_size is 8 but n_embd is 4; remove one"),
        ({"model_type": "bert"}, r"model_type is 'bert'; the supported ones are: gpt2, llama"),
        ({"activation_function": "tanh"}, r"unknown activation 'tanh'; choose from gelu_new, gelu, relu"),
        ({"add_cross_attention": True}, r"add_cross_attention is True, which changes the logits"),
        ({"pruned_heads": {"0": [1]}}, r"pruned_heads is"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is"),
        ({"per_layer_config": {"0": {}}}, r"per_layer_config is"),
        ({"tie_word_embeddings": False}, r"tie_word_embeddings is False"),
        ({"is_causal": False}, r"is_causal is False"),
        ({"n_layer": "2"}, r"n_layer is '2'"),
        ({"n_layer": None}, r"n_layer is None"),
        ({"scale_attn_weights": 1}, r"scale_attn_weights is 1"),
        ({"layer_norm_epsilon": "1e-5"}, r"layer_norm_epsilon is '1e-5'"),
        ({"pad_token_id": [0]}, r"pad_token_id is \[0\]"),
        ({"n_head": 3}, r"hidden_size 4 is not a multiple of num_heads 3"),
        ({"reward_shift": "1"}, r"reward_shift is '1', expected a number"),
        # Sizes that the weights cannot have are refused before anything of such a size is made.
        ({"n_layer": 10**9}, r"num_layers is 1000000000, but .*model\.safetensors holds 28 tensors only"),
        ({"n_embd": 10**9}, r"hidden_size is 1000000000, but .* numbers only"),
        ({"vocab_size": 10**30}, r"vocab_size is 1000000000"),
        ({"n_positions": 10**9}, r"wpe\.weight has shape \[5, 4\], expected \[1000000000, 4\]"),
        ({"layer_norm_epsilon": 10**400}, r"layer_norm_epsilon is 1000000000"),
        ({"layer_norm_epsilon": float("nan")}, r"layer_norm_epsilon is nan"),
        ({"reward_shift": float("inf")}, r"reward_shift is inf, expected a number"),
        ({"architectures": 3}, None),
        (HARMLESS, None),
    ],
)
def test_config_keys_that_do_not_fit_are_refused_by_name(folder, changes, message):
    edit_config(folder, **changes)
    if message is None:
        assert_same(models.load(folder)[1], tiny()[1])
        return
    with pytest.raises(UserError, match=r"(config\.json|model\.safetensors): .*" + message):
        models.load(folder)


ZEROS = np.zeros(4, np.float32)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("transformer.h.1.ln_2.bias"), r"missing tensors: transformer\.h\.1\.ln_2\.bias$"),
        (put("extra", ZEROS), r"unexpected tensors: extra$"),
        (put("transformer.ln_f.bias", ZEROS[:3]), r"transformer\.ln_f\.bias has shape \[3\], expected \[4\]"),
        (put("transformer.ln_f.bias", np.zeros(4, np.int32)), r"transformer\.ln_f\.bias holds I32, expected floating"),
        (put("lm_head.weight", np.ones((7, 4), np.float32)), r"lm_head\.weight differs from transformer\.wte\.weight"),
        (put("ln_f.bias", ZEROS), r"(transformer\.)?ln_f\.bias is given twice, also as"),
        (
            lambda tensors: tensors.update({f"h.{layer}.ln_1.bias": ZEROS for layer in range(2, 12)}),
            r"unexpected tensors: h\.10\.ln_1\.bias, .* and 2 more$",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(UserError, match=r"model\.safetensors: " + message):
        models.load(folder)


def test_files_that_are_missing_or_broken_are_named(folder):
    def refuses(message, path=folder):
        with pytest.raises(UserError, match=message):
            models.load(path)

    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuses(r"model\.safetensors: no such file, nor .*pytorch_model\.bin is a pickle")
    (folder / "config.json").unlink()
    refuses(r"config\.json: no such file; a model folder holds config\.json and model\.safetensors")
    for content, message in (
        (b"[]", r"config\.json: expected a JSON object, got list"),
        (b"\xff\xff", r"config\.json: cannot be read as JSON in UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"config\.json: cannot be read as JSON in UTF-8"),
    ):
        (folder / "config.json").write_bytes(content)
        refuses(message)
    refuses(r"config\.json: not a folder", folder / "config.json")
    refuses(r"nowhere: no such folder, nor a name on the Hugging Face hub", folder / "nowhere")


def test_hub_names_fetch_json_and_safetensors_alone(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same(models.load("somebody/gpt2-tiny")[1], tiny()[1])
    options = {"allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": ["*/*"]}
    assert asked == [("somebody/gpt2-tiny", options)]

    def offline(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"somebody/gpt2-tiny: no such folder here, and .* hub did not.*no connection"):
        models.load("somebody/gpt2-tiny")


def with_score(gain=2.0, bias=0.5, shift=-3.0):
    params = models.add_head(jax.random.key(1), tiny()[1], "score")
    scalars = {"gain": gain, "bias": bias, "shift": shift}
    params["score"] |= {name: jnp.float32(value) for name, value in scalars.items()}
    return params


def test_reward_model_round_trip(tmp_path):
    model, params = tiny()[0], with_score()
    models.save(tmp_path, model, params)
    keys = config_of(tmp_path)
    assert keys["architectures"] == ["GPT2ForSequenceClassification"]
    assert (keys["num_labels"], keys["id2label"], keys["reward_shift"]) == (1, {"0": "LABEL_0"}, 2.0 * 0.5 - 3.0)
    np.testing.assert_array_equal(
        load_file(tmp_path / "model.safetensors")["score.weight"], 2.0 * params["score"]["kernel"][None, :]
    )
    loaded, loaded_params = models.load(tmp_path)
    head = loaded_params["score"]
    assert (head["gain"], head["bias"], head["shift"]) == (1.0, 0.0, -2.0)
    tokens, mask = np.array([[1, 2, 3], [0, 4, 5]]), np.array([[1, 1, 1], [0, 1, 1]])
    expected = models.score_fn(model)(params, tokens, mask, None)
    np.testing.assert_allclose(models.score_fn(loaded)(loaded_params, tokens, mask, None), expected, atol=1e-6)
    # Folding happens once: a second save gives the same bytes.
    models.save(tmp_path / "again", loaded, loaded_params)
    assert_same_files(tmp_path / "again", tmp_path)
    # A policy started from it forgets the shift.
    del loaded_params["score"]
    models.save(tmp_path, loaded, loaded_params)
    keys = config_of(tmp_path)
    assert keys["architectures"] == ["GPT2LMHeadModel"]
    assert "reward_shift" not in keys
    assert "score" not in models.load(tmp_path)[1]


def test_reward_folder_needs_one_label(tmp_path):
    models.save(tmp_path, tiny()[0], with_score())
    edit_tensors(tmp_path, lambda tensors: tensors.update({"score.weight": np.zeros((2, 4), np.float32)}))
    with pytest.raises(UserError, match=r"score\.weight has shape \[2, 4\], expected \[1, 4\]"):
        models.load(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("score.weight"))
    with pytest.raises(UserError, match=r"missing tensors: score\.weight"):
        models.load(tmp_path)


def test_value_head_lies_beside_the_weights(tmp_path):
    model, params = tiny()
    params = {**params, "value": {"kernel": jnp.arange(4.0), "bias": jnp.float32(2.0)}}
    models.save(tmp_path, model, params)
    assert_same(models.load(tmp_path)[1], params)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "value" in name]
    # Without one, the former one must not come back.
    models.save(tmp_path, model, tiny()[1])
    assert "value" not in models.load(tmp_path)[1]


def test_interrupted_save_leaves_the_former_model(folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(hf, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        models.save(folder, *tiny())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_params_that_do_not_fit_the_config_are_not_saved(tmp_path):
    model, params = tiny()
    with pytest.raises(ValueError, match=r"h_0/attn/lora_a is \(4, 1\), and the model's config expects nothing"):
        models.save(tmp_path, model, {**params, "h_0": {"attn": {**params["h_0"]["attn"], "lora_a": np.ones((4, 1))}}})
    _, wider = models.resize_vocabulary(model, params, 9)
    with pytest.raises(ValueError, match=r"wte/embedding is \(9, 4\), and the model's config expects \(7, 4\)"):
        models.save(tmp_path, model, wider)
    with pytest.raises(ValueError, match=r"ln_f/bias is nothing"):
        models.save(tmp_path, model, {name: leaf for name, leaf in params.items() if name != "ln_f"})


def test_links_inside_a_model_folder_are_followed(folder):
    """The hub's cache consists of them; an index, which comes with the weights, cannot name a file elsewhere."""
    (folder / "model.safetensors").rename(folder.parent / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    assert_same(models.load(folder)[1], tiny()[1])

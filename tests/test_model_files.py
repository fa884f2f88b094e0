"""Model folders without torch: round trips, kept keys, and messages that name what is wrong."""

import copy
import functools
import json
import math
import re
import tracemalloc
from dataclasses import replace
from unittest import mock

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from builders import (
    GEMMA,
    LLAMA,
    LLAMA3,
    MISTRAL,
    MORE,
    QWEN2,
    QWEN3,
    YARN,
    some_params,
)
from flax.traverse_util import flatten_dict
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file

from rlhf_jax import models, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import families, hf, names

CONFIG = models.GPT2Config(
    vocab_size=7, max_length=5, hidden_size=4, num_layers=2, num_heads=2, eos_token_id=1
)
ZEROS = np.zeros(4, np.float32)
FILES = ["config.json", "model.safetensors"]


def tiny(config=CONFIG):
    return models.build(config), some_params(config)


def assert_same(left, right):
    jax.tree.map(assert_array_equal, left, right)
    assert jax.tree.map(lambda x: x.dtype, left) == jax.tree.map(lambda x: x.dtype, right)


def assert_same_files(one, other):
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture
def folder(tmp_path):
    models.save(tmp_path / "model", *tiny())
    return tmp_path / "model"


@pytest.fixture
def llama(tmp_path):
    models.save(tmp_path / "llama", *tiny(LLAMA))
    return tmp_path / "llama"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def changed(keys, changes):
    return {name: x for name, x in (keys | changes).items() if x != "REMOVED"}


def edit_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(changed(config_of(folder), changes)))


def without(params, *gone):
    return {name: leaf for name, leaf in params.items() if name not in gone}


def write_index(folder, weight_map):
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refuses(folder, message):
    with pytest.raises(UserError, match=message):
        models.load(folder)


def test_round_trip_is_bit_equal_and_named_as_gpt2_lm_head_model(folder, tmp_path):
    model, params = models.load(folder)
    assert model.config == CONFIG
    assert_same(params, tiny()[1])
    models.save(tmp_path / "again", model, params)
    assert_same_files(tmp_path / "again", folder)
    assert sorted(file.name for file in folder.iterdir()) == FILES
    tensors = load_file(folder / "model.safetensors")
    keys = config_of(folder)
    assert len(tensors) == 4 + 2 * 12
    assert tensors["transformer.h.1.attn.c_attn.weight"].shape == (4, 12)
    expected = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    expected |= {"n_positions": 5, "n_embd": 4, "n_layer": 2}
    expected |= {"eos_token_id": 1, "bos_token_id": None}
    assert keys.items() >= expected.items()


def test_scanned_layers_share_the_files(folder, tmp_path):
    whole = tiny(replace(CONFIG, num_layers=3))
    models.save(folder, *whole)
    model, params = models.load(folder, scan_layers=True)
    assert_same(params["h"], jax.tree.map(lambda *x: np.stack(x), whole[1]["h_0"], whole[1]["h_1"]))
    assert_same(without(params, "h"), without(whole[1], "h_0", "h_1"))
    models.save(tmp_path / "scanned", model, params)
    assert_same_files(tmp_path / "scanned", folder)


EVERYTHING = {"attention_bias": True, "mlp_bias": True, "head_dim": 6, "rope_scaling": LLAMA3}
RELATIVES = {
    "llama, tied and scanned": replace(LLAMA, num_layers=3, tie_embeddings=True, scan_layers=True),
    "llama, everything": replace(LLAMA, **EVERYTHING, eos_token_id=(3, 4)),
    "llama, linear": replace(LLAMA, rope_scaling=models.RopeScaling("linear", 2.0), rope_theta=5e5),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "mistral, whole": replace(MISTRAL, sliding_window=None),
    "gemma3_text": replace(
        GEMMA, rope_scaling=models.RopeScaling("linear", 8.0), local_rope_theta=99.0
    ),
    **MORE,
    "llama, yarn": replace(LLAMA, rope_scaling=replace(YARN, mscale=1.0, truncate=False)),
    "llama, dynamic": replace(LLAMA, rope_scaling=models.RopeScaling("dynamic", 2.0)),
    "gpt_oss, unscaled and stacked": replace(
        MORE["gpt_oss"], num_layers=3, scan_layers=True, rope_scaling=None
    ),
    "ministral3, unscaled": replace(MORE["ministral3"], rope_scaling=None),
    "mixtral, stacked": replace(MORE["mixtral"], num_layers=3, scan_layers=True),
    "olmo3, unscaled": replace(MORE["olmo3"], rope_scaling=None),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), RELATIVES.items(), ids=RELATIVES)
def test_llama_and_its_relatives_come_back_bit_equal(name, config, tmp_path):
    model, params = tiny(config)
    models.save(tmp_path, model, params)
    again, loaded = models.load(tmp_path, scan_layers=model.config.scan_layers)
    assert again.config == config
    assert config_of(tmp_path)["model_type"] == name.split(",")[0]
    assert_same(loaded, params)


def test_shards_and_missing_prefix(folder):
    tensors = {
        name.removeprefix("transformer."): x
        for name, x in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file(
            {name: x for name, x in tensors.items() if weight_map[name] == shard}, folder / shard
        )
    write_index(folder, weight_map)
    assert_same(models.load(folder)[1], tiny()[1])
    (folder / "1.safetensors").unlink()
    refuses(folder, r"index\.json: '1\.safetensors' is not the name of a file in this folder")


class Counted:
    """A tensor in a file; notes how many numbers each reading takes, of how many."""

    def __init__(self, name, tensor, readings):
        self.name = name
        self.tensor = tensor
        self.readings = readings

    def __getitem__(self, index):
        part = self.tensor[index]
        self.readings.append((self.name, math.prod(self.tensor.get_shape()) / part.size))
        return part


def test_devices_may_hold_different_layers(tmp_path):
    models.save(tmp_path, *tiny(replace(CONFIG, num_layers=3)))
    by_layer = jax.NamedSharding(jax.make_mesh((2,), ("layer",)), jax.P("layer"))
    whole = jax.NamedSharding(by_layer.mesh, jax.P())

    def shardings(shapes):
        places = jax.tree.map(lambda _: whole, shapes)
        return places | {"h": jax.tree.map(lambda _: by_layer, shapes["h"])}

    _, params = models.load(tmp_path, scan_layers=True, shardings=shardings)
    assert_same(params, models.load(tmp_path, scan_layers=True)[1])


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt2", "llama"])
def test_each_device_reads_its_own_part(config, scan_layers, tmp_path, monkeypatch):
    """A quarter of each kernel, though Llama's files hold them transposed, and of the width of a
    table of 7 rows.
    """
    models.save(tmp_path, *tiny(config))
    mesh = sharding.make_mesh(1, fsdp=2, tensor=2)
    readings = []
    slices = hf.Reader.slices
    monkeypatch.setattr(
        hf.Reader, "slices", lambda own, *args: Counted(args[0], slices(own, *args), readings)
    )
    place = functools.partial(sharding.by_path, rules=models.SHARDING, mesh=mesh)
    _, params = models.load(tmp_path, scan_layers=scan_layers, shardings=place)
    parts = {"kernel": 4, "embedding": 4}
    for name, fraction in readings:
        kernel = re.search(r"(attn|mlp)\..*weight", name)
        table = re.search("wte|embed_tokens|lm_head", name)
        quarter = 2 if "c_attn" in name else 4  # of it the rows are read whole
        assert fraction == (quarter if kernel else 4 if table else 1), name
    for path, leaf in flatten_dict(params).items():
        held = {leaf.size // shard.data.size for shard in leaf.addressable_shards}
        assert held == {1 if "wpe" in path else parts.get(path[-1], 1)}, path
    assert_same(params, models.load(tmp_path, scan_layers=scan_layers)[1])


@pytest.mark.slow
def test_large_leaves_are_read_in_pieces(tmp_path, monkeypatch):
    """Layers and experts that are stacked in one array are never on the host together: no piece is
    larger than the limit, or than a matrix of the file.
    """
    model, params = tiny(replace(MORE["mixtral"], num_layers=4, vocab_size=64))
    models.save(tmp_path, model, params)
    mesh = sharding.make_mesh(1, fsdp=2, tensor=2)
    place = functools.partial(sharding.by_path, rules=models.SHARDING, mesh=mesh)
    whole = models.load(tmp_path, scan_layers=True)[1]
    experts = []
    others = []
    read = hf._part

    def counted(tensors, path, *args):
        part = read(tensors, path, *args)
        (experts if "experts" in path else others).append(part.size)
        return part

    monkeypatch.setattr(hf, "PIECE_NUMBERS", 64)
    monkeypatch.setattr(hf, "_part", counted)
    _, params = models.load(tmp_path, scan_layers=True, shardings=place)
    assert_same(params, whole)
    assert max(others) <= 192  # a matrix that is stored transposed is read whole
    assert max(experts) <= 64 < max(leaf.size for leaf in jax.tree.leaves(params)) / 10


def test_large_weights_are_written_in_several_files(llama, tmp_path, monkeypatch):
    """Each of at most so many bytes, or of one tensor; the host holds one file's; what was there
    before goes.
    """
    model, params = models.load(llama)
    at_once = []
    save_one = hf.save_file

    def saved(tensors, path, metadata):
        at_once.append((sum(x.nbytes for x in tensors.values()), len(tensors)))
        save_one(tensors, path, metadata)

    monkeypatch.setattr(hf, "save_file", saved)
    models.save(llama, model, params, file_bytes=1000)
    assert len(at_once) == 6
    assert all(size <= 1000 or count == 1 for size, count in at_once)
    index = json.loads((llama / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(size for size, _ in at_once)}
    assert sorted({*index["weight_map"].values()}) == sorted(
        file.name for file in llama.glob("*.safetensors")
    )
    assert f"model-00001-of-{len(at_once):05}.safetensors" in index["weight_map"].values()
    assert_same(models.load(llama)[1], params)
    models.save(llama, model, params)
    assert sorted(file.name for file in llama.iterdir()) == FILES


@pytest.mark.parametrize(
    "shard", ["../one.safetensors", "/one.safetensors", "sub/one.safetensors", "..", "a\\b"]
)
def test_index_names_stay_in_the_folder(folder, shard):
    (folder / "model.safetensors").rename(folder.parent / "one.safetensors")
    write_index(folder, {"wte.weight": shard})
    refuses(folder, "is not the name of a file in this folder")


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
    assert computed == replace(CONFIG, compute_dtype="bfloat16", remat=True)


def test_other_keys_are_kept_and_missing_ones_have_transformers_defaults(folder, tmp_path):
    edit_config(
        folder,
        pad_token_id=3,
        eos_token_id=[1, 2],
        summary_type="mean",
        own={"a": [1]},
        torch_dtype="float16",
    )
    edit_config(folder, n_embd="REMOVED", hidden_size=4, resid_pdrop="REMOVED", n_inner=None)
    model, params = models.load(folder)
    config = model.config
    changes = {"pad_token_id": 3, "eos_token_id": (1, 2), "residual_dropout": 0.1}
    assert config == replace(CONFIG, **changes)
    hash(config)
    models.save(tmp_path / "again", model, params)
    expected = {
        "pad_token_id": 3,
        "eos_token_id": [1, 2],
        "summary_type": "mean",
        "own": {"a": [1]},
    }
    assert config_of(tmp_path / "again").items() >= {**expected, "dtype": "float32"}.items()
    assert "torch_dtype" not in config_of(tmp_path / "again")


UNSUPPORTED = {
    "add_cross_attention": True,
    "pruned_heads": {"0": [1]},
    "quantization_config": {"bits": 4},
    "per_layer_config": {"0": {}},
    "tie_word_embeddings": False,
    "is_causal": False,
    "use_sliding_window": True,
}
HARMLESS = {
    "add_cross_attention": False,
    "pruned_heads": {},
    "tie_word_embeddings": True,
    "per_layer_config": None,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({key: value}, f"{key} is .*, which changes the logits")
            for key, value in UNSUPPORTED.items()
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types is .*, which changes",
        ),
        ({"hidden_size": 8}, r"hidden_size is 8 but n_embd is 4"),
        (
            {"model_type": "gemma4_text"},
            "not supported: global_head_dim .* num_kv_shared_layers .* hidden_size_per_layer_input",
        ),
        ({"model_type": "bert"}, r"model_type is 'bert'.* gpt2, llama, qwen2"),
        ({"activation_function": "tanh"}, r"'tanh'; choose from gelu_new, gelu, relu"),
        ({"n_layer": "2"}, r"n_layer is '2'"),
        ({"n_layer": None}, r"n_layer is None"),
        ({"scale_attn_weights": 1}, r"scale_attn_weights is 1"),
        ({"layer_norm_epsilon": "1e-5"}, r"layer_norm_epsilon is '1e-5'"),
        ({"pad_token_id": [0]}, r"pad_token_id is \[0\]"),
        ({"n_head": 3}, r"hidden_size 4 .* num_heads 3"),
        ({"reward_shift": "1"}, r"reward_shift is '1'"),
        ({"n_layer": 10**9}, "num_layers must be below"),
        ({"vocab_size": 10**30}, r"vocab_size is 1000000000"),
        ({"layer_norm_epsilon": 10**400}, r"layer_norm_epsilon is 1000000000"),
        ({"layer_norm_epsilon": float("nan")}, r"layer_norm_epsilon is nan"),
        ({"n_positions": 10**12}, r"max_length must be below 2147483648, got 1000000000000"),
    ],
)
def test_config_keys_that_do_not_fit_are_refused_by_name(tmp_path, changes, message):
    """Before weights are looked for."""
    (tmp_path / "config.json").write_text(json.dumps(names.to_json(CONFIG) | changes))
    refuses(tmp_path, r"config\.json: .*" + message)


def test_keys_that_change_nothing_are_read(folder):
    edit_config(folder, architectures=3, **HARMLESS)
    assert_same(models.load(folder)[1], tiny()[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 29}, r"num_layers is 29, but .*model\.safetensors has tensors for 28 at most"),
        ({"n_embd": 10**9}, r"hidden_size is 1000000000, but .* has tensors for \d+ at most"),
        ({"n_positions": 10**9}, r"wpe\.weight has shape \[5, 4\], expected \[1000000000, 4\]"),
    ],
)
def test_sizes_that_the_weights_have_not_are_refused(folder, changes, message):
    """Before anything of such a size is made."""
    edit_config(folder, **changes)
    refuses(folder, message)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("gpt_oss", {"num_hidden_layers": 10**9, "layer_types": ["full_attention"]}),
        ("olmo3", {"num_hidden_layers": 10**8, "layer_types": ["sliding_attention"]}),
        ("gemma2", {"num_hidden_layers": 2**31 - 1, "layer_types": ["full_attention"]}),
        ("smollm3", {"num_hidden_layers": 10**9, "no_rope_layers": [1]}),
        ("qwen3_moe", {"num_hidden_layers": 10**9, "mlp_only_layers": [3]}),
        ("qwen3_moe", {"num_experts": 10**9}),
        ("mixtral", {"num_local_experts": 10**8}),
        ("gpt2", {"n_layer": 10**7}),
    ],
)
def test_numbers_of_a_config_are_bounded_before_lists_of_their_length(family, keys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **keys}))
    tracemalloc.start()
    refuses(tmp_path, r"config\.json: num_(layers|experts) must be below")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**22


def test_experts_without_tensors_of_their_own_are_refused(tmp_path):
    model = models.build(MORE["mixtral"])
    models.save(tmp_path, model, some_params(MORE["mixtral"]))
    edit_config(tmp_path, num_local_experts=400)
    refuses(tmp_path, "num_experts is 400, but .* has tensors for [0-9]+ at most")


SCALED = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (1e4, None, 1e-6)),
        (
            {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **SCALED}},
            (500.0, LLAMA3, 1e-6),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **SCALED}},
            (500.0, LLAMA3, 1e-6),
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            (1e4, models.RopeScaling("linear", 2), 1e-6),
        ),
        ({"rms_norm_eps": 0}, (1e4, None, 0.0)),  # JSON does not tell 0 from 0.0
        (
            {"rope_parameters": {"rope_type": "proportional", "factor": 2}},
            r"rope_type is 'proportional'",
        ),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, r"low_freq_factor is None"),
        ({"rope_theta": "1"}, r"rope_theta is '1'"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            r"partial_rotary_factor changes the logits",
        ),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
        ({"pretraining_tp": 2}, r"pretraining_tp is 2"),
        ({"num_key_value_heads": 3}, r"num_heads 4 .* num_kv_heads 3"),
        ({"head_dim": 3}, r"even head_dim, got 3"),
    ],
)
def test_llama_s_keys_in_both_forms(changes, expected):
    keys = without(names.to_json(LLAMA), "rope_theta", "rope_scaling", "rms_norm_eps") | changes
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            names.from_json(keys, "config.json")
    else:
        config = names.from_json(keys, "config.json")
        assert (config.rope_theta, config.rope_scaling, config.rms_norm_epsilon) == expected
        assert isinstance(config.rms_norm_epsilon, float)


def test_two_tables_that_differ_are_not_tied(llama):
    edit_config(llama, tie_word_embeddings=True)
    refuses(llama, r"lm_head\.weight differs from model\.embed_tokens\.weight")


WHOLE = "full_attention"
LOCAL = "sliding_attention"
ROPES = {
    WHOLE: {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0},
    LOCAL: {"rope_theta": 7.0},
}


# rope_scaling beside rope_parameters of transformers 5, and outer keys beside them.
ORIGINAL = "original_max_position_embeddings"
YARNS = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 16}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0}
TWICE = [
    {"rope_scaling": {**YARNS, "rope_theta": 500.0}, "rope_parameters": PLAIN},
    {"rope_scaling": {**YARNS, "rope_theta": 99.0}, "rope_parameters": PLAIN},
    {"rope_scaling": YARNS, "rope_parameters": PLAIN},
    {"rope_scaling": YARNS, "rope_parameters": PLAIN, "rope_theta": 500.0},
    {"rope_scaling": YARNS, "rope_parameters": PLAIN, "rope_theta": 99.0},
    {"rope_scaling": YARNS, "rope_parameters": {"rope_type": "default"}},
    {"rope_scaling": {**YARNS, "type": "yarn"}, "rope_parameters": YARNS},
    {"rope_scaling": {"type": "yarn", "factor": 2}, "rope_parameters": {}, "rope_theta": 99.0},
    {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": YARNS},
    {"rope_scaling": {"factor": 2.0}, "rope_parameters": LINEAR},
    {"rope_scaling": {"rope_type": "default"}, "rope_parameters": LINEAR, "rope_theta": 500.0},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "unknown": 1}},
    {"rope_scaling": {"type": "linear", "factor": 8.0}},
    {"rope_scaling": None, "rope_parameters": LINEAR, "rope_theta": 99.0},
    {"rope_scaling": {}, "rope_parameters": {**LINEAR, "rope_theta": 99}},
    {"rope_scaling": {"rope_type": "llama3", **SCALED}, "rope_parameters": LINEAR},
    {"rope_scaling": {"rope_theta": 99.0}, "rope_parameters": LINEAR},
    {"rope_scaling": {"partial_rotary_factor": 1.0}, "rope_parameters": None},
    {"rope_parameters": {}, "rope_theta": 99.0},
    {"rope_theta": 99.0},
]


def their_rope(rope):
    """What transformers computes with, of the object of a rope."""
    read = {"default": [], "yarn": ["factor", ORIGINAL], "llama3": ["factor", ORIGINAL]}
    kind = rope["rope_type"]
    return [kind, rope["rope_theta"], *(rope[key] for key in read.get(kind, ["factor"]))]


def our_rope(config):
    scaling = config.rope_scaling
    if scaling is None:
        return ["default", config.rope_theta]
    original = [scaling.original_max_length] if scaling.kind in ("yarn", "llama3") else []
    return [scaling.kind, config.rope_theta, scaling.factor, *original]


@pytest.mark.parametrize("twice", TWICE, ids=json.dumps)
@pytest.mark.parametrize("model_type", [name for name in families.FAMILIES if name != "gpt2"])
def test_rope_keys_that_are_given_twice_mean_what_they_mean_to_transformers(model_type, twice):
    """Or they are refused where a base is lost, or where versions of transformers differ."""
    family = families.FAMILIES[model_type]
    keys = {"max_position_embeddings": 128, "hidden_size": 64, "num_attention_heads": 2}
    keys |= {"num_key_value_heads": 2, "head_dim": 32}
    keys |= copy.deepcopy(twice)
    scaling, parameters = keys.get("rope_scaling") or {}, keys.get("rope_parameters") or {}
    given = scaling or parameters
    is_given = bool(scaling) or keys.get("rope_parameters") is not None
    has_base = "rope_theta" in given or "rope_theta" in keys
    has_two = getattr(family.defaults, "local_rope_theta", None) is not None
    if has_two and parameters:
        keys["rope_parameters"] = {WHOLE: parameters, LOCAL: {"rope_theta": 7.0}}
    if "rope_theta" in keys:
        keys[family.keys.get("rope_theta", "rope_theta")] = keys.pop("rope_theta")
    try:
        config = transformers.CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(keys))
    except (KeyError, ValueError, huggingface_hub.errors.StrictDataclassError):
        # phi3 knows longrope alone; two ropes in an empty object have no names.
        assert model_type == "phi3" or (has_two and keys["rope_parameters"] == {})
        return
    theirs = config.rope_parameters
    rope = theirs[WHOLE] if has_two else theirs
    is_lost = scaling and parameters.get("rope_theta", rope["rope_theta"]) != rope["rope_theta"]
    if is_lost and "rope_theta" not in scaling:
        message = "rope_theta 500.* is lost: give rope_scaling a rope_theta"
    elif rope["rope_type"] != rope.get("type", rope["rope_type"]):
        message = "rope_type and type differ: "
    elif family.defaults.rope_scaling is not None and is_given != has_base:
        message = "rope_theta and rope_parameters need each other"  # ministral3's base would differ
    else:
        ours = names.from_json({"model_type": model_type, **keys}, "config.json")
        assert our_rope(ours) == their_rope(rope)
        assert not has_two or ours.local_rope_theta == theirs[LOCAL]["rope_theta"]
        return
    with pytest.raises(UserError, match=message):
        names.from_json({"model_type": model_type, **keys}, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
        ({"rope_scaling": [YARNS], "rope_parameters": PLAIN}, r"rope_scaling is \["),
        ({"rope_scaling": {WHOLE: YARNS}}, "rope_scaling is .* expected an object for all layers"),
        ({"rope_scaling": YARNS, "rope_parameters": {WHOLE: PLAIN}}, "rope_parameters is {'full"),
        ({"rope_scaling": YARNS | {"factor": "4"}, "rope_parameters": YARNS}, "factor is '4'"),
        ({"rope_scaling": YARNS | {"factor": True}, "rope_parameters": YARNS}, "factor is True"),
        ({"rope_scaling": YARNS | {"factor": None}, "rope_parameters": YARNS}, "factor is None"),
        ({"rope_scaling": YARNS | {"rope_theta": None}}, "rope_theta is None"),
        (
            {"rope_scaling": YARNS | {"type": "linear"}},
            "rope_type and type differ: yarn and linear",
        ),
        ({"rope_scaling": {"rope_type": None}, "rope_parameters": YARNS}, "rope_type is 'None'"),
    ],
)
def test_rope_keys_without_a_clear_meaning_are_refused(changes, message):
    keys = without(names.to_json(LLAMA), "rope_theta", "rope_scaling") | changes
    with pytest.raises(UserError, match=message):
        names.from_json(keys, "config.json")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (6, 1e6, None, 1e4)),
        ({"layer_types": [LOCAL, WHOLE]}, (2, 1e6, None, 1e4)),
        ({"layer_types": [LOCAL, LOCAL], "sliding_window_pattern": 6}, (3, 1e6, None, 1e4)),
        ({"rope_parameters": ROPES}, (6, 5.0, models.RopeScaling("linear", 2.0), 7.0)),
        ({"rope_theta": 5.0, "rope_local_base_freq": 7.0}, (6, 5.0, None, 7.0)),
        ({"layer_types": [WHOLE, LOCAL]}, r"layer_types is .*, which changes the logits"),
        (
            {"rope_parameters": {**ROPES, LOCAL: {"rope_type": "linear"}}},
            r"rope_parameters\.sliding_attention is",
        ),
        (
            {"rope_parameters": {LOCAL: {"type": "linear", "factor": 2.0}}},
            r"rope_parameters\.sliding_attention is",
        ),
        ({"rope_parameters": ROPES[WHOLE]}, "rope_parameters is .*, expected objects for full_att"),
        ({"rope_parameters": {**ROPES, WHOLE: [1]}}, r"rope_parameters\.full_attention is \[1\]"),
        (
            {"rope_parameters": {WHOLE: None, LOCAL: {}}, "rope_local_base_freq": 7.0},
            (6, 1e6, None, 7.0),
        ),
        (
            {"rope_parameters": ROPES, "rope_scaling": {"factor": 4.0}},
            (6, 5.0, models.RopeScaling("linear", 4.0), 7.0),
        ),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30"),
        ({"sliding_window_pattern": 0}, r"global_every .* got 0"),
    ],
)
def test_gemma_s_keys_in_both_forms(changes, expected):
    removed = ("sliding_window_pattern", "rope_theta", "rope_scaling", "rope_local_base_freq")
    keys = without(names.to_json(GEMMA), *removed) | changes
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            names.from_json(keys, "config.json")
    else:
        config = names.from_json(keys, "config.json")
        both = (config.rope_theta, config.rope_scaling)
        assert (config.global_every, *both, config.local_rope_theta) == expected


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"transformer.h.1.ln_2.bias": None, "transformer.ln_f.bias": None},
            r"missing tensors: transformer\.h\.1\.ln_2\.bias, transformer\.ln_f\.bias$",
        ),
        (
            {"transformer.ln_f.bias": ZEROS[:3]},
            r"transformer\.ln_f\.bias has shape \[3\], expected \[4\]",
        ),
        (
            {"transformer.ln_f.bias": np.zeros(4, np.int32)},
            r"transformer\.ln_f\.bias holds I32, expected floating",
        ),
        (
            {"lm_head.weight": np.ones((7, 4), np.float32)},
            r"lm_head\.weight differs from transformer\.wte\.weight",
        ),
        ({"ln_f.bias": ZEROS}, r"(transformer\.)?ln_f\.bias is given twice, also as"),
        (
            {f"h.{i}.b": ZEROS for i in range(2, 12)},
            r"unexpected tensors: h\.10\.b, .* and 2 more$",
        ),
        (
            {"score.weight": np.zeros((2, 4), np.float32)},
            r"score\.weight has shape \[2, 4\], expected \[1, 4\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, tensors, message):
    held = load_file(folder / "model.safetensors") | tensors
    save_file(
        {name: tensor for name, tensor in held.items() if tensor is not None},
        folder / "model.safetensors",
    )
    refuses(folder, r"model\.safetensors: " + message)


def test_files_that_are_missing_or_broken_are_named(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuses(folder, r"model\.safetensors: no such file, nor .*pytorch_model\.bin is a pickle")
    (folder / "config.json").unlink()
    refuses(
        folder,
        r"config\.json: no such file; a model folder holds config\.json and model\.safetensors",
    )
    for content, message in (
        (b"[]", r"config\.json: expected a JSON object, got list"),
        (b"\xff\xff", r"config\.json: cannot be read as JSON in UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"config\.json: cannot be read as JSON in UTF-8"),
    ):
        (folder / "config.json").write_bytes(content)
        refuses(folder, message)
    refuses(folder / "config.json", r"config\.json: not a folder")
    refuses(
        folder / "nowhere",
        r"nowhere: no such folder$",
    )


def test_hub_names_fetch_json_and_safetensors_alone(folder, monkeypatch):
    def snapshot_download(name, **options):
        assert options == {
            "allow_patterns": ["*.json", "*.safetensors"],
            "ignore_patterns": ["*/*"],
        }
        if name.endswith("/offline"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("Got: ConnectError: [Errno -2]")
        if name.startswith("somebody/not-"):
            gone = name.endswith("mine")
            kinds = huggingface_hub.errors
            kind = kinds.RepositoryNotFoundError if gone else kinds.GatedRepoError
            raise kind("401 Client Error.", response=mock.MagicMock())
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same(models.load("somebody/gpt2-tiny")[1], tiny()[1])
    monkeypatch.chdir(folder.parent)
    (folder.parent / "runs/mine").mkdir(parents=True)
    refuses("runs/nosuch/model", r"^runs/nosuch/model: no such folder$")
    refuses(
        "somebody/offline", r"^somebody/offline: no such folder here, .* it was not reached, and"
    )
    refuses("somebody/not-mine", r"did not give it: it has no public model of that name")
    refuses("somebody/not-accepted", r"did not give it: it gives this model to those who accepted")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/offline", r" \(runs has mine, yours\)"),
        ("runs/mien", r"; did you mean runs/mine\?"),
        ("models/mine", r" \(models has other\)"),
        ("./mine", ""),
        ("../mine", None),
        ("~/mine", ""),
        ("mine/", ""),
        ("/no/such", ""),
        ("a/b/c", ""),
        (".mine", ""),
    ],
)
def test_the_hub_is_not_asked_for_a_path(name, said, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    for folder in ("runs/mine", "runs/yours", "models/other"):
        (tmp_path / "here" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    refuses(name, f"^{re.escape(name)}: no such folder" + ("" if said is None else f"{said}$"))
    monkeypatch.chdir(tmp_path)  # where no folder is called so
    if name == "runs/mien":
        refuses(name, r"^runs/mien: no such folder$")


def test_a_run_without_a_model_says_so(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    refuses(tmp_path, "a run that has no model yet: go on with it by --resume")


def test_reward_model_round_trip(tmp_path):
    model, params = tiny()
    params = models.add_head(jax.random.key(1), params, "score")
    params["score"] |= {
        "gain": jnp.float32(2.0),
        "bias": jnp.float32(0.5),
        "shift": jnp.float32(-3.0),
    }
    models.save(tmp_path, model, params)
    expected = {
        "architectures": ["GPT2ForSequenceClassification"],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
    }
    assert config_of(tmp_path).items() >= {**expected, "reward_shift": 2.0 * 0.5 - 3.0}.items()
    loaded, loaded_params = models.load(tmp_path)
    # The scale is folded into the weights, once: a second save gives the same bytes.
    head = {"kernel": 2.0 * params["score"]["kernel"], "bias": 0.0, "gain": 1.0, "shift": -2.0}
    assert_same(loaded_params, {**params, "score": jax.tree.map(jnp.float32, head)})
    models.save(tmp_path / "again", loaded, loaded_params)
    assert_same_files(tmp_path / "again", tmp_path)
    # A policy started from it forgets the shift.
    models.save(tmp_path / "policy", loaded, without(loaded_params, "score"))
    assert "reward_shift" not in config_of(tmp_path / "policy")
    assert_same(models.load(tmp_path / "policy")[1], tiny()[1])
    edit_tensors(tmp_path, lambda tensors: tensors.pop("score.weight"))
    refuses(tmp_path, r"missing tensors: score\.weight")


def test_a_reward_model_has_no_output_table(tmp_path):
    model, params = tiny(LLAMA)
    params = models.add_head(jax.random.key(1), params, "score")
    models.save(tmp_path, model, params)
    assert_same(models.load(tmp_path)[1], without(params, "lm_head"))


def test_value_head_lies_beside_the_weights(tmp_path):
    model, params = tiny()
    with_value = {**params, "value": {"kernel": jnp.arange(4.0), "bias": jnp.float32(2.0)}}
    for saved in (with_value, params):  # without one, the former one must not come back
        models.save(tmp_path, model, saved)
        assert_same(models.load(tmp_path)[1], saved)
        assert not [name for name in load_file(tmp_path / "model.safetensors") if "value" in name]


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
    adapted = {**params, "h_0": {"attn": {**params["h_0"]["attn"], "lora_a": np.ones((4, 1))}}}
    for wrong, message in (
        (adapted, r"h_0/attn/lora_a is \(4, 1\), and the model's config expects nothing"),
        (
            {**params, "wte": {"embedding": np.ones((9, 4))}},
            r"wte/embedding is \(9, 4\), and .* expects \(7, 4\)",
        ),
        (without(params, "ln_f"), r"ln_f/bias is nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            models.save(tmp_path, model, wrong)

"""Files of a model's folder that are no files: pipes, devices, links that lead nowhere, and files
that would fill the memory. Each is refused by name, at once.
"""

import itertools
import json
import os
import re
import shutil

import pytest
import transformers
from builders import initial_params, write_run

from rlhf_jax import errors, models
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.report.export import export
from rlhf_jax.runs import reading

OF_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
OF_MODEL = ("config.json", "generation_config.json", "value_head.safetensors", "model.safetensors")


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def nowhere(path):
    path.symlink_to(path.parent / "gone")


def circle(path):
    path.symlink_to(path)


def folder(path):
    path.mkdir()


def huge(path):
    with path.open("wb") as file:
        file.truncate(errors.MOST_BYTES + 1)


KINDS = (pipe, device, nowhere, circle, folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = models.build(models.LlamaConfig(4, 8, 4, 1, 2, 4, tie_embeddings=True))
    models.save(path, model, initial_params(model))
    tokenizers.characters("ab").save(path)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture
def copied(saved, tmp_path):
    """The folder, whose files are links as in the hub's cache."""
    path = tmp_path / "snapshots" / "0123"
    path.mkdir(parents=True)
    shutil.copytree(saved, tmp_path / "blobs")
    for file in saved.iterdir():
        (path / file.name).symlink_to(f"../../blobs/{file.name}")
    return path


def secret_file(folder, secret):
    (folder / "merges.txt").symlink_to(secret / "key.jinja")


def secret_folder(folder, secret):
    (folder / "additional_chat_templates").symlink_to(secret)


def secret_in_folder(folder, secret):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").symlink_to(secret / "key.jinja")


def secret_behind_a_link(folder, secret):
    (folder / "inner").mkdir()
    (folder / "inner" / "more").symlink_to("../../secret")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to("inner/more/key.jinja")


def secret_in_blobs(folder, secret):
    """The hub's layout, unpacked from somebody's archive."""
    (folder.parent.parent / "blobs" / "ab").symlink_to(secret / "key.jinja")
    (folder / "merges.txt").symlink_to("../../blobs/ab")


SECRETS = (secret_file, secret_folder, secret_in_folder, secret_behind_a_link, secret_in_blobs)


@pytest.mark.parametrize("plant", SECRETS)
def test_links_that_lead_out_of_a_folder_are_refused(plant, copied, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.jinja").write_text("PRIVATE")
    plant(copied, tmp_path / "secret")
    base_model = {"peft_type": "LORA", "lora_alpha": 1, "base_model_name_or_path": str(copied)}
    (copied / "adapter_config.json").write_text(json.dumps(base_model))
    acts = (
        lambda: models.load(copied),
        lambda: tokenizers.load_tokenizer(copied),
        lambda: export(copied, tmp_path / "new"),
        lambda: models.lora.load(copied, {}),
    )
    for act in acts:
        with pytest.raises(UserError, match=r"is a symbolic link to .*, out of its folder"):
            act()
    assert not (tmp_path / "new").exists()


def test_a_folder_within_a_snapshot_of_the_hub_is_followed_too(copied):
    inner = copied / "checkpoint-2"
    inner.mkdir()
    for file in list(copied.iterdir()):
        if file.is_symlink():
            (inner / file.name).symlink_to(f"../../../blobs/{file.name}")
    assert tokenizers.load_tokenizer(inner).vocab_size == 4
    (inner / "merges.txt").symlink_to("../../../secret")
    with pytest.raises(UserError, match="out of its folder"):
        tokenizers.load_tokenizer(inner)


def put(kind, path):
    path.unlink(missing_ok=True)
    kind(path)
    return re.escape(str(path))


@pytest.mark.parametrize("kind", [*KINDS, huge])
@pytest.mark.parametrize("name", OF_TOKENIZER)
def test_a_tokenizers_file_that_is_none_is_refused(name, kind, copied):
    assert tokenizers.load_tokenizer(copied).vocab_size == 4
    where = put(kind, copied / name)
    with pytest.raises(UserError, match=where):
        tokenizers.load_tokenizer(copied)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("config.json", kind) for kind in KINDS),
        *itertools.product(OF_MODEL[1:], (pipe, nowhere)),
    ],
)
def test_a_models_file_that_is_none_is_refused(name, kind, copied):
    where = put(kind, copied / name)
    with pytest.raises(UserError, match=where):
        LanguageModel.load(copied)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_the_two_files_of_gpt2_are_read_like_others(name, copied):
    (copied / "tokenizer.json").unlink()
    (copied / "vocab.json").write_text("{}")
    (copied / "merges.txt").write_text("")
    where = put(pipe, copied / name)
    with pytest.raises(UserError, match=where):
        tokenizers.load_tokenizer(copied)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_export_of_a_run_with_a_pipe_does_not_wait(name, copied, tmp_path):
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / "model")
    (run / "model").symlink_to(copied)
    put(pipe, copied / name)
    with pytest.raises(UserError):
        export(run, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["manifest.json", "config.yaml", "metrics.jsonl"])
def test_a_runs_file_that_is_none_is_refused(name, kind, tmp_path):
    where = put(kind, tmp_path / name)
    read = {".json": reading.read_json, ".yaml": reading.read_yaml}.get((tmp_path / name).suffix)
    with pytest.raises(UserError, match=where):
        read(tmp_path / name, dict) if read else reading.read_rows(tmp_path / name)


@pytest.mark.parametrize("ends", ["x", ["x"], 1.5, True, {"a": 1}])
def test_an_end_of_text_that_is_no_token_is_refused(ends, copied):
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id "):
        LanguageModel.load(copied)


class PanicException(BaseException):
    """As pyo3 raises it for a panic in Rust."""


def test_a_panic_of_the_tokenizers_package_is_an_error_that_names_the_file(copied, monkeypatch):
    def panics(*words, **how):
        raise PanicException("index out of bounds")

    backend = type("Backend", (), {"encode_batch": panics, "get_vocab": dict})()
    with pytest.raises(UserError, match="cannot encode a text: index out of bounds"):
        tokenizers.Tokenizer(backend, 0, 1).encode_batch([""])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", panics)
    with pytest.raises(UserError, match=f"{copied}: .*: index out of bounds"):
        tokenizers.load_tokenizer(copied)


def test_ctrl_c_while_a_tokenizer_loads_is_no_broken_file(copied, monkeypatch):
    def interrupted(*words, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenizers.load_tokenizer(copied)

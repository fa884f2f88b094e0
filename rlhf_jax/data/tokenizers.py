"""Text to ids and back: a byte-level BPE, a character tokenizer, and tokenizers of Hugging Face
folders.

Only the ``tokenizers`` package is needed, for names on the hub ``huggingface_hub`` too. Text is
text unless a run says otherwise (``text.special_tokens``): the spelling of a special token inside
it is encoded as ordinary characters, so that data cannot end a response or hide as padding.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from rlhf_jax.errors import UserError, is_there, read_file
from rlhf_jax.models.hf import find_folder, read_json, refuse_adapter

PAD = "<|pad|>"
EOS = "<|endoftext|>"
_NEW = {"eos_token": EOS, "pad_token": PAD}
MORE_TEMPLATES = "additional_chat_templates"
"""The folder of a tokenizer's further chat templates, such as tool_use.jinja."""
_NO_CHARACTER = "\ufffd"  # the text of bytes that are no character, or not yet one
_NO_LIMIT = int(1e30)  # what transformers writes when a tokenizer has no length limit


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with distinct pad and end-of-text ids; ``config`` is its tokenizer_config.json,
    kept when saved.

    ``other_eos_ids`` are ids that end a response too: those that the model's own config names, and
    those that end a turn in the chat template.
    """

    backend: tokenizers.Tokenizer
    pad_id: int
    eos_id: int
    config: Mapping[str, Any] = field(default_factory=dict)
    other_eos_ids: tuple[int, ...] = ()
    reads_spelled: bool = False
    """Whether the spelling of a special token in a text is that token; else it is a text."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json of the model's author."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a response: ``eos_id``, which is put at the end of those in data, and
        then the others.
        """
        return (self.eos_id, *self.other_eos_ids)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: nothing is added before or after.

        Raises:
          UserError: naming a character that the vocabulary lacks, for tokenizers without an unknown
            token.
        """
        return self.encode_batch([text])[0]

    def encode_batch(
        self, texts: Sequence[str], sources: Sequence[str] | None = None
    ) -> list[list[int]]:
        """`encode` of each text, in parallel threads; an error names the text's source."""
        try:
            backend = self.with_special_tokens if self.reads_spelled else self.backend
            encodings = backend.encode_batch(list(texts), add_special_tokens=False)
        except BaseException as error:  # the package raises a bare one for an unknown character
            _raise_unless_its_own(error)
            known = self.backend.get_vocab()
            for i, text in enumerate(texts):
                unknown = [character for character in text if character not in known]
                if unknown:
                    where = f"{sources[i]}: " if sources else ""
                    letter = f"{unknown[0]!r} (U+{ord(unknown[0]):04X})"
                    what = f"the tokenizer's alphabet lacks {letter}, found in {text[:40]!r}"
                    raise UserError(where + what) from error
            raise UserError(f"the tokenizer cannot encode a text: {error!s:.300}") from error
        return [encoding.ids for encoding in encodings]

    def continue_batch(
        self,
        befores: Sequence[str],
        texts: Sequence[str],
        sources: Sequence[str],
    ) -> list[list[int]]:
        """Ids of each text behind another one, so that the ids of both decode to their join.

        Where one encoding of the join begins with the ids of the text before, these are its other
        ids. Elsewhere a token would span the boundary; then the text is encoded as what sampling
        has to write behind the text before: alone, without the space that SentencePiece puts
        first.
        """
        alone = self.encode_batch(texts, sources)
        if not self.begins_with_space:
            return alone
        joins = [before + text for before, text in zip(befores, texts, strict=True)]
        starts = self.encode_batch(befores, sources)
        ids = []
        for start, join, text in zip(starts, self.encode_batch(joins), texts, strict=True):
            is_split = join[: len(start)] == start
            ids.append(join[len(start) :] if is_split else self._inside(text))
        return ids

    def _inside(self, text: str) -> list[int]:
        """Ids of a text that does not begin one: those behind a character that no token joins to
        it.
        """
        for mark in ("\n", "=", "0"):
            start = self.encode(mark)
            ids = self.encode(mark + text)
            if ids[: len(start)] == start:
                return ids[len(start) :]
        return self.encode(text)

    @cached_property
    def begins_with_space(self) -> bool:
        """Whether the beginning of a text is encoded as if a space stood before it."""
        parts = json.loads(self.backend.to_str())
        found: list[Any] = [parts["normalizer"], parts["pre_tokenizer"]]
        for part in found:  # grows by the parts of a sequence
            if part is None:
                continue
            found += part.get("normalizers", []) + part.get("pretokenizers", [])
            is_metaspace = part["type"] == "Metaspace" and part.get("prepend_scheme") != "never"
            if is_metaspace or part["type"] == "Prepend" or part.get("add_prefix_space"):
                return True
        return False

    @cached_property
    def beginning(self) -> list[int]:
        """The ids, such as BOS, that transformers puts before a plain text: those of the
        post-processor in tokenizer.json, beside which it ignores ``add_bos_token``.
        """
        texts = ("a", *self.backend.get_vocab()) if self.backend.post_processor else ()
        for text in texts:
            with contextlib.suppress(Exception):  # an alphabet can lack the character
                found = self.backend.encode(text)
                if 0 in found.special_tokens_mask:
                    return found.ids[: found.special_tokens_mask.index(0)]
        return []

    @cached_property
    def with_special_tokens(self) -> tokenizers.Tokenizer:
        """The same tokenizer, where the spelling of a special token means that token."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; pad and end-of-text are left out."""
        keep = [i for i in map(int, ids) if i not in (self.pad_id, *self.eos_ids)]
        return self.backend.decode(keep, skip_special_tokens=False)

    def decode_raw(self, ids: Iterable[int]) -> str:
        """Text of the ids with the special tokens among them, as a model reads it."""
        return self.backend.decode([*map(int, ids)], skip_special_tokens=False)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The pieces of `decode`, as soon as tokens make them: a character comes when all of its
        bytes are there.
        """
        so_far: list[int] = []
        shown = ""
        for token in ids:
            so_far.append(token)
            text = self.decode(so_far).rstrip(_NO_CHARACTER)
            if text.startswith(shown) and text != shown:
                yield text[len(shown) :]
                shown = text
        rest = self.decode(so_far)[len(shown) :]
        if rest:
            yield rest

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: rows that a model's embedding needs."""
        return max(self.backend.get_vocab().values()) + 1

    @cached_property
    def special_ids(self) -> list[int]:
        """Ids of the special tokens."""
        added = self.backend.get_added_tokens_decoder()
        return [i for i, token in added.items() if token.special]

    def spelled(self, ids: Iterable[int]) -> str:
        """The tokens themselves, as the vocabulary spells them, one after the other."""
        return "".join(self.backend.id_to_token(i) or "" for i in ids)

    @cached_property
    def special_tokens(self) -> list[str]:
        """The special tokens as they are spelled."""
        added = self.backend.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def spelled_in(self, text: str) -> list[str]:
        """The special tokens that a text spells."""
        if not any(start in text for start in self._special_starts):
            return []
        return [token for token in self.special_tokens if token in text]

    @cached_property
    def _special_starts(self) -> set[str]:
        """Their first two characters: most texts have none of them."""
        return {token[:2] for token in self.special_tokens}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer.json that `save` writes."""
        return hashlib.sha256(self.backend.to_str(pretty=True).encode()).hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that ``transformers.AutoTokenizer.from_pretrained`` and `load_tokenizer`
        read.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        special = {
            "eos_token": self.backend.id_to_token(self.eos_id),
            "pad_token": self.backend.id_to_token(self.pad_id),
        }
        config = {
            "model_max_length": _NO_LIMIT,
            "clean_up_tokenization_spaces": False,
            **self.config,
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "padding_side": "left",
        }
        (path / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        files = {"tokenizer_config.json": config, "special_tokens_map.json": special}
        for name, content in files.items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (path / name).write_text(f"{text}\n", encoding="utf-8")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016, Radford et al. 2019) trained on the texts: pad id 0,
    end-of-text id 1.

    The same texts in the same order give the same tokenizer. Fewer than ``vocab_size`` ids result
    when the texts hold too few distinct words. Raises `UserError` without texts or for a size below
    258, the bytes and two special ids.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(alphabet) + 2
    if vocab_size < least:
        raise UserError(
            f"a byte-level tokenizer needs a vocabulary of at least {least} ids, {vocab_size} "
            "asked for"
        )
    lines = list(texts)
    if not any(lines):
        raise UserError("no text to train a tokenizer on")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    return _tokenizer(backend, _NEW)


def characters(texts: str | Iterable[str]) -> Tokenizer:
    """One id per character that occurs in the texts (or alphabet), by code point: pad id 0,
    end-of-text id 1.

    Raises `UserError` without any character.
    """
    alphabet = sorted(set(itertools.chain.from_iterable(texts)))
    if not alphabet:
        raise UserError("no text to take the characters from")
    vocab = {token: i for i, token in enumerate([PAD, EOS, *alphabet])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab))
    # Oniguruma's syntax: "(?s)." is refused.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _tokenizer(backend, _NEW)


def load_tokenizer(path_or_name: str | os.PathLike[str]) -> Tokenizer:
    """A local folder with tokenizer.json, or with GPT-2's vocab.json and merges.txt, or a name on
    the hub.

    A tokenizer without a pad token, or whose pad is its end-of-text, pads with its unknown token,
    ``unk_token``: masks, not ids, distinguish pads. If it has no unknown token either, it gets
    ``<|pad|>`` as a new last id: ``vocab_size`` grows by one and the caller resizes the model.

    Raises:
      UserError: the tokenizer cannot be found or read, or names no end-of-text token.
    """
    if os.path.isfile(path_or_name):  # tokenizer.json itself
        folder = Path(path_or_name).parent
    else:
        patterns = ("*.json", "*.jinja", "merges.txt")
        folder = find_folder(path_or_name, patterns, [f"{MORE_TEMPLATES}/*.jinja"])
    of_model = _read_if_present(folder / "config.json")
    named: dict[str, Any] = {}
    for key in ("eos_token", "pad_token"):
        id_of_model = of_model.get(f"{key}_id")
        if type(id_of_model) is int and 0 <= id_of_model < 1 << 32:  # some models write -1 for none
            named[key] = id_of_model
    special = named_tokens(_read_if_present(folder / "special_tokens_map.json"))
    config = _read_if_present(folder / "tokenizer_config.json")
    named |= special | named_tokens(config)
    config = special | config  # a chat template may write each of them
    templates = _template_files(folder)
    if templates:
        config["chat_template"] = stored_templates(templates)
    single = folder / "tokenizer.json"
    vocab = folder / "vocab.json"
    merges = folder / "merges.txt"
    is_single = is_there(single)
    if not is_single and not (is_there(vocab) and is_there(merges)):
        refuse_adapter(folder)
        raise UserError(f"{folder}: holds neither tokenizer.json nor vocab.json with merges.txt")
    with _broken(single if is_single else vocab):
        if is_single:
            backend = tokenizers.Tokenizer.from_buffer(read_file(single))
        else:
            backend = _byte_level(_bpe(vocab, merges))
            named.setdefault("eos_token", EOS)
        return _tokenizer(backend, named, config, str(folder))


def _template_files(folder: Path) -> dict[str, str]:
    """The chat templates that newer folders keep in files of their own, by name. As in transformers
    they replace those of tokenizer_config.json.
    """
    found = {}
    if is_there(folder / "chat_template.jinja"):
        found["default"] = _text(folder / "chat_template.jinja")
    more = folder / MORE_TEMPLATES
    if is_there(more):
        for file in sorted(more.glob("*.jinja")):
            found[file.stem] = _text(file)
    return found


@contextlib.contextmanager
def _broken(file: Path) -> Iterator[None]:
    """Says as a UserError that the ``tokenizers`` package cannot use a file."""
    try:
        yield
    except BaseException as error:
        _raise_unless_its_own(error)
        raise UserError(f"{file}: not a tokenizer file: {error!s:.300}") from error


def _raise_unless_its_own(error: BaseException) -> None:
    """Raises an error that is none of the ``tokenizers`` package, which raises a bare Exception or,
    from its Rust code, a PanicException, which is no Exception.
    """
    is_theirs = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    if isinstance(error, UserError) or not is_theirs:
        raise error


def _bpe(vocab: Path, merges: Path) -> models.BPE:
    """The model in GPT-2's two files."""
    for file in (vocab, merges):
        read_file(file)  # the package would wait for a pipe, or read without an end
    return models.BPE.from_file(str(vocab), str(merges))


def _text(file: Path) -> str:
    try:
        return read_file(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8, which is expected: {error}") from error


def _read_if_present(file: Path) -> dict[str, Any]:
    return read_json(file) if is_there(file) else {}


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _tokenizer(
    backend: tokenizers.Tokenizer,
    named: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    where: str = "",
) -> Tokenizer:
    """``named`` has the special tokens as texts or ids. If its ``pad_token`` cannot pad, its
    ``unk_token`` does.
    """
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # a text must have the same ids each time
    vocab = backend.get_vocab()
    tokens = [named.get(key) for key in ("eos_token", "pad_token", "unk_token")]
    texts = [backend.id_to_token(i) if isinstance(i, int) else i for i in tokens]
    eos, *fillers = texts
    if eos not in vocab:
        raise UserError(
            f"{where}: the tokenizer has no end-of-text token (it names {eos!r}); set eos_token in "
            "its tokenizer_config.json"
        )
    usable = [token for token in fillers if token != eos and token in vocab]
    pad = usable[0] if usable else PAD
    # This changes nothing if they are special tokens already.
    special = [AddedToken(token, special=True, normalized=False) for token in (eos, pad)]
    backend.add_special_tokens(special)
    backend.no_truncation()  # a setting in tokenizer.json would silently shorten texts
    backend.no_padding()
    backend.encode_special_tokens = True
    ids = backend.get_vocab()
    if list(ids.values()).count(ids[pad]) > 1:
        raise UserError(
            f"{where}: the ids of the vocabulary have gaps; name a pad_token in its "
            "tokenizer_config.json"
        )
    return Tokenizer(backend, ids[pad], ids[eos], config or {})


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens, ``eos_token`` and the like, that a tokenizer_config.json or
    special_tokens_map.json names.
    """
    named = {}
    for key, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if key.endswith("_token") and isinstance(text, str):
            named[key] = text
    return named


def named_templates(config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a tokenizer_config.json by name; a single one is the ``default``."""
    found = config.get("chat_template")
    if isinstance(found, str):
        return {"default": found} if found else {}
    named = {}
    for entry in found if isinstance(found, list) else []:
        parts = entry if isinstance(entry, dict) else {}
        name = parts.get("name")
        source = parts.get("template")
        if isinstance(name, str) and isinstance(source, str):
            named[name] = source
    return named


def stored_templates(named: Mapping[str, str]) -> Any:
    """Chat templates as tokenizer_config.json has them, a default alone as a text."""
    if [*named] == ["default"]:
        return named["default"]
    return [{"name": name, "template": source} for name, source in named.items()]

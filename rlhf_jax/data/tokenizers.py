"""Text to ids and back: a byte-level BPE, a character tokenizer, and tokenizers of Hugging Face
folders.

Only the ``tokenizers`` package is needed, for names on the hub ``huggingface_hub`` too. Text is
text unless a run says otherwise (``text.special_tokens``): the spelling of a special token inside
it is encoded as ordinary characters, so that data cannot end a response or hide as padding.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from rlhf_jax.errors import UserError, file_errors, is_there, read_file
from rlhf_jax.models.hf import find_folder, read_json, refuse_adapter

PAD = "<|pad|>"
EOS = "<|endoftext|>"
_NEW = {"eos_token": EOS, "pad_token": PAD}
MORE_TEMPLATES = "additional_chat_templates"
"""The folder of a tokenizer's further chat templates, such as tool_use.jinja."""
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
FILES = (
    *_VOCABULARIES,
    *("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"),
    *("*.jinja", "config.json"),
)
"""The files of a folder that its tokenizer may be read from."""
# Keys of tokenizer_config.json by which a class of transformers would open other files.
_LEADS_TO_FILES = re.compile(r".*_file|vocab|merges|init_inputs")
_CHOOSES_CLASS = ("model_type", "model_name", "tokenizer_class", "transformers_version")
_PACKAGES = {"sentencepiece", "tiktoken", "protobuf"}  # for files other than tokenizer.json
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
    spelled_as: Literal["text", "tokens"] | None = None
    """What the spelling of a special token in a text is: that token, or text. None: text, and in
    messages an error."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json of the model's author."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a response: ``eos_id``, which is put at the end of those in data, and
        then the others.
        """
        return (self.eos_id, *self.other_eos_ids)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: nothing is added before or after. Raises as `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(
        self, texts: Sequence[str], sources: Sequence[str] | None = None
    ) -> list[list[int]]:
        """`encode` of each text, in parallel threads; an error names the text's source.

        Raises:
          UserError: naming a character that the vocabulary lacks, for tokenizers without an unknown
            token; or a special token that the vocabulary makes of its spelling.
        """
        wheres = [f"{source}: " for source in sources] if sources else [""] * len(texts)
        try:
            encodings = self._encoder.encode_batch(list(texts), add_special_tokens=False)
        except BaseException as error:  # the package raises a bare one for an unknown character
            _raise_unless_its_own(error)
            known = self.backend.get_vocab()
            for where, text in zip(wheres, texts, strict=True):
                unknown = [character for character in text if character not in known]
                if unknown:
                    letter = f"{unknown[0]!r} (U+{ord(unknown[0]):04X})"
                    what = f"the tokenizer's alphabet lacks {letter}, found in {text[:40]!r}"
                    raise UserError(where + what) from error
            raise UserError(f"the tokenizer cannot encode a text: {error!s:.300}") from error
        ids = [encoding.ids for encoding in encodings]
        if self.spelled_as != "tokens":
            for where, text, own in zip(wheres, texts, ids, strict=True):
                self.check_text(text, own, where)
        return ids

    def check_text(self, text: str, ids: Sequence[int], where: str = "") -> None:
        """Raises `UserError` if the text spells a special token that is among its ids: a Unigram
        vocabulary holds the control tokens too.
        """
        for token in self.spelled_in(text):
            if token != self.config.get("unk_token") and self.backend.token_to_id(token) in ids:
                what = f"the tokenizer makes the special token {token!r} of a text that spells it"
                raise UserError(f"{where}{what}; remove it")

    def continue_batch(
        self, befores: Sequence[str], texts: Sequence[str], sources: Sequence[str]
    ) -> list[list[int]]:
        """Ids of each text behind another one, so that the ids of both decode to their join.

        Where one encoding of the join begins with the ids of the text before, these are its other
        ids. Elsewhere a token would span the boundary; then the text is encoded as what sampling
        has to write behind the text before: alone, without the space that SentencePiece puts
        first.
        """
        if not self.begins_with_space:
            return self.encode_batch(texts, sources)
        starts = self.encode_batch(befores, sources)
        joins = [before + text for before, text in zip(befores, texts, strict=True)]
        ids = []
        for start, join, text in zip(starts, self.encode_batch(joins, sources), texts, strict=True):
            is_split = join[: len(start)] == start
            ids.append(join[len(start) :] if is_split else self.encode_inside(text)[0])
        return ids

    def encode_inside(
        self, text: str, backend: tokenizers.Tokenizer | None = None, begins: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a part of a text, and the characters [start, end) of each. A part that does not
        begin the text has no space before it, as SentencePiece puts there: a mark before it takes
        that space.
        """
        backend = backend or self._encoder
        for mark in ("",) if begins or not self.begins_with_space else ("\n", "=", "0", ""):
            lead = backend.encode(mark, add_special_tokens=False).ids
            found = backend.encode(mark + text, add_special_tokens=False)
            if found.ids[: len(lead)] == lead:  # no token joins both
                break
        offsets = [
            (first - len(mark), end - len(mark)) for first, end in found.offsets[len(lead) :]
        ]
        return found.ids[len(lead) :], offsets

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

    @property
    def _encoder(self) -> tokenizers.Tokenizer:
        return self.with_special_tokens if self.spelled_as == "tokens" else self.backend

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
    def _special(self) -> dict[str, int]:
        added = self.backend.get_added_tokens_decoder().items()
        return {token.content: number for number, token in added if token.special}

    @property
    def special_ids(self) -> list[int]:
        """Ids of the special tokens."""
        return list(self._special.values())

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens as they are spelled."""
        return list(self._special)

    @cached_property
    def special_pattern(self) -> str:
        """A regular expression of the special tokens, of those that begin alike the longest."""
        return "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))

    def spelled_in(self, text: str) -> list[str]:
        """The special tokens that a text spells."""
        if not re.search(self.special_pattern, text):
            return []
        return [token for token in self._special if token in text]

    def spelled(self, ids: Iterable[int]) -> str:
        """The tokens themselves, as the vocabulary spells them, one after the other."""
        return "".join(self.backend.id_to_token(i) or "" for i in ids)

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
        ids = {"eos_token": self.eos_id, "pad_token": self.pad_id}
        special = {key: self.backend.id_to_token(number) for key, number in ids.items()}
        config: dict[str, Any] = {
            "model_max_length": _NO_LIMIT,
            "clean_up_tokenization_spaces": False,
        }
        config |= {**self.config, **special}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
        (path / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        for kind, content in (("tokenizer_config", config), ("special_tokens_map", special)):
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (path / f"{kind}.json").write_text(f"{text}\n", encoding="utf-8")


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
        what = f"a byte-level tokenizer needs a vocabulary of at least {least} ids"
        raise UserError(f"{what}, {vocab_size} asked for")
    lines = list(texts)
    if not any(lines):
        raise UserError("no text to train a tokenizer on")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
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
    """The tokenizer that transformers' ``AutoTokenizer`` reads from a local folder or a name on the
    hub, with its chat templates. No code of the folder is run, and a folder needs no network.

    A tokenizer without a pad token, or whose pad is its end-of-text, pads with its unknown token,
    ``unk_token``: masks, not ids, distinguish pads. If it has no unknown token either, it gets
    ``<|pad|>`` as a new last id: ``vocab_size`` grows by one and the caller resizes the model.

    Raises:
      UserError: the tokenizer cannot be found or read, needs a package that is not installed, or
        names no end-of-text token.
    """
    if os.path.isfile(path_or_name):  # tokenizer.json itself
        folder = Path(path_or_name).parent
    else:
        folder = find_folder(path_or_name, FILES, [f"{MORE_TEMPLATES}/*.jinja"])
    of_model, config = (
        read_json(file) if is_there(file) else {}
        for file in (folder / "config.json", folder / "tokenizer_config.json")
    )
    if "fast_tokenizer_files" in config:
        raise UserError(f"{folder}: fast_tokenizer_files is not read; keep tokenizer.json alone")
    config = {key: value for key, value in config.items() if not _LEADS_TO_FILES.fullmatch(key)}
    theirs = _read_by_transformers(folder, of_model, config)
    backend = theirs.backend_tokenizer
    templates = theirs.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    if not (isinstance(templates, dict) and all(isinstance(x, str) for x in templates.values())):
        raise UserError(f"{folder}: a chat template is no text")
    for key in ("added_tokens_decoder", "auto_map", "chat_template"):
        config.pop(key, None)  # the saved tokenizer.json has all tokens
    config |= theirs.special_tokens_map  # a chat template may write each of them
    if templates:
        config["chat_template"] = stored_templates(dict(sorted(templates.items())))
    is_template = isinstance(backend.post_processor, processors.TemplateProcessing)
    if is_template and not backend.num_special_tokens_to_add(False):
        backend.post_processor = None  # transformers puts it where the file has none
    _make_special(backend, _markup(backend, "".join(templates.values())))
    named: dict[str, Any] = {}
    for key in ("eos_token", "pad_token"):
        id_of_model = of_model.get(f"{key}_id")
        if type(id_of_model) is int and 0 <= id_of_model < 1 << 32:  # some models write -1 for none
            named[key] = backend.id_to_token(id_of_model)
    return _tokenizer(backend, named | theirs.special_tokens_map, config, f"{folder}: ")


def files_of(folder: Path) -> list[Path]:
    """The files of a folder that its tokenizer is read from; none without a vocabulary."""
    files = [file for file in folder.iterdir() if any(map(file.match, FILES))]
    if not any(file.match(name) for name in _VOCABULARIES for file in files):
        return []
    if is_there(folder / MORE_TEMPLATES):
        files += (folder / MORE_TEMPLATES).glob("*.jinja")
    return files


def _read_by_transformers(
    folder: Path, of_model: Mapping[str, Any], config: Mapping[str, Any]
) -> Any:
    """transformers' tokenizer of copies of the files, since it opens pipes, devices and links."""
    files = files_of(folder)
    names = {file.name for file in files}
    if not files:
        refuse_adapter(folder)
        raise UserError(f"{folder}: holds neither tokenizer.json nor vocab.json with merges.txt")
    # Only what chooses the class: sizes of a model can ask for any amount of memory.
    chooses = {key: of_model[key] for key in _CHOOSES_CLASS if key in of_model}
    if names.isdisjoint(("tokenizer.json", "tokenizer_config.json")) and "vocab.json" in names:
        chooses.setdefault("model_type", "gpt2")
    # Without PyTorch it says that no models are available, and none is wanted here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        (copy / MORE_TEMPLATES).mkdir()
        for file in files:
            content = read_file(file)
            if file.suffix in (".json", ".jinja", ".txt"):
                with file_errors(file):
                    content.decode()
            (copy / file.relative_to(folder)).write_bytes(content)
        (copy / "config.json").write_text(json.dumps(chooses))
        (copy / "tokenizer_config.json").write_text(json.dumps(config))
        try:
            theirs = AutoTokenizer.from_pretrained(
                place, trust_remote_code=False, local_files_only=True
            )
        except BaseException as error:
            _raise_unless_its_own(error)
            why = " ".join(str(error).split())
            what = f"transformers cannot read this tokenizer: {why:.300}"
            missing = _PACKAGES - {one.name for one in importlib.metadata.distributions()}
            if "auto_map" in config:
                what += "; its auto_map names Python code of the folder's author, never run here"
            elif missing and any(name.endswith((".model", ".tiktoken")) for name in names):
                needed = f"{', '.join(sorted(missing))} (pip install 'rlhf-jax[tokenizers]')"
                what = f"this tokenizer may need {needed}; {what}"
            raise UserError(f"{folder}: {what}".replace(place, str(folder))) from error
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None or theirs.split_special_tokens:
        why = "it has split_special_tokens" if backend else f"{type(theirs).__name__} is Python"
        raise UserError(
            f"{folder}: no tokenizer of the tokenizers package that reads markup: {why}"
        )
    if len(backend.get_vocab()) <= len(backend.get_added_tokens_decoder()):
        kind = type(theirs).__name__
        what = f"transformers' {kind} finds no vocabulary in {', '.join(sorted(names))}"
        raise UserError(f"{folder}: {what}; name its tokenizer_class in tokenizer_config.json")
    return theirs


def _markup(backend: tokenizers.Tokenizer, templates: str) -> list[str]:
    """The added tokens that frame turns and that no text may spell, although the folder does not
    call them special: those in angular brackets and the like that a chat template writes. Tags with
    an end, such as ``<think>`` and ``</think>``, and those of tools are part of messages.
    """
    framing = []
    for token in backend.get_added_tokens_decoder().values():
        text = token.content
        is_part = "/" in text or "tool" in text.lower()
        is_part = is_part or backend.token_to_id(f"{text[:1]}/{text[1:]}") is not None
        if text in templates and not (text[:1].isalnum() or text.isspace() or is_part):
            framing.append(text)
    return framing


def _make_special(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Makes tokens special; how they are matched in texts stays as it is."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for text in texts:
        token = added.get(text) or AddedToken(text, normalized=False)
        if not token.special:
            token.special = True
            backend.add_special_tokens([token])


def _raise_unless_its_own(error: BaseException) -> None:
    """Raises an error that is none of ``tokenizers``, whose PanicException is no Exception."""
    is_theirs = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    if isinstance(error, UserError) or not is_theirs:
        raise error


def _tokenizer(
    backend: tokenizers.Tokenizer,
    named: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    where: str = "",
) -> Tokenizer:
    """``named``: spellings of special tokens; if ``pad_token`` cannot pad, ``unk_token`` does."""
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # a text must have the same ids each time
    vocab = backend.get_vocab()
    eos = named.get("eos_token")
    if eos not in vocab:
        what = f"the tokenizer has no end-of-text token (it names {eos!r})"
        raise UserError(f"{where}{what}; set eos_token in its tokenizer_config.json")
    fillers = (named.get("pad_token"), named.get("unk_token"))
    pad = next((token for token in fillers if token != eos and token in vocab), PAD)
    _make_special(backend, (eos, pad))
    backend.no_truncation()  # a setting in tokenizer.json would silently shorten texts
    backend.no_padding()
    backend.encode_special_tokens = True
    ids = backend.get_vocab()
    if list(ids.values()).count(ids[pad]) > 1:
        what = "the ids of the vocabulary have gaps"
        raise UserError(f"{where}{what}; name a pad_token in its tokenizer_config.json")
    return Tokenizer(backend, ids[pad], ids[eos], config or {})


def named_templates(config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a tokenizer_config.json by name; a single one is the ``default``."""
    found = config.get("chat_template") or []
    if isinstance(found, str):
        return {"default": found}
    return {entry["name"]: entry["template"] for entry in found}


def stored_templates(named: Mapping[str, str]) -> Any:
    """Chat templates as tokenizer_config.json has them, a default alone as a text."""
    if [*named] == ["default"]:
        return named["default"]
    return [{"name": name, "template": source} for name, source in named.items()]

"""From prompts to token ids, as a checkpoint's own tokenizer files say.

The library tokenizers does the work; it is imported where it is needed, and comes with the extra
`jvjepa[text]`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jvjepa.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE, VOCABULARY_FILE = "tokenizer.json", "vocab.txt"
_CONFIG_FILE, _SENTENCE_FILE = "tokenizer_config.json", "sentence_bert_config.json"
FILES = (TOKENIZER_FILE, VOCABULARY_FILE, _CONFIG_FILE, _SENTENCE_FILE)
_SPECIAL = {f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "SEP", "PAD", "CLS", "MASK")}


class Tokens(NamedTuple):
    """Texts as the encoder takes them.

    Args:
        ids: int32 [n, M].
        mask: bool [n, M], False where an id is only padding.
        lengths: int64 [n], the tokens that each text has; the encoder sees fewer of a long one.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    lengths: NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A BERT tokenizer, used as the library sentence-transformers does.

    Args:
        files: the files that it was made of, by name, word for word.
        max_length: tokens of a text at most, [CLS] and [SEP] included.
        lower: whether texts are lower-cased before they come to the tokenizer, which may do so too.
        inner: the library's tokenizer.
    """

    files: Mapping[str, bytes]
    max_length: int
    lower: bool
    inner: "tokenizers.Tokenizer" = dataclasses.field(repr=False)

    @classmethod
    def read(cls, folder: str | Path, *, max_positions: int, vocab_size: int) -> "Tokenizer":
        """Reads a tokenizer.

        `tokenizer.json` or else `vocab.txt` has the vocabulary. `tokenizer_config.json` says what
        becomes of capital letters, accents and Chinese characters, and `sentence_bert_config.json`,
        or else it, how long a text may be.

        Args:
            folder: with these files.
            max_positions: tokens of a text that the encoder takes at most.
            vocab_size: tokens that the encoder knows.

        Returns:
            The tokenizer.

        Raises:
            CheckpointError: files are missing or damaged, or the vocabulary is of another encoder.
            InputError: the library tokenizers is not installed.
        """
        folder = Path(folder)
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        if not files.keys() & {TOKENIZER_FILE, VOCABULARY_FILE}:
            raise CheckpointError(f"{folder} has no {TOKENIZER_FILE} and no {VOCABULARY_FILE}")
        config = _json(folder, files, _CONFIG_FILE)
        sentence = _json(folder, files, _SENTENCE_FILE)
        if TOKENIZER_FILE in files:
            path = folder / TOKENIZER_FILE
            inner = _from_json(path, files[TOKENIZER_FILE], config)
        else:
            path = folder / VOCABULARY_FILE
            inner = _from_vocabulary(path, files[VOCABULARY_FILE], config)
        inner.no_truncation()
        inner.no_padding()
        if inner.get_vocab_size() > vocab_size:
            raise CheckpointError(
                f"{path} has {inner.get_vocab_size()} tokens, and the text encoder {vocab_size}; "
                "it is of another model"
            )
        longest = sentence.get("max_seq_length") or config.get("model_max_length") or max_positions
        special = inner.num_special_tokens_to_add(False)
        number = isinstance(longest, int | float) and not isinstance(longest, bool)
        if not number or longest <= special:
            raise CheckpointError(
                f"{folder} says that a text has {longest!r} tokens at most; it must be a number "
                f"above {special}"
            )
        lower = sentence.get("do_lower_case", False)
        return cls(
            files=files,
            max_length=int(min(longest, max_positions)),
            lower=_bool(folder / _SENTENCE_FILE, "do_lower_case", lower),
            inner=inner,
        )

    def save(self, folder: Path) -> None:
        """Writes the files that it was made of into a folder."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def __call__(self, texts: Sequence[str], *, multiple: int = 1) -> Tokens:
        """Cuts texts into tokens; those that are too long are cut off at `max_length`.

        Args:
            texts: one or more.
            multiple: the length M that they are padded to is a multiple of this, or `max_length`.

        Returns:
            The tokens, padded at the end to the same length.

        Raises:
            InputError: there is no text, or one is empty.
        """
        if not texts:
            raise InputError("there is no text to read")
        special = self.inner.num_special_tokens_to_add(False)
        rows, lengths = [], []
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"text {i} is {text!r}; it must have at least one word")
            text = text.strip()
            text = text.lower() if self.lower else text
            encoding = self.inner.encode(text, add_special_tokens=False)
            lengths.append(len(encoding.ids) + special)
            encoding.truncate(self.max_length - special)
            rows.append(self.inner.post_process(encoding).ids)
        longest = max(map(len, rows))
        longest = min(-(-longest // multiple) * multiple, self.max_length)
        mask = np.arange(longest) < np.array([len(row) for row in rows])[:, None]
        ids = np.zeros(mask.shape, np.int32)  # what padding is called does not matter: it is masked
        ids[mask] = np.concatenate(rows)
        return Tokens(ids, mask, np.array(lengths))


def _library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        if error.name != "tokenizers":
            raise
        raise InputError("prompts need tokenizers: pip install 'jvjepa[text]' brings it") from None
    return tokenizers


def _json(folder: Path, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        values = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise CheckpointError(f"{folder / name} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder / name} is not a JSON object")
    return values


def _bool(path: Path, key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key} = {value!r}; it must be true or false")
    return value


def _from_json(path: Path, content: bytes, config: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    try:
        inner = _library().Tokenizer.from_str(content.decode())
    except Exception as error:  # the library has no exceptions of its own
        raise CheckpointError(f"{path} is no tokenizer: {error}") from None
    if "do_lower_case" in config:  # it counts more, as in transformers
        inner.normalizer = _normalizer(path.with_name(_CONFIG_FILE), config)
    return inner


def _from_vocabulary(
    path: Path, content: bytes, config: Mapping[str, Any]
) -> "tokenizers.Tokenizer":
    library = _library()
    try:
        words = content.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is no text: {error}") from None
    vocabulary = {word: i for i, word in enumerate(words)}
    special = {key: _content(config.get(key, usual)) for key, usual in _SPECIAL.items()}
    missing = sorted(set(special.values()) - vocabulary.keys())
    if missing:
        raise CheckpointError(f"{path} has no tokens {', '.join(missing)}")
    model = library.models.WordPiece(
        vocabulary, unk_token=special["unk_token"], max_input_chars_per_word=100
    )
    inner = library.Tokenizer(model)
    inner.normalizer = _normalizer(path.with_name(_CONFIG_FILE), config)
    inner.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    first, last = special["cls_token"], special["sep_token"]
    inner.post_processor = library.processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])],
    )
    inner.add_special_tokens(list(special.values()))
    return inner


def _content(token: object) -> str:
    """A special token, which transformers writes as a string or as an object around it."""
    return str(token["content"] if isinstance(token, dict) and "content" in token else token)


def _normalizer(path: Path, config: Mapping[str, Any]) -> Any:
    lower = _bool(path, "do_lower_case", config.get("do_lower_case", True))
    chinese = config.get("tokenize_chinese_chars", True)
    accents = config.get("strip_accents")
    return _library().normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=_bool(path, "tokenize_chinese_chars", chinese),
        strip_accents=accents if accents is None else _bool(path, "strip_accents", accents),
        lowercase=lower,
    )

"""The text encoder gives what transformers and sentence-transformers give, from their files."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from berts import random_bert, save_sentence_encoder, sentence_embeddings, tiny_bert_config
from models import relative_error
from quality import (
    MAX_LENGTH,
    PROMPTS,
    VOCABULARY,
    tiny_text_config,
    write_sentence_modules,
    write_tokenizer,
)
from transformers import AutoTokenizer

import jvjepa
from jvjepa.convert import convert_text
from jvjepa.convert.bert import bert_entries, from_hf_config
from jvjepa.convert.tables import expected_shapes
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.parameters import count_shapes, unstack_layers
from jvjepa.quality import text_features
from jvjepa.text import TextEncoder
from jvjepa.text_config import Pooling, TextConfig
from jvjepa.text_weights import TextModel, load_text, save_text, text_shapes
from jvjepa.tokenizer import Tokenizer
from jvjepa.typing import Params

LENGTHS = (1, 5, 12, 16)  # of a batch; the last one has no padding


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "hf"
    save_sentence_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def model(source: Path) -> TextModel:
    convert_text(str(source), source.parent / "model")
    return load_text(source.parent / "model")


@pytest.fixture
def copied(source: Path, tmp_path: Path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


def random_ids(*lengths: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B, M] and bool [B, M]; padding has ids too, which must not matter."""
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return rng.integers(0, len(VOCABULARY), mask.shape, np.int32), mask


def torch_ids(ids: np.ndarray, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(ids).long(), torch.from_numpy(mask).long()


def read(folder: Path) -> Tokenizer:
    return Tokenizer.read(folder, max_positions=16, vocab_size=len(VOCABULARY))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- The encoder --------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, (7,), (3, 3)])
def test_tokens_are_those_of_transformers(
    source: Path, model: TextModel, lengths: tuple[int, ...], scan: bool
) -> None:
    ids, mask = random_ids(*lengths)
    theirs, attended = torch_ids(ids, mask)
    with torch.no_grad():
        out = random_bert(tiny_bert_config())(input_ids=theirs, attention_mask=attended)
    params = model.params if scan else unstack_layers(model.params)
    encoder = dataclasses.replace(model.encoder, scan=scan)
    found = jax.jit(encoder.apply)({"params": params}, ids, mask)
    assert relative_error(found, out.last_hidden_state.numpy()) < 1e-5  # of padding too


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 20, "num_attention_heads": 2}])
def test_embeddings_are_those_of_sentence_transformers(
    tmp_path: Path, pooling: Pooling, sizes: dict[str, int]
) -> None:
    bert = save_sentence_encoder(tmp_path / "hf", pooling=pooling, seed=1, **sizes)
    convert_text(str(tmp_path / "hf"), tmp_path / "model")
    model = load_text(tmp_path / "model")
    assert model.config.pooling == pooling
    ids, mask = random_ids(*LENGTHS, seed=1)
    expected = sentence_embeddings(bert, *torch_ids(ids, mask), pooling).numpy()
    found = model.encoder.apply({"params": model.params}, ids, mask, method="embed")
    assert found.dtype == jnp.float32
    assert relative_error(found, expected) < 1e-5


def test_prompts_come_through_the_tokenizer_of_the_folder(source: Path, model: TextModel) -> None:
    prompts = [*PROMPTS, "  A CAT  ", "é", "a cat " * 20]
    tokenizer = AutoTokenizer.from_pretrained(source)
    words = [prompt.strip().lower() for prompt in prompts]
    how = {"padding": True, "truncation": True, "max_length": MAX_LENGTH, "return_tensors": "pt"}
    theirs = tokenizer(words, **how)
    bert = random_bert(tiny_bert_config())
    expected = sentence_embeddings(bert, theirs["input_ids"], theirs["attention_mask"], "cls")
    found = text_features(model, prompts)
    assert relative_error(found, expected.numpy()) < 1e-5
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_an_embedding_depends_neither_on_padding_nor_on_neighbours(model: TextModel) -> None:
    prompts = [f"{a} {b}" for a in ("cat", "dog", "unknowns, in") for b in ("a b c d", "e")] * 12
    together = text_features(model, prompts)  # 72: more than are taken at a time
    assert together.shape == (len(prompts), model.config.hidden_size)
    alone = jnp.concatenate([text_features(model, [prompt]) for prompt in prompts[:6]])
    assert relative_error(together[:6], alone) < 1e-5
    assert relative_error(together[6:12], alone) < 1e-5


def test_few_programs_are_compiled(model: TextModel, compilations: Callable[[], int]) -> None:
    text_features(model, ["a"])
    before = compilations()
    for prompt in ("a cat", "the dog sleeps on the car", "x " * 30):
        text_features(model, [prompt])
    assert compilations() == before


def test_bfloat16_is_close(model: TextModel) -> None:
    ids, mask = random_ids(*LENGTHS)
    exact = model.encoder.apply({"params": model.params}, ids, mask, method="embed")
    encoder = dataclasses.replace(model.encoder, dtype=jnp.bfloat16)
    rounded = encoder.apply({"params": model.params}, ids, mask, method="embed")
    assert rounded.dtype == jnp.float32
    assert 0 < relative_error(rounded, exact) < 0.05


def test_gradients_are_finite_and_of_every_parameter(model: TextModel) -> None:
    ids, mask = random_ids(3, 16)

    def loss(params: Params) -> jax.Array:
        out = model.encoder.apply({"params": params}, ids, mask, method="embed")
        return jnp.sum(out * jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape))

    gradients = jax.jit(jax.grad(loss))(model.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        assert np.any(np.asarray(leaf) != 0), path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, mask: (ids.astype(np.float32), mask), "must be int"),
        (lambda ids, mask: (ids[0], mask), "must be int"),
        (lambda ids, mask: (ids, mask.astype(np.int32)), "must be bool"),
        (lambda ids, mask: (ids, mask[:, 1:]), "must be bool"),
        (lambda ids, mask: (ids, mask[:, ::-1]), "padding comes at the end"),
        (lambda ids, mask: (ids + 1000, mask), "the vocabulary has 0 to"),
        (lambda ids, mask: (ids - 1000, mask), "the vocabulary has 0 to"),
        (lambda ids, mask: (np.tile(ids, 9), np.tile(mask, 9)), "positions for 16"),
    ],
)
def test_wrong_ids_are_refused(
    model: TextModel, change: Callable[..., tuple[np.ndarray, ...]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.encoder.apply({"params": model.params}, *change(*random_ids(2, 5)))


def test_traced_ids_out_of_the_vocabulary_give_nan(model: TextModel) -> None:
    ids, mask = random_ids(4, 4)
    for bad in (-1, len(VOCABULARY)):
        ids[0, 2] = bad
        found = jax.jit(model.encoder.apply)({"params": model.params}, ids, mask)
        assert np.isnan(found[0]).all()
        assert np.isfinite(found[1]).all()


# --- The tokenizer ------------------------------------------------------------------------------


def random_texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    pieces = [
        *VOCABULARY,
        "Ärger",
        "Éa",
        "CAT",
        "日本",
        "!?",
        "\u200b",
        "ﬁ",
        "\t",
        "0",
        "[SEP]",
        "İ",
    ]
    return [
        " ".join(rng.choice(pieces, rng.integers(1, 14))) + rng.choice(["", " ", "a", "Z"])
        for _ in range(count)
    ]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("lower", [True, False])
def test_tokens_are_those_of_transformers_tokenizer(
    tmp_path: Path, lower: bool, as_json: bool
) -> None:
    write_tokenizer(tmp_path, lower=lower, as_json=as_json)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = read(tmp_path)
    for text in random_texts(200):
        if not text.strip():
            continue
        said = text.strip().lower() if lower else text.strip()
        expected = theirs(said, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        ids, mask, lengths = ours([text])
        assert ids[0].tolist() == expected, text
        assert mask.all()
        assert lengths[0] == len(theirs(said)["input_ids"])


def test_its_settings_count_more_than_those_in_tokenizer_json(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, lower=True, as_json=True)
    edit(tmp_path / "sentence_bert_config.json", do_lower_case=False)
    assert read(tmp_path)(["CAT"]).ids.tolist() == read(tmp_path)(["cat"]).ids.tolist()
    edit(tmp_path / "tokenizer_config.json", do_lower_case=False)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert read(tmp_path)(["CAT"]).ids[0].tolist() == theirs("CAT")["input_ids"]
    assert read(tmp_path)(["CAT"]).ids.tolist() != read(tmp_path)(["cat"]).ids.tolist()


def test_padding_and_lengths(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokens = read(tmp_path)(["a", "a cat sleeps", "a " * 30], multiple=8)
    assert tokens.ids.shape == (3, MAX_LENGTH)  # 16 would be more than it may be
    assert tokens.mask.sum(axis=1).tolist() == [3, 5, MAX_LENGTH]
    assert tokens.lengths.tolist() == [3, 5, 32]
    assert tokens.ids.dtype == np.int32
    assert read(tmp_path)(["a"], multiple=8).ids.shape == (1, 8)
    assert read(tmp_path)(["a", "a cat"]).ids.shape == (2, 4)


def test_the_length_is_what_the_files_say_and_the_encoder_takes(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, max_length=512)
    assert read(tmp_path).max_length == 16
    (tmp_path / "sentence_bert_config.json").unlink()
    edit(tmp_path / "tokenizer_config.json", model_max_length=9)
    assert read(tmp_path).max_length == 9
    edit(tmp_path / "tokenizer_config.json", model_max_length=1e30)
    assert read(tmp_path).max_length == 16


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "vocab.txt").unlink(), "no tokenizer.json and no vocab.txt"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is no tokenizer"),
        (lambda f: (f / "vocab.txt").write_text("a\nb\n"), r"no tokens \[CLS\], \[MASK\]"),
        (lambda f: (f / "vocab.txt").write_bytes(b"\xff"), "is no text"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "is not a JSON object"),
        (lambda f: edit(f / "tokenizer_config.json", do_lower_case="no"), "do_lower_case = 'no'"),
        (lambda f: edit(f / "sentence_bert_config.json", max_seq_length=2), "2 tokens at most"),
        (
            lambda f: (f / "vocab.txt").write_text("\n".join([*VOCABULARY, "more"])),
            "it is of another model",
        ),
    ],
)
def test_damaged_tokenizers_are_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(write_tokenizer(tmp_path))
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_prompts_are_refused(model: TextModel) -> None:
    for prompts in ([], [""], ["a", " \n"]):
        with pytest.raises(InputError, match=r"no prompt|at least one word"):
            text_features(model, prompts)


def test_a_prompt_that_is_cut_off_is_said(
    model: TextModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        text_features(model, ["a cat"])
        assert not caplog.records
        text_features(model, ["a cat", "the dog " * 20])
    (record,) = caplog.records
    assert f"has 42 tokens; the text encoder sees the first {MAX_LENGTH}" in record.getMessage()


# --- Conversion ---------------------------------------------------------------------------------


def test_sizes_of_the_released_encoders() -> None:
    large = TextConfig()
    dropped = 1024 * 1024 + 1024  # BERT's pooler
    assert count_shapes(text_shapes(large)) == {"text": 335_141_888 - dropped}
    base = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072}
    small = {"hidden_size": 384, "num_layers": 12, "num_heads": 12, "mlp_dim": 1536}
    for sizes, count in ((base, 109_482_240), (small, 33_360_000)):
        config = TextConfig(**sizes)
        dropped = config.hidden_size**2 + config.hidden_size
        assert count_shapes(text_shapes(config)) == {"text": count - dropped}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "layers", "heads"), [(384, 12, 12), (768, 12, 12), (1024, 24, 16)], ids=str
)
def test_encoders_of_released_sizes(tmp_path: Path, width: int, layers: int, heads: int) -> None:
    bert = save_sentence_encoder(
        tmp_path / "hf",
        vocab_size=30522,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=512,
    )
    convert_text(str(tmp_path / "hf"), tmp_path / "model")
    model = load_text(tmp_path / "model")
    ids, mask = random_ids(3, 17, 64)
    theirs, attended = torch_ids(ids, mask)
    with torch.no_grad():
        expected = bert(input_ids=theirs, attention_mask=attended).last_hidden_state
    found = jax.jit(model.encoder.apply)({"params": model.params}, ids, mask)
    assert relative_error(found, expected.numpy()) < 1e-5


def test_every_tensor_of_a_bert_is_used_or_dropped() -> None:
    bert = random_bert(tiny_bert_config())
    theirs = {name: tuple(value.shape) for name, value in bert.state_dict().items()}
    wanted = dict(expected_shapes(bert_entries(tiny_text_config())))
    assert {name: shape for name, shape in theirs.items() if "pooler" not in name} == wanted


def test_a_folder_goes_through_unchanged(model: TextModel, tmp_path: Path) -> None:
    assert model.source is not None
    assert set(model.source.dropped) >= {"pooler.dense.weight", "pooler.dense.bias"}
    save_text(tmp_path / "again", model)
    again = load_text(tmp_path / "again", scan=False)
    assert again.config == model.config
    assert again.tokenizer.files == model.tokenizer.files
    assert again.source == model.source
    unstacked = dataclasses.replace(again, params=again.params)
    save_text(tmp_path / "third", unstacked)
    for name in ("model.safetensors", "config.json", "vocab.txt", "tokenizer_config.json"):
        assert (tmp_path / "third" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with pytest.raises(InputError, match="exists"):
        save_text(tmp_path / "again", model)


def test_bfloat16_folders(source: Path, tmp_path: Path) -> None:
    report = convert_text(str(source), tmp_path / "model", dtype="bfloat16")
    model = load_text(tmp_path / "model")
    assert report.dtype == "bfloat16"
    assert model.params["word_embed"].dtype == jnp.bfloat16
    assert model.encoder.dtype == jnp.bfloat16
    assert load_text(tmp_path / "model", dtype="float32").encoder.dtype == np.float32
    features = text_features(model, PROMPTS)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit(f / "config.json", model_type="roberta"), "must be 'bert'"),
        (lambda f: edit(f / "config.json", hidden_act="relu"), "hidden_act = 'relu'"),
        (lambda f: edit(f / "config.json", num_attention_heads=5), "num_heads = 5"),
        (
            lambda f: edit(f / "config.json", position_embedding_type="relative_key"),
            "position_embedding_type = 'relative_key'",
        ),
        (lambda f: edit(f / "config.json", num_hidden_layers=3), "missing encoder.layer.2."),
        (lambda f: edit(f / "config.json", num_hidden_layers=1), "unexpected encoder.layer.1."),
        (lambda f: edit(f / "config.json", intermediate_size=41), r"\[40\], \[41\] would be right"),
        (lambda f: (f / "modules.json").unlink(), "modules.json does not exist"),
        (lambda f: (f / "modules.json").write_text('[{"type": "x.Dense"}]'), r"\['Dense'\]"),
        (lambda f: (f / "1_Pooling" / "config.json").unlink(), "does not exist"),
        (
            lambda f: edit(f / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True),
            "the pooling is pooling_mode_cls_token, pooling_mode_mean_tokens",
        ),
        (
            lambda f: edit(f / "1_Pooling" / "config.json", word_embedding_dimension=25),
            "word_embedding_dimension = 25",
        ),
        (
            lambda f: (f / "config_sentence_transformers.json").write_text(
                '{"default_prompt_name": "query"}'
            ),
            "default_prompt_name",
        ),
        (lambda f: (f / "vocab.txt").unlink(), "no tokenizer.json and no vocab.txt"),
    ],
)
def test_other_models_and_damaged_folders_are_refused(
    copied: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(copied)
    with pytest.raises(InputError, match=message) as caught:
        convert_text(str(copied), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_sum_of_modules_without_a_norm_is_the_same_model(copied: Path, tmp_path: Path) -> None:
    write_sentence_modules(copied)
    modules = json.loads((copied / "modules.json").read_text())
    (copied / "modules.json").write_text(json.dumps(modules[:2]))
    convert_text(str(copied), tmp_path / "out")
    features = text_features(load_text(tmp_path / "out"), PROMPTS)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)


def test_other_folders_are_no_text_encoders(model: TextModel, source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_text(tmp_path)
    with pytest.raises(CheckpointError, match="convert it first"):
        load_text(source)
    save_text(tmp_path / "text", model)
    with pytest.raises(CheckpointError, match=r"a text encoder, which .*load_text loads"):
        jvjepa.load(tmp_path / "text")
    edit(tmp_path / "text" / "config.json", text={"pooling": "max"})
    with pytest.raises(CheckpointError, match="pooling = 'max'"):
        load_text(tmp_path / "text")


def test_configurations_are_checked() -> None:
    config = tiny_text_config(pooling="mean")
    assert TextConfig.from_json(config.to_json()) == config
    for changes in ({"vocab_size": 0}, {"num_heads": 7}, {"pooling": "max"}, {"num_layers": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            tiny_text_config(**changes)
    with pytest.raises(ConfigError, match="model_type = None"):
        from_hf_config({}, "cls")
    assert from_hf_config(tiny_bert_config().to_dict(), "cls") == tiny_text_config()
    with pytest.raises(ConfigError, match="attention = 'x'"):
        TextEncoder(config, attention="x").init(jax.random.key(0), *random_ids(2))

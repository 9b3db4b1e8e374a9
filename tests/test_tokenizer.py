"""Merges against a naive trainer; ids against Hugging Face; files that load whole or not at all."""

import json
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import regex
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from gptfast.errors import UserError
from gptfast.tokenizer import BOS, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, train_tokenizer
from gptfast.tokenizer.files import merges
from gptfast.tokenizer.texts import TEXTS


def varied_texts(count: int) -> list[str]:
    """Random words, scripts, digits, whitespace, emoji, code, long runs and broken bytes."""
    rng = random.Random(5)
    pieces = [
        *"".join(TEXTS.values()).split(" "),
        *("don't", "I'LL", "we'Ve", "it'ſ", "naïve", "Straße", "ǅ", "ﬁ", "x²", "½", "Ⅷ", "٣٤"),
        *("1234567", "привет", "日本語テキスト", "مرحبا", "हिन्दी", "ไทย", "e\u0301\u0327"),
        *("\U0001f469\u200d\U0001f4bb", "\U0001f3f3\ufe0f\u200d\U0001f308", "🇰🇷", "😀", "👍🏽"),
        *("\x00", "\x1c", "\x85", "\xa0", "\u200b", "\u2028", "\u3000", "\ufeff", " ", "  "),
        *("\n", "\r\n", "\n\n\n", "\t\t", " \n ", "   \t", "...", "!?", "{}();", "->", "'", "''"),
        *("<|bos|>", "<|user_start|>", "<|bos", "|>"),
    ]
    texts = []
    for index in range(count):
        kind = index % 4
        if kind == 0:
            texts.append(" ".join(rng.choices(pieces, k=rng.randrange(1, 40))))
        elif kind == 1:
            texts.append("".join(rng.choices(pieces, k=rng.randrange(1, 40))))
        elif kind == 2:
            texts.append(rng.randbytes(rng.randrange(1, 200)).decode("utf-8", errors="replace"))
        else:
            texts.append(rng.choice(pieces) * rng.randrange(1, 300) + rng.choice(pieces))
    return texts


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([*TEXTS.values(), *varied_texts(200)], 1500)


def naive_merges(texts: list[str], count: int) -> list[tuple[bytes, bytes]]:
    """BPE by its definition: merge the most frequent pair, of equals the smallest, and repeat."""
    tokens = [bytes([byte]) for byte in range(256)]
    chunks = Counter(
        tuple(chunk.encode()) for text in texts for chunk in regex.findall(SPLIT_PATTERN, text)
    )
    pairs = []
    for _ in range(count):
        counts: Counter[tuple[int, int]] = Counter()
        for chunk, times in chunks.items():
            for pair in pairwise(chunk):
                counts[pair] += times
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        pairs.append((tokens[best[0]], tokens[best[1]]))
        merged: Counter[tuple[int, ...]] = Counter()
        for chunk, times in chunks.items():
            ids, at = [], 0
            while at < len(chunk):
                found = chunk[at : at + 2] == best
                ids.append(len(tokens) if found else chunk[at])
                at += 1 + found
            merged[tuple(ids)] += times
        chunks = merged
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return pairs


def test_merges_equal_a_naive_trainer() -> None:
    texts = [*TEXTS.values(), "aaaaaaa aaa aaaa", "ababab bababa " * 3]
    trained = Tokenizer.train(texts, 256 + 200 + 9)
    assert merges(trained.tokens) == naive_merges(texts, 200)


def test_equal_counts_merge_the_smaller_pair_first() -> None:
    trained = Tokenizer.train(["abcd"], 256 + 3 + 9)
    assert trained.tokens[256:] == [b"ab", b"cd", b"abcd"]


def test_ids_are_bytes_then_merges_then_specials(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 1500
    assert tokenizer.tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert [tokenizer.special_id(name) for name in SPECIAL_TOKENS] == list(range(1491, 1500))
    assert tokenizer.bos_id == 1491
    with pytest.raises(ValueError, match=r"no special token '<\|eot\|>'; there are <\|bos\|>, "):
        tokenizer.special_id("<|eot|>")


def test_digits_come_in_pairs_at_most() -> None:
    trained = Tokenizer.train(["12345 12345 2025 1234567"], 256 + 9 + 5)
    assert max(len(token) for token in trained.tokens) == 2
    assert trained.decode_bytes(trained.encode("12345")) == b"12345"


@pytest.mark.parametrize("size", [0, 255, 264])
def test_a_vocabulary_without_room_for_bytes_and_specials_is_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"vocab_size {size} is too small: .* need 265"):
        Tokenizer.train(["text"], size)


def test_bytes_and_specials_alone_are_a_vocabulary() -> None:
    trained = Tokenizer.train(["text"], 265)
    assert trained.encode("é", prepend=trained.bos_id) == [256, 0xC3, 0xA9]


def test_too_little_text_says_how_many_merges_it_allows() -> None:
    with pytest.raises(UserError, match=r"allows 3 of 35 merges; .* vocab_size of at most 268"):
        Tokenizer.train(["abcd"], 300)
    assert Tokenizer.train(["abcd"], 268).vocab_size == 268


def test_text_survives(tokenizer: Tokenizer) -> None:
    for text in varied_texts(1000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(np.array(tokenizer.encode("array"), dtype=np.int32)) == "array"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_special_tokens_in_text_stay_text(tokenizer: Tokenizer) -> None:
    for name in SPECIAL_TOKENS:
        ids = tokenizer.encode(f"a{name}b")
        assert max(ids) < tokenizer.bos_id
        assert tokenizer.decode(ids) == f"a{name}b"
        assert tokenizer.decode([tokenizer.special_id(name)]) == name


def test_whitespace_beyond_the_regex_engines_limit(tokenizer: Tokenizer) -> None:
    text = "a" + "\t" * 1_100_000 + "b"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    documents = tokenizer.encode_documents(["first", text])
    assert documents.tolist()[-len(ids) :] == ids


@pytest.mark.parametrize("threads", [1, 3])
def test_documents_are_concatenated_after_bos(tokenizer: Tokenizer, threads: int) -> None:
    odd = ["", "<|bos|", BOS, f"x{BOS * 3}", "|>", "\ud83d", "", "long " * 30_000]
    texts = varied_texts(400) + odd
    expected = [id_ for text in texts for id_ in tokenizer.encode(text, prepend=tokenizer.bos_id)]
    ids = tokenizer.encode_documents(texts, threads=threads)
    assert ids.dtype == np.int32
    assert ids.tolist() == expected
    without_bos = [text for text in texts if BOS not in text]
    assert (tokenizer.encode_documents(without_bos, threads) == tokenizer.bos_id).sum() == len(
        without_bos
    )


def test_no_documents_are_no_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_documents([])
    assert (ids.shape, ids.dtype) == ((0,), np.int32)


def test_token_bytes_count_raw_bytes(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.token_bytes()
    assert (lengths.shape, lengths.dtype) == ((1500,), np.int32)
    assert (lengths[:256] == 1).all()
    assert (lengths[-9:] == 0).all()
    for text in varied_texts(200):
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    # Parts of characters: through a string each would count as U+FFFD, 3 bytes.
    parts = [
        rank
        for rank, token in enumerate(tokenizer.tokens)
        if rank >= 256 and "\ufffd" in token.decode(errors="replace")
    ]
    assert len(parts) > 20
    assert any(lengths[i] != len(tokenizer.decode([i]).encode()) for i in parts)


def test_saved_files_load_in_tiktoken(tokenizer: Tokenizer, tmp_path, monkeypatch) -> None:
    tokenizer.save(tmp_path / "saved")
    # tiktoken keeps copies of what it reads, by path.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    config = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    plain = tiktoken.Encoding(
        "plain",
        pat_str=config["pattern"],
        mergeable_ranks=load_tiktoken_bpe(str(tmp_path / "saved/tokenizer.tiktoken")),
        special_tokens=config["special_tokens"],
        explicit_n_vocab=config["vocab_size"],
    )
    for text in varied_texts(1000):
        assert plain.encode_ordinary(text) == tokenizer.encode(text)


def test_saved_files_load_in_hugging_face_tokenizers(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer.save(tmp_path / "saved")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "saved/tokenizer.json"))
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    assert {name: theirs.token_to_id(name) for name in SPECIAL_TOKENS} == tokenizer.specials
    assert theirs.encode(f"{BOS}a").ids == [tokenizer.bos_id, *tokenizer.encode("a")]
    theirs.encode_special_tokens = True
    for text in varied_texts(1000):
        ids = tokenizer.encode(text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == text


def test_saved_folder_loads_in_transformers(tokenizer: Tokenizer, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (theirs.bos_token_id, len(theirs)) == (tokenizer.bos_id, 1500)
    assert sorted(theirs.all_special_ids) == sorted(tokenizer.specials.values())
    for text in TEXTS.values():
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text


def test_load_gives_back_what_was_saved(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "deep/saved")
    loaded = Tokenizer.load(tmp_path / "deep/saved")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.tokens == tokenizer.tokens
    assert loaded.encode(TEXTS["korean"]) == tokenizer.encode(TEXTS["korean"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["saved"]


def test_fingerprint_tells_vocabularies_apart(tokenizer: Tokenizer) -> None:
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    assert Tokenizer(ranks).fingerprint == tokenizer.fingerprint
    others = [
        Tokenizer(dict(list(ranks.items())[:-1])),
        Tokenizer(ranks, pattern=SPLIT_PATTERN.replace("{1,2}", "{1,3}")),
        Tokenizer(ranks, specials=SPECIAL_TOKENS[:-1]),
    ]
    assert len({tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_nothing_is_overwritten(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "saved")
    # The same again is what a second node's process does that was slower.
    tokenizer.save(tmp_path / "saved")
    other = Tokenizer.train(["abcd"], 268)
    with pytest.raises(UserError, match="saved exists already"):
        other.save(tmp_path / "saved")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file exists already"):
        other.save(tmp_path / "file")
    assert Tokenizer.load(tmp_path / "saved").vocab_size == 1500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "saved"]


def test_a_failed_save_leaves_nothing(tokenizer: Tokenizer, tmp_path, monkeypatch) -> None:
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def flip_a_byte(folder) -> None:
    path = folder / "tokenizer.tiktoken"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


def truncate(folder) -> None:
    path = folder / "tokenizer.tiktoken"
    path.write_bytes(path.read_bytes()[:-20])


def swap(folder) -> None:
    Tokenizer.train(["abcd"], 268).save(folder.parent / "other")
    (folder.parent / "other/tokenizer.tiktoken").replace(folder / "tokenizer.tiktoken")


def renumber(folder) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("1491", "1600"))


def cut_config(folder) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text()[:100])


def foreign_config(folder) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text('{"tokenizer_class": "GPT2TokenizerFast"}')


def list_config(folder) -> None:
    (folder / "tokenizer_config.json").write_text("[]")


def remove_ranks(folder) -> None:
    (folder / "tokenizer.tiktoken").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "tokenizer.tiktoken does not belong to its tokenizer_config.json"),
        (truncate, "tokenizer.tiktoken does not belong to its tokenizer_config.json"),
        (swap, "tokenizer.tiktoken does not belong to its tokenizer_config.json"),
        (renumber, "tokenizer.tiktoken does not belong to its tokenizer_config.json"),
        (cut_config, "tokenizer_config.json is not a gptfast tokenizer's"),
        (foreign_config, "tokenizer_config.json is not a gptfast tokenizer's: KeyError"),
        (list_config, "tokenizer_config.json is not a gptfast tokenizer's"),
        (remove_ranks, "no tokenizer in .*: tokenizer.tiktoken is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named(tokenizer: Tokenizer, tmp_path, damage, message: str) -> None:
    tokenizer.save(tmp_path / "saved")
    damage(tmp_path / "saved")
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path / "saved")


def test_ranks_that_are_no_vocabulary_are_refused() -> None:
    singles = {bytes([byte]): byte for byte in range(256)}
    with pytest.raises(UserError, match="1 of the 256 single bytes have no rank"):
        Tokenizer({token: rank for token, rank in singles.items() if rank < 255})
    with pytest.raises(UserError, match="ranks of 257 tokens are not 0 to 256"):
        Tokenizer({**singles, b"ab": 300})
    with pytest.raises(UserError, match=r"lack <\|bos\|>"):
        Tokenizer(singles, specials=["<|endoftext|>"])
    with pytest.raises(ValueError, match=r"token 256 \(b'abc'\) is not a merge of two earlier"):
        merges([*singles, b"abc"])


def test_train_tokenizer_records_what_it_read(tmp_path) -> None:
    seen = []
    trained = train_tokenizer(
        TEXTS.values(),
        tmp_path / "saved",
        vocab_size=500,
        settings={"doc_cap": 10_000},
        progress=seen.append,
    )
    characters = [len(text) for text in TEXTS.values()]
    assert seen == characters
    record = Tokenizer.load(tmp_path / "saved").training
    assert record == trained.training
    assert record.pop("train_time") > 0
    assert record == {
        "doc_cap": 10_000,
        "vocab_size": 500,
        "documents": 5,
        "characters": sum(characters),
    }


def test_train_tokenizer_refuses_an_occupied_folder_before_reading(tmp_path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/mine.txt").write_text("mine")

    def texts():
        raise AssertionError("read")
        yield ""

    with pytest.raises(UserError, match="saved exists already"):
        train_tokenizer(texts(), tmp_path / "saved", vocab_size=300)

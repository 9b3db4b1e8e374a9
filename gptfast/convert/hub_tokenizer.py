"""The tokenizer in Hugging Face's format, with the chat template, and back out of tokenizer.json.

transformers then gives the same ids, but for two conventions of its own: `tokenizer(text)` puts
<|bos|> before a text, which is how our models saw each document begin, and special tokens that a
text spells are parsed. In a chat, `apply_chat_template(..., sanitize_control_tokens=True)` turns
the latter off.
"""

import json
from pathlib import Path
from typing import Any

from gptfast.convert.trained import read_json
from gptfast.errors import UserError
from gptfast.run import write_json
from gptfast.tokenizer import BOS, CONFIG_FILE, HUGGING_FACE_FILE, Tokenizer
from gptfast.tokenizer.files import hugging_face_json

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, sequence_len: int) -> None:
    """tokenizer.json and tokenizer_config.json.

    The chat template is left out if the tokenizer has no tokens for chat.
    """
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    content = hugging_face_json(tokenizer.tokens, tokenizer.specials, tokenizer.pattern)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {BOS: {"id": BOS, "ids": [tokenizer.bos_id], "tokens": [BOS]}},
    }
    (folder / HUGGING_FACE_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")
    chats = "<|assistant_end|>" in tokenizer.specials
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": "<|assistant_end|>" if chats else BOS,
        "pad_token": BOS,
        "extra_special_tokens": [name for name in tokenizer.specials if name != BOS],
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_len,
    }
    if chats:
        config["chat_template"] = CHAT_TEMPLATE.read_text(encoding="utf-8")
    write_json(folder / CONFIG_FILE, config)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of tokenizer.json; UserError unless ours gives the same ids as it."""
    path = folder / HUGGING_FACE_FILE
    found = read_json(path)
    try:
        tokenizer = _tokenizer_of(found)
        expected = hugging_face_json(tokenizer.tokens, tokenizer.specials, tokenizer.pattern)
        problem = _difference(found, expected)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{path} is no byte-level BPE as tiktoken has it: {error!r}") from error
    if problem:
        raise UserError(f"{path} would give other ids here: {problem}")
    return tokenizer


def _tokenizer_of(content: dict[str, Any]) -> Tokenizer:
    """By its tokens, pattern and special tokens alone."""
    # The 256 tokens of one byte, spelt: the letter of each byte.
    letters = hugging_face_json([bytes([byte]) for byte in range(256)], {}, "")["model"]["vocab"]
    ranks = {
        bytes(letters[letter] for letter in spelt): rank
        for spelt, rank in content["model"]["vocab"].items()
    }
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    specials = [added[id_] for id_ in range(len(ranks), len(ranks) + len(added))]
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    return Tokenizer(ranks, pattern=pattern, specials=specials)


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """The first part that encodes otherwise than expected, or None.

    transformers writes what does not matter, such as offsets, in other ways than we do.
    """
    if found.get("normalizer") is not None:
        return f"normalizer {found['normalizer']['type']}"
    steps, ours = (each["pre_tokenizer"]["pretokenizers"] for each in (found, expected))
    if len(steps) != 2 or steps[0] != ours[0]:
        return "its text is not cut by one pattern"
    for name in ("type", "add_prefix_space", "use_regex"):
        if steps[1].get(name) != ours[1][name]:
            return f"{name} of its byte level is {steps[1].get(name)!r}"
    model = found["model"]
    for name in ("type", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if (model.get(name) or None) != expected["model"][name]:
            return f"{name} of its model is {model[name]!r}"
    # Pairs as lists or as one string with a blank between. It may list more than one way to
    # make a token, as tiktoken, which takes any.
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    missing = {tuple(m.split(" ")) for m in expected["model"]["merges"]} - set(merges)
    if missing:
        return f"it never merges {min(missing)}"
    ranks = [model["vocab"][left + right] for left, right in merges]
    if ranks != sorted(ranks):
        return "its merges are not in the order of its tokens"
    return None

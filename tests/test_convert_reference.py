"""The reference's checkpoints, re-created from their description, both ways; wrong ones refused."""

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

from gptfast.convert.reference import read_reference, write_reference
from gptfast.convert.trained import TrainedModel, checked_state, write_run
from gptfast.errors import UserError
from gptfast.evaluate.loading import find_checkpoint, load_model
from gptfast.run import find_run
from tests.convert_cases import (
    CPU,
    REFERENCE_CONFIG,
    PlainReference,
    make_encoding,
    make_reference,
    make_trained,
    write_as_the_reference,
)
from train import convert


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    return make_trained(rope_base=10000.0, softcap=15.0)


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    return write_as_the_reference(tmp_path / "theirs", make_reference(), make_encoding(trained))


def read(path: Path) -> TrainedModel:
    return read_reference(path, path.with_name("tokenizer.pkl"))


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_the_references_model_gives_its_logits_here(trained, tmp_path, prefix):
    theirs = make_reference()
    path = write_as_the_reference(tmp_path / "theirs", theirs, make_encoding(trained), prefix)
    model = read(path)
    assert (model.config.norm_eps, model.config.rope_base) == (2.0**-23, 10000.0)
    assert (model.config.softcap, model.step) == (15.0, 650)
    assert model.tokenizer.fingerprint == trained.tokenizer.fingerprint
    write_run(tmp_path / "run", model, origin="a checkpoint of nanochat", stage="sft")
    ours = load_model(find_checkpoint(tmp_path / "run"), CPU)
    ids = torch.randint(600, (2, 64))
    torch.testing.assert_close(ours(ids), theirs(ids), atol=1e-4, rtol=0)


def test_there_and_back_bit_for_bit_with_the_recipe(checkpoint, tmp_path, monkeypatch, capsys):
    run, again = tmp_path / "runs" / "mid-d2", tmp_path / "again"
    command = ["convert", "from-reference", str(checkpoint), "--out", str(run)]
    command += ["--tokenizer", str(checkpoint.with_name("tokenizer.pkl"))]
    monkeypatch.setattr(sys, "argv", command)
    convert.main()
    assert "norm eps 1.19209e-07, rotary base 10000, softcap 15" in capsys.readouterr().out
    assert find_run("mid", run.parent) == run
    monkeypatch.setattr(sys, "argv", ["convert", "to-reference", str(run), "--out", str(again)])
    convert.main()

    theirs, written = (
        torch.load(path, weights_only=True) for path in (checkpoint, again / "model_000650.pt")
    )
    assert written.keys() == theirs.keys()
    assert "eps" not in capsys.readouterr().out
    for name, tensor in theirs.items():
        assert tensor.dtype == (torch.bfloat16 if "wte" in name else torch.float32)
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)
    meta = json.loads((again / "meta_000650.json").read_text())
    assert (meta["step"], meta["model_config"]) == (650, REFERENCE_CONFIG)


def test_another_eps_is_told(trained, tmp_path, monkeypatch, capsys):
    eps = replace(trained, config=replace(trained.config, norm_eps=1e-6))
    write_run(tmp_path / "run", eps, origin="here", stage="base")
    command = ["convert", "to-reference", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    convert.main()
    assert "; its norms' eps is 1.19209e-07, ours 1e-06" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["to-hf", "to-reference", "to-file"])
def test_a_tokenizer_elsewhere_is_named(trained, tmp_path, monkeypatch, capsys, command):
    run, moved, out = tmp_path / "run", tmp_path / "moved", tmp_path / "out"
    write_run(run, trained, origin="here", stage="sft")
    (run / "tokenizer").rename(moved)
    flags = ["convert", command, str(run), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(UserError, match="is not there: give its folder as --tokenizer"):
        convert.main()
    assert not out.exists()
    monkeypatch.setattr(sys, "argv", [*flags, "--tokenizer", str(moved)])
    convert.main()
    assert str(out) in capsys.readouterr().out
    assert out.exists()


def test_our_model_gives_its_logits_there(trained, tmp_path):
    model = replace(trained, config=replace(trained.config, norm_eps=2.0**-23))
    write_reference(tmp_path / "out", model, {"val_bpb": 0.9})
    meta = json.loads((tmp_path / "out" / "meta_000042.json").read_text())
    assert meta["val_bpb"] == 0.9
    theirs = PlainReference(**meta["model_config"]).requires_grad_(False)
    state = torch.load(tmp_path / "out" / "model_000042.pt", weights_only=True)
    theirs.load_state_dict(state, strict=True, assign=True)
    write_run(tmp_path / "run", replace(model, state=rounded(model)), origin="here")
    ours = load_model(find_checkpoint(tmp_path / "run"), CPU)
    ids = torch.randint(600, (2, 64))
    torch.testing.assert_close(theirs(ids), ours(ids), atol=1e-4, rtol=0)

    folder = tmp_path / "out" / "tokenizer"
    encoding = pickle.loads((folder / "tokenizer.pkl").read_bytes())
    assert isinstance(encoding, tiktoken.Encoding)
    assert encoding.encode_ordinary("hello, 12345") == trained.tokenizer.encode("hello, 12345")
    assert encoding.encode_single_token("<|output_end|>") == 599
    token_bytes = torch.load(folder / "token_bytes.pt", weights_only=True)
    assert (token_bytes.dtype, int(token_bytes[599])) == (torch.int32, 0)
    assert np.array_equal(token_bytes.numpy(), trained.tokenizer.token_bytes())


def rounded(model: TrainedModel) -> dict[str, torch.Tensor]:
    """As it comes back from the reference: the embedding went through bf16."""
    wte = "transformer.wte.weight"
    return {**model.state, wte: model.state[wte].bfloat16().float()}


@pytest.mark.parametrize(("name", "value"), [("rope_base", 500.0), ("softcap", 30.0)])
def test_what_the_reference_cannot_be_told_is_refused(trained, tmp_path, name, value):
    other = replace(trained, config=replace(trained.config, **{name: value}))
    with pytest.raises(UserError, match=rf"{name} is {value}; the reference has"):
        write_reference(tmp_path / "out", other, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_ours_serves_as_its_tokenizer(trained, checkpoint, tmp_path):
    trained.tokenizer.save(tmp_path / "tokenizer")
    model = read_reference(checkpoint, tmp_path / "tokenizer")
    assert model.tokenizer.fingerprint == trained.tokenizer.fingerprint
    with pytest.raises(UserError, match=r"nowhere is not there: name the reference's"):
        read_reference(checkpoint, tmp_path / "nowhere")


def change_state(change):
    def apply(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return apply


def change_config(change):
    def apply(path: Path) -> None:
        meta = path.with_name("meta_000650.json")
        content = json.loads(meta.read_text())
        change(content)
        meta.write_text(json.dumps(content))

    return apply


HEAD = "lm_head.weight"
WRONG = {
    "a shape": (
        change_state(lambda s: s.update({HEAD: torch.zeros(600, 63)})),
        r"lm_head.weight is \(600, 63\)",
    ),
    "a later version's tensor": (
        change_state(lambda s: s.update({"resid_lambdas": torch.ones(2)})),
        "has, beyond this model's, resid_lambdas",
    ),
    "a tensor less": (change_state(lambda s: s.pop(HEAD)), "lacks lm_head.weight"),
    "not a number": (
        change_state(lambda s: s[HEAD][0].fill_(float("nan"))),
        "lm_head.weight has values that are not finite",
    ),
    "integers": (
        change_state(lambda s: s.update({HEAD: s[HEAD].long()})),
        "it names torch.LongStorage",
    ),
    "a later version's setting": (
        change_config(lambda m: m["model_config"].update(window_pattern="SSSL")),
        "not a model of the version that is read here",
    ),
    "no settings": (change_config(lambda m: m.pop("model_config")), "model_config has None"),
    "a setting in words": (
        change_config(lambda m: m["model_config"].update(n_head="four")),
        "n_head is 'four', expected a positive int",
    ),
    "a million layers": (
        change_config(lambda m: m["model_config"].update(n_layer=10**6)),
        "too few for 1000000 layers",
    ),
    "another vocabulary": (
        change_config(lambda m: m["model_config"].update(vocab_size=601)),
        r"is \(600, 64\) torch.bfloat16, expected \(601, 64\)",
    ),
    "no metadata": (
        lambda path: path.with_name("meta_000650.json").unlink(),
        "meta_000650.json cannot be read: No such file",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_that_model_is_refused_with_a_reason(checkpoint, case):
    damage, reason = WRONG[case]
    damage(checkpoint)
    with pytest.raises(UserError, match=reason):
        read(checkpoint)


def test_a_file_of_another_name_is_refused(checkpoint):
    other = checkpoint.rename(checkpoint.with_name("weights.pt"))
    with pytest.raises(UserError, match=r"weights.pt is not called model_NNNNNN.pt"):
        read(other)


def test_a_state_may_be_half_precision_but_nothing_less(trained):
    half = {name: tensor.half() for name, tensor in trained.state.items()}
    state = checked_state(trained.config, half, Path("x"))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    eighth = {**half, HEAD: half[HEAD].to(torch.float8_e4m3fn)}
    with pytest.raises(UserError, match="float8_e4m3fn, expected"):
        checked_state(trained.config, eighth, Path("x"))

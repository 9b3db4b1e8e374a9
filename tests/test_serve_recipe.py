"""train/serve.py: what it starts, how it ends, and which mistakes it tells."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from gptfast.run import exit_code
from gptfast.serve import app, server
from gptfast.serve.app import Access
from tests.serve_cases import HELLO, expected, save_run
from train import serve as recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "sft-d1")


def start(*flags: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train" / "serve.py"), "--device=cpu", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def workers(process: subprocess.Popen) -> list[int]:
    """Of the processes that it started, those that hold a model."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@pytest.mark.slow
def test_the_recipe_from_start_to_sigterm(run):
    process = start(f"--source={run}", "--port=0", "--slots=4", "--context=400")
    try:
        assert process.stdout.readline() == f"{run}, step_000007\n"
        url = process.stdout.readline().partition(": ")[0]
        wanted = "ready: 1 x 4 answers at a time on cpu, 400 tokens each\n"
        assert process.stdout.readline() == wanted
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            answer = client.chat.completions.create(
                model="sft-d1", messages=HELLO, seed=9, max_tokens=30
            )
            assert answer.choices[0].message.content == expected(HELLO, seed=9)["content"]
            stream = client.chat.completions.create(
                model="sft-d1", messages=HELLO, seed=9, stream=True, max_tokens=300
            )
            next(stream)
            # As Ctrl-C and service managers do: to the worker as well.
            for pid in (*workers(process), process.pid):
                os.kill(pid, signal.SIGTERM)
            finishes = [chunk.choices[0].finish_reason for chunk in stream]
            assert finishes[-1] in ("stop", "length")
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        process.kill()


def test_a_base_model_is_served_with_a_word(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(server, "serve", lambda app, pool, listener, **_: listener.close())
    base = save_run(tmp_path / "base-d1")
    told = "a base model knows no conversations: what it answers means little before mid and SFT"
    for source, words in ((run, []), (base, [told])):
        monkeypatch.setattr(sys, "argv", ["serve.py", f"--source={source}", "--port=0"])
        recipe.main()
        said = capsys.readouterr().out.splitlines()
        assert said == [f"{source}, step_000007", *words]


@pytest.mark.parametrize(
    ("flags", "variable", "token"),
    [
        ([], None, None),
        ([], "", None),
        ([], " \n", None),
        ([], "secret\n", "secret"),
        (["--token= secret\n"], "other", "secret"),
        (["--token="], "other", "other"),
    ],
)
def test_a_token_has_characters(run, monkeypatch, flags, variable, token):
    """Without one, only names of this machine are answered."""
    access = []
    monkeypatch.setattr(app, "create_app", lambda *_, **options: access.append(options["access"]))
    monkeypatch.setattr(server, "serve", lambda app, pool, listener, **_: listener.close())
    if variable is None:
        monkeypatch.delenv("GPTFAST_TOKEN", raising=False)
    else:
        monkeypatch.setenv("GPTFAST_TOKEN", variable)
    command = ["serve.py", f"--source={run}", "--device=cpu", "--port=0", *flags]
    monkeypatch.setattr(sys, "argv", command)
    recipe.main()
    assert access == [Access(token, local_only=token is None)]


def test_mistakes_are_told_before_anything_is_loaded(run, monkeypatch, capsys):
    monkeypatch.delenv("GPTFAST_TOKEN", raising=False)
    for flags, words in (
        (["--host=0.0.0.0", f"--source={run}"], "set a token"),
        (["--source=nowhere"], "nowhere is no run's folder"),
        (["--device=cpu", "--num-gpus=2", f"--source={run}"], "but a CPU holds one copy"),
        ([f"--source={run}", "--slots=0"], "slots must be at least 1, got 0"),
        ([f"--source={run}", "--port=70000"], "port must be 0 to 65535, got 70000"),
        ([f"--source={run}", "--port=-1"], "port must be 0 to 65535, got -1"),
        ([f"--source={run}", "--context=0"], "context 0, but a conversation has 6 tokens or more"),
        ([f"--source={run}", "--context=5"], "context 5, but a conversation has 6 tokens or more"),
        ([f"--source={run}", "--context=481"], "context 481, but the model has 480 positions"),
        ([f"--source={run}", "--step=3"], "no checkpoint of step 3"),
        ([f"--source={run}", "--port=0", "--top-k=0"], "top_k 0: Input should be greater"),
    ):
        monkeypatch.setattr(sys, "argv", ["serve.py", *flags])
        assert exit_code(recipe.main) == 2
        out, err = capsys.readouterr()
        assert words in err
        assert (out, len(err.splitlines())) == ("", 1)

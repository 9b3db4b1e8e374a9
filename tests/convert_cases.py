"""What the tests of conversion share: a small model whose every setting is unusual, and the
reference's model and files, re-created from their description."""

import json
import pickle
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

from gptfast.convert.trained import TrainedModel
from gptfast.evaluate.loading import Placement, random_model
from gptfast.model import GPTConfig
from gptfast.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from gptfast.tokenizer.texts import TEXTS

CPU = Placement(torch.device("cpu"), attention="math")
# What the reference's metadata tells of a model.
REFERENCE_CONFIG = {
    "sequence_len": 64,
    "vocab_size": 600,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 64,
}


def make_trained(**settings: float) -> TrainedModel:
    config = GPTConfig(
        **{
            "sequence_len": 256,
            "vocab_size": 600,
            "n_layer": 3,
            "n_head": 4,
            "n_kv_head": 2,
            "n_embd": 64,
            "norm_eps": 1e-3,
            "rope_base": 500.0,
            "softcap": 7.5,
            **settings,
        }
    )
    model = random_model(config, CPU, seed=3)
    state = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    tokenizer = Tokenizer.train(list(TEXTS.values()), config.vocab_size)
    return TrainedModel(config, state, tokenizer, step=42)


def same_model(a: TrainedModel, b: TrainedModel) -> bool:
    """Bit for bit."""
    return (
        (a.config, a.step, a.tokenizer.fingerprint) == (b.config, b.step, b.tokenizer.fingerprint)
        and list(a.state) == list(b.state)
        and all(
            torch.equal(tensor, b.state[name]) and tensor.dtype == b.state[name].dtype
            for name, tensor in a.state.items()
        )
    )


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:])


class PlainBlock(nn.Module):
    def __init__(self, width: int, kv_width: int) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_q = nn.Linear(width, width, bias=False)
        self.attn.c_k = nn.Linear(width, kv_width, bias=False)
        self.attn.c_v = nn.Linear(width, kv_width, bias=False)
        self.attn.c_proj = nn.Linear(width, width, bias=False)
        self.mlp.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.mlp.c_proj = nn.Linear(4 * width, width, bias=False)


class PlainReference(nn.Module):
    """Formulas and names of its model; computes in fp32, where it uses bf16 on a GPU."""

    def __init__(self, sequence_len, vocab_size, n_layer, n_head, n_kv_head, n_embd) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = n_head, n_kv_head, n_embd // n_head
        blocks = [PlainBlock(n_embd, n_kv_head * self.size) for _ in range(n_layer)]
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(vocab_size, n_embd), "h": nn.ModuleList(blocks)}
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer["wte"].to(torch.bfloat16)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads, size), turned by minus the angle of each position."""
        half = self.size // 2
        frequencies = 10000.0 ** (-torch.arange(half) / half)
        angles = torch.arange(x.shape[1])[:, None] * frequencies
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        B, T = ids.shape
        x = norm(self.transformer["wte"](ids).float())
        for block in self.transformer["h"]:
            a = block.attn
            y = norm(x)
            q = norm(self.rotate(a.c_q(y).view(B, T, self.heads, self.size)))
            k = norm(self.rotate(a.c_k(y).view(B, T, self.kv_heads, self.size)))
            v = a.c_v(y).view(B, T, self.kv_heads, self.size)
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=2) for t in (k, v))
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.size**0.5
            future = torch.ones(T, T, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
            x = x + a.c_proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(B, T, -1))
            x = x + block.mlp.c_proj(F.relu(block.mlp.c_fc(norm(x))) ** 2)
        return 15 * torch.tanh(self.lm_head(norm(x)) / 15)


def make_reference(seed: int = 0) -> PlainReference:
    torch.manual_seed(seed)
    return PlainReference(**REFERENCE_CONFIG).requires_grad_(False)


def make_encoding(trained: TrainedModel) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(trained.tokenizer.tokens)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding(
        name="rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )


def write_as_the_reference(
    folder: Path, model: PlainReference, encoding: tiktoken.Encoding, prefix: str = ""
) -> Path:
    """Its files in `folder`; the path of the model's."""
    folder.mkdir(exist_ok=True)
    state = model.state_dict(prefix=prefix)
    torch.save(state, folder / "model_000650.pt")
    meta = {
        "step": 650,
        "val_bpb": 0.81,
        "model_config": REFERENCE_CONFIG,
        "user_config": {"depth": 2},
    }
    (folder / "meta_000650.json").write_text(json.dumps(meta, indent=2))
    with (folder / "tokenizer.pkl").open("wb") as file:
        pickle.dump(encoding, file)
    return folder / "model_000650.pt"

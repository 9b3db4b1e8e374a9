"""The GPT: configuration, modules, and what it costs in parameters, FLOPs and bytes.

Architecture (nanochat d6d86cb, the model of the training report): rotary positions, QK-norm,
squared ReLU, untied embedding and head, parameter-free RMSNorm, no biases, softcapped logits.

A block takes and returns the pair (residual, branch): the residual stream, and what the last
sub-layer computed but did not add yet. Adding and normalising is then one pass over memory
(`add_rms_norm`), across the borders of blocks too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast.attention import Documents, attention
from gptfast.errors import UserError
from kernels import Operators, operators

HEAD_DIM = 128
# The rotary table, and so the longest context, is this many times sequence_len.
CONTEXT_FACTOR = 10


@dataclass(frozen=True)
class GPTConfig:
    """The architecture. Checked where it is made; UserError names the number that cannot work."""

    sequence_len: int = 2048
    vocab_size: int = 65536
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    softcap: float = 15.0

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head or self.head_dim % 2:
            near = max(2, round(self.n_embd / self.n_head / 2) * 2) * self.n_head
            raise UserError(
                f"n_embd {self.n_embd} over n_head {self.n_head} gives no even head size; "
                f"the nearest width that does is {near}"
            )
        if self.n_head % self.n_kv_head:
            near = max(d for d in range(1, self.n_kv_head + 1) if self.n_head % d == 0)
            raise UserError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}; "
                f"the nearest smaller n_kv_head that divides it is {near}"
            )

    @classmethod
    def from_depth(cls, depth: int, *, vocab_size: int, sequence_len: int = 2048) -> "GPTConfig":
        """The one dial: width 64 a layer, heads of 128 as far as that divides (nanochat)."""
        if depth < 1:
            raise UserError(f"depth must be at least 1, got {depth}")
        n_embd = 64 * depth
        n_head = -(-n_embd // HEAD_DIM)
        if n_embd % n_head or (n_embd // n_head) % 2:
            raise UserError(
                f"depth {depth} makes width {n_embd}, which {n_head} heads do not divide into "
                f"even sizes; the nearest depths that work are {depth - 1} and {depth + 1}"
            )
        return cls(
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            n_layer=depth,
            n_head=n_head,
            n_kv_head=n_head,
            n_embd=n_embd,
        )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def to_dict(self) -> dict:
        return asdict(self)


class Attention(nn.Module):
    """The four matrices of causal self-attention; q, k and v stay three parameters because Muon
    orthogonalises each on its own."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        kv_width = config.n_kv_head * config.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_width, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_width, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def packed_qkv(self) -> Tensor:
        """(C + 2 KV, C): the three weights side by side, so that q, k and v are one product."""
        return torch.cat((self.c_q.weight, self.c_k.weight, self.c_v.weight))


class MLP(nn.Module):
    """C -> 4C, squared ReLU, 4C -> C."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)


class BlockWeights(NamedTuple):
    """The matrices of a block's four products."""

    qkv: Tensor  # (C + 2 KV, C)
    attn_proj: Tensor  # (C, C)
    mlp_fc: Tensor  # (4C, C)
    mlp_proj: Tensor  # (C, 4C)


# (q, k, v) -> y; q and y (B, T, H, D), k and v (B, T, Hkv, D).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def block_forward(
    config: GPTConfig,
    ops: Operators,
    attend: Attend,
    weights: BlockWeights,
    residual: Tensor,
    branch: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """A block's arithmetic: (B, T, C) residual and branch -> the same two, one block later.

    attend: causal attention in training; to a cache, or to a prefix that several sequences share,
    when the model is used. cos, sin: fp32 (>= T, D/2), row t for token t.
    """
    residual, x = ops.add_rms_norm(residual, branch, eps=config.norm_eps)
    q, k, v = ops.rotary_qk_norm(
        ops.linear(x, weights.qkv),
        cos,
        sin,
        n_head=config.n_head,
        n_kv_head=config.n_kv_head,
        eps=config.norm_eps,
    )
    branch = ops.linear(attend(q, k, v).flatten(2), weights.attn_proj)
    residual, x = ops.add_rms_norm(residual, branch, eps=config.norm_eps)
    return residual, ops.squared_relu_mlp(x, weights.mlp_fc, weights.mlp_proj)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, ops: Operators, attention_backend: str) -> None:
        super().__init__()
        self.config, self.ops, self.attention_backend = config, ops, attention_backend
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def weights(self) -> BlockWeights:
        attn, mlp = self.attn, self.mlp
        return BlockWeights(
            attn.packed_qkv(), attn.c_proj.weight, mlp.c_fc.weight, mlp.c_proj.weight
        )

    def forward(
        self,
        residual: Tensor,
        branch: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: Documents | None = None,
        *,
        attend: Attend | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`block_forward` with this block's weights, and its attention unless another is given."""
        if attend is None:
            attend = partial(attention, backend=self.attention_backend, documents=documents)
        return block_forward(
            self.config, self.ops, attend, self.weights(), residual, branch, cos, sin
        )


class Embedding(nn.Embedding):
    """Token embedding, normalised at once."""

    def __init__(self, config: GPTConfig, ops: Operators) -> None:
        super().__init__(config.vocab_size, config.n_embd)
        self.config, self.ops = config, ops

    def forward(self, input: Tensor) -> Tensor:
        return self.ops.rms_norm(self.ops.embedding(input, self.weight), eps=self.config.norm_eps)


class Head(nn.Module):
    """Last add + norm, projection onto the vocabulary, softcap; with targets, the loss.

    The loss lives here so that FSDP2 gathers the weight for the fused operator and reduces its
    gradient once.
    """

    def __init__(self, config: GPTConfig, ops: Operators) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.n_embd))

    def forward(
        self,
        residual: Tensor,
        branch: Tensor,
        targets: Tensor | None = None,
        reduction: str = "sum",
        weights: Tensor | None = None,
    ) -> Tensor:
        """Without targets: fp32 logits (B, T, V). With targets (B, T) int64, -1 ignored: the loss
        in nats, fp32: its sum, of each token's times its weight if there are weights (B, T) fp32;
        or (B, T) values with reduction="none" (no gradient)."""
        config, ops = self.config, self.ops
        _, x = ops.add_rms_norm(residual, branch, eps=config.norm_eps)
        if targets is None:
            logits = F.linear(x, self.weight).float()
            return config.softcap * torch.tanh(logits / config.softcap)
        loss = ops.linear_cross_entropy(
            x.flatten(0, 1),
            self.weight,
            targets.flatten(),
            softcap=config.softcap,
            reduction=reduction,
            weights=None if weights is None else weights.flatten(),
        )
        return loss.view_as(targets) if reduction == "none" else loss


class _Zeros(torch.autograd.Function):
    """Zeros like x that take a gradient if x does, and drop it: a leaf would keep a copy of it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> None:
        return None


class GPT(nn.Module):
    """kernels: "triton" or "reference"; attention_backend: a name of gptfast.attention."""

    # Buffers: see rotary_table.
    cos: Tensor
    sin: Tensor

    def __init__(
        self, config: GPTConfig, *, kernels: str = "reference", attention_backend: str = "math"
    ) -> None:
        super().__init__()
        self.config = config
        ops = operators(kernels)
        self.transformer = nn.ModuleDict(
            {
                "wte": Embedding(config, ops),
                "h": nn.ModuleList(
                    Block(config, ops, attention_backend) for _ in range(config.n_layer)
                ),
            }
        )
        self.lm_head = Head(config, ops)
        for name in ("cos", "sin"):
            shape = (CONTEXT_FACTOR * config.sequence_len, config.head_dim // 2)
            self.register_buffer(name, torch.empty(shape, dtype=torch.float32), persistent=False)

    @property
    def blocks(self) -> Sequence[Block]:
        # pyrefly: ignore[bad-return]  (a ModuleList of blocks, which torch does not type as one)
        return self.transformer["h"]

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        reduction: str = "sum",
        *,
        weights: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """ids (B, T) integers; see Head.forward for targets, weights and what comes back.

        documents: the B T tokens in order are these sequences; each is computed as if it were
        alone in a row.
        """
        B, T = ids.shape
        longest = T if documents is None else documents.longest
        if len(self.cos) < longest:
            raise ValueError(f"{longest} positions, but the rotary table holds {len(self.cos)}")
        if documents is None:
            cos, sin = self.cos[:T], self.sin[:T]
        else:
            # One row of all tokens, each with the angles of its position in its document.
            ids = ids.reshape(1, B * T)
            positions = documents.positions(B * T)
            cos, sin = self.cos[positions], self.sin[positions]
        residual = self.transformer["wte"](ids)
        # So the first block is the same compiled code as every other; reading zeros is 0.01 % of a
        # d20 step's bytes.
        branch = _Zeros.apply(residual)
        for block in self.blocks:
            residual, branch = block(residual, branch, cos, sin, documents)
        residual, branch = (x.view(B, T, -1) for x in (residual, branch))
        return self.lm_head(residual, branch, targets, reduction, weights)

    def initial_values(
        self, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter or buffer, its whole initial value in fp32), one after the other.

        As the reference's: matrices N(0, std) with std = min(1, sqrt(fan_out / fan_in)) /
        sqrt(fan_in), embedding N(0, 1), head and both output projections of every block zero.
        Values are made whole, so that they do not depend on how a parameter is sharded.
        """
        device = self.cos.device
        for name, parameter in self.named_parameters():
            value = torch.zeros(parameter.shape, device=device)
            if name.endswith("wte.weight"):
                value.normal_(generator=generator)
            elif not name.endswith(("lm_head.weight", "c_proj.weight")):
                fan_out, fan_in = parameter.shape
                std = fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5)
                value.normal_(std=std, generator=generator)
            yield parameter, value
        yield from zip((self.cos, self.sin), rotary_table(self.config, device), strict=True)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill a plain (unsharded) model with `initial_values`."""
        for tensor, value in self.initial_values(generator):
            tensor.copy_(value)

    def cast_parameters(self, dtype: torch.dtype) -> None:
        """Give the parameters another dtype; the rotary table stays fp32."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)

    def matrices(self) -> dict[str, nn.Parameter]:
        """Every parameter of the blocks: those that Muon trains."""
        return {f"transformer.h.{n}": p for n, p in self.transformer["h"].named_parameters()}


def rotary_table(config: GPTConfig, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 (CONTEXT_FACTOR * sequence_len, head_dim / 2)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequencies = config.rope_base ** (-half / config.head_dim)
    positions = torch.arange(CONTEXT_FACTOR * config.sequence_len, device=device)
    angles = torch.outer(positions.float(), frequencies)
    return angles.cos(), angles.sin()


def parameter_counts(config: GPTConfig) -> dict[str, int]:
    """Parameters by part (d20 with 65,536 tokens: 560,988,160 in all)."""
    C, KV = config.n_embd, config.n_kv_head * config.head_dim
    return {
        "embedding": config.vocab_size * C,
        "blocks": config.n_layer * (2 * C * C + 2 * C * KV + 8 * C * C),
        "head": config.vocab_size * C,
    }


def flops_per_token(
    config: GPTConfig, *, causal: bool = False, context: float | None = None
) -> int:
    """FLOPs of forward and backward for one token: the only formula there is.

    6 for every parameter but the embedding's, and 12 L H D T for attention's products. The
    report's formula counts the whole T x T square (d20: 3,491,758,080); causal=True counts the
    half that a causal kernel must compute. context: T, if it is not sequence_len; for packed
    documents the mean over tokens of their document's length.
    """
    counts = parameter_counts(config)
    T = config.sequence_len if context is None else context
    square = int(12 * config.n_layer * config.n_head * config.head_dim * T)
    return 6 * (counts["blocks"] + counts["head"]) + (square // 2 if causal else square)


@torch.no_grad()
def generate(
    model: GPT,
    ids: list[int],
    max_tokens: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[int]:
    """The plainest sampler there is: one whole forward a token, no cache. It is the oracle of
    faster ones, and good enough for a few short samples. Returns prompt and continuation."""
    ids = list(ids)
    for _ in range(max_tokens):
        window = torch.tensor([ids[-model.config.sequence_len :]], device=model.cos.device)
        logits = model(window)[0, -1]
        if temperature == 0.0:
            ids.append(int(logits.argmax()))
        else:
            probabilities = torch.softmax(logits / temperature, dim=-1)
            ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return ids

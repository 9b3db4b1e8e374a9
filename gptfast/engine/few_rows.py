"""A decoding step of few rows by hand-written kernels: five a layer, and the head's.

What `gptfast.model.block_forward` computes between two products is part of one of them, or of
attention:

    add + norm + qkv    attention    projection    add + norm + fc + squared ReLU    projection

For so few rows a step is limited by reading the weights; kernels that follow each other so closely
that memory never rests need programmatic dependent launch (kernels/few_rows.py).
"""

import torch
from torch import Tensor

from gptfast.engine.kv_cache import KVCache
from gptfast.model import GPT, BlockWeights, GPTConfig
from kernels.cached_attention import (
    HEAD_DIMS,
    AttentionScratch,
    attend_to_cache,
    check_attention,
)
from kernels.few_rows import (
    CONFIGS,
    MAX_ROWS,
    check_few_rows,
    few_rows_product,
    product_config,
    supports_pdl,
)


class FewRowsStep:
    """Decoding steps of one number of rows, and the tensors that their kernels hand on.

    Those are overwritten by every step; a CUDA graph may be captured of one, as they stay where
    they are. Steps take turns on one stream.

    Args:
        model, weights: the weights are read where they are, and may change in place.
        rows: 1 to MAX_ROWS.
        configs: launch rules by product, other than kernels.few_rows.product_config's.
        pdl: programmatic dependent launch; None: where the GPU can.

    ValueError if the kernels do not take the model (`supports`).
    """

    def __init__(
        self,
        model: GPT,
        weights: list[BlockWeights],
        rows: int,
        *,
        configs: dict[str, dict[str, int]] | None = None,
        pdl: bool | None = None,
    ) -> None:
        config, head = model.config, model.lm_head.weight.detach()
        check_attention(config.n_head, config.n_kv_head, config.head_dim)
        for block in weights:
            check_few_rows(rows, **block._asdict())
        check_few_rows(rows, head=head)
        self.config, self.weights, self.head = config, weights, head
        self.embedding, self.cos, self.sin = model.transformer["wte"], model.cos, model.sin
        self.configs = {name: product_config(name, rows) for name in CONFIGS} | (configs or {})
        self.pdl = supports_pdl(head.device) if pdl is None else pdl

        def scratch(columns: int) -> Tensor:
            return head.new_empty(rows, columns)

        C = config.n_embd
        # Two, as no kernel may overwrite the residual that it reads.
        self._residuals = scratch(C), scratch(C)
        self._branch, self._attended = scratch(C), scratch(C)
        self._qkv, self._hidden = (
            scratch(len(matrix)) for matrix in (weights[0].qkv, weights[0].mlp_fc)
        )
        self._attention = AttentionScratch(rows, config.n_head, config.head_dim, head.device)

    def __call__(self, cache: KVCache, ids: Tensor, positions: Tensor, length: int) -> Tensor:
        """As `CachedGPT.decode`: ids and positions (B,) int64 -> fp32 logits (B, V)."""
        config, branch, hidden = self.config, self._branch, self._hidden
        residual, other = self._residuals
        embedded = self.embedding(ids)
        for i, weights in enumerate(self.weights):
            # The first adds nothing.
            terms = (embedded, None) if i == 0 else (residual, branch)
            self._normed("qkv", *terms, other, weights.qkv, self._qkv, first=i == 0)
            attend_to_cache(
                *(self._qkv, self.cos, self.sin, positions, *cache.layer(i, len(ids), length)),
                *(self._attended, self._attention),
                n_head=config.n_head,
                pdl=self.pdl,
                eps=config.norm_eps,
            )
            self._product("attn_proj", self._attended, weights.attn_proj, branch)
            self._normed(
                *("mlp_fc", other, branch, residual, weights.mlp_fc, hidden),
                activation="squared_relu",
            )
            self._product("mlp_proj", hidden, weights.mlp_proj, branch)
        logits = torch.empty(len(ids), config.vocab_size, device=ids.device)
        self._normed(
            *("head", residual, branch, other, self.head, logits),
            activation="softcap",
            softcap=config.softcap,
        )
        return logits

    def _product(self, name: str, x: Tensor, weight: Tensor, out: Tensor, **options) -> None:
        config = self.configs[name]
        few_rows_product(x, weight, out, config=config, pdl=self.pdl, **options)

    def _normed(
        self,
        name: str,
        residual: Tensor,
        branch: Tensor | None,
        total: Tensor,
        weight: Tensor,
        out: Tensor,
        **options,
    ) -> None:
        options |= {"branch": branch, "total": total, "eps": self.config.norm_eps}
        self._product(name, residual, weight, out, **options)


def supports(config: GPTConfig, rows: int) -> bool:
    """Whether there is a FewRowsStep for such a model and so many rows."""
    # A width of heads is a multiple of 16 then, too.
    return rows <= MAX_ROWS and config.head_dim in HEAD_DIMS

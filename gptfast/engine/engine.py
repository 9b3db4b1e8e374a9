"""Generation with a KV cache and the calculator: what recipes, evaluation and the server call.

    engine = Engine(model, tokenizer)
    sequences, masks = engine.generate_batch(prompts, max_tokens=256, temperature=0)

The loop is in gptfast/engine/generation.py, the model's part in gptfast/engine/cached_model.py.
"""

import codecs
from collections.abc import Generator, Iterable, Sequence
from functools import partial

import torch

from gptfast.engine.cached_model import INDUCTOR, CachedGPT
from gptfast.engine.calculator import calculate
from gptfast.engine.generation import Generation, Request, Token, Workspace
from gptfast.engine.graphs import GraphedDecode, GraphedPrefill
from gptfast.engine.sampling import Sampling
from gptfast.engine.tool_use import Tool
from gptfast.errors import UserError
from gptfast.model import GPT
from gptfast.tokenizer import BOS, Tokenizer

# Each of these ends a sequence unless told otherwise.
STOP_TOKENS = (BOS, "<|assistant_end|>")
# The most tokens of a prefill: what bounds its memory.
PREFILL_TOKENS = 16_384
# Steps between two prefills. A prefill's kernels are launched one by one and take as long as many
# steps that are graphs, but hardly longer than one that is not.
PATIENCE = 32
PATIENCE_OF_EAGER_STEPS = 4
# Of the cache, a CUDA graph reads a multiple of this: fewer graphs, or fewer positions for nothing.
READ_CHUNK = 128


class Engine:
    """Generates with a plain model (not sharded, not compiled), where that model is.

    Args:
        model, tokenizer: of one vocabulary. The parameters may change in place between calls.
        max_rows: how many sequences are decoded together; more of them wait for a free slot.
        compiled: decoding through Inductor and CUDA graphs; None: on a GPU. Compiled once
            for every number of rows (powers of two), so False is better for a few short samples.

    Several generations may be open at once; each has a cache of its own. `generate` and what is
    made of it run a number of sequences to their ends; with `open` they come and go.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, *, max_rows: int = 64, compiled: bool | None = None
    ) -> None:
        if tokenizer.vocab_size != model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model "
                f"{model.config.vocab_size}: they do not belong together"
            )
        if max_rows < 1:
            raise UserError(f"max_rows must be at least 1, got {max_rows}")
        self.tokenizer, self.max_rows = tokenizer, max_rows
        self.device = model.lm_head.weight.device
        on_gpu = self.device.type == "cuda"
        self.compiled = on_gpu if compiled is None else compiled
        if self.compiled and not on_gpu:
            raise UserError(f"compiled decoding needs a CUDA GPU; the model is on {self.device}")
        self.model = CachedGPT(
            model, compile=INDUCTOR if self.compiled else None, few_rows=self.compiled
        )
        self.context = self.model.context
        # How many steps may be on their way when the host reads the first of them.
        self.lag = 1 if on_gpu else 0
        self.patience = PATIENCE if self.compiled else PATIENCE_OF_EAGER_STEPS
        self.prefill_tokens = PREFILL_TOKENS
        self._idle: Workspace | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        num_samples: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seeds: Sequence[int] | None = None,
        stop: Iterable[int] | None = None,
        tool: Tool | None = calculate,
    ) -> Generator[list[Token], None, None]:
        """Continue every prompt `num_samples` times; yields new tokens as they become known.

        Sequence i is sample i % num_samples of prompt i // num_samples. It ends with a stop token,
        which is yielded, or after max_tokens, the tool's included.

        Args:
            temperature, top_k, top_p: see gptfast.engine.sampling.Sampling.
            seeds: one for each sequence; what is drawn depends on nothing else. None: from torch's
                generator, so that torch.manual_seed repeats it.
            stop: ids of the tokens that end a sequence; None: those of STOP_TOKENS.
            tool: called with the text between python_start and python_end; None: the model may
                write them, and nothing happens.

        UserError for what cannot be done, at once.
        """
        sampling = Sampling(temperature, top_k, top_p)
        self._check(prompts, num_samples, max_tokens)
        count = len(prompts) * num_samples
        if seeds is None:
            seeds = torch.randint(2**63 - 1, (count,)).tolist()
        if len(seeds) != count:
            raise UserError(f"{len(seeds)} seeds for {count} sequences")
        stop = self.stop_ids(stop)
        requests = [
            Request(prompts[index // num_samples], max_tokens, sampling, seed, stop, tool)
            for index, seed in enumerate(seeds)
        ]
        return self._generate(requests)

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], *, stop: Iterable[int] | None = None, **options
    ) -> tuple[list[list[int]], list[list[int]]]:
        """`generate` to the end: (sequences, masks), prompts included and stop tokens left out.

        The mask is 1 where a token was sampled, 0 in the prompt and where the tool forced it.
        """
        stop = self.stop_ids(stop)
        steps = self.generate(prompts, stop=stop, **options)
        num_samples = options.get("num_samples", 1)
        sequences = [list(prompt) for prompt in prompts for _ in range(num_samples)]
        masks = [[0] * len(prompt) for prompt in sequences]
        for token in (token for tokens in steps for token in tokens):
            if not (token.sampled and token.id in stop):
                sequences[token.sequence].append(token.id)
                masks[token.sequence].append(int(token.sampled))
        return sequences, masks

    def stop_ids(self, stop: Iterable[int] | None = None) -> frozenset[int]:
        """These, or those of STOP_TOKENS."""
        return frozenset(map(self.tokenizer.special_id, STOP_TOKENS) if stop is None else stop)

    def _check(self, prompts: Sequence[Sequence[int]], num_samples: int, max_tokens: int) -> None:
        for name, value in (("num_samples", num_samples), ("max_tokens", max_tokens)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        vocab_size = self.model.config.vocab_size
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {i} is empty; it needs one token at least, such as {BOS}")
            if min(prompt) < 0 or max(prompt) >= vocab_size:
                raise UserError(f"prompt {i} has ids outside of 0 to {vocab_size - 1}")
            if len(prompt) + max_tokens > self.context:
                raise UserError(
                    f"prompt {i} has {len(prompt)} tokens, which with max_tokens {max_tokens} "
                    f"exceeds the context of {self.context} positions: it leaves room for "
                    f"{max(0, self.context - len(prompt))}"
                )

    def _generate(self, requests: list[Request]) -> Generator[list[Token], None, None]:
        if not requests:
            return
        slots = min(len(requests), self.max_rows)
        length = max(len(request.prompt) + request.max_tokens for request in requests)
        if self.compiled:
            # Each number of rows is a compilation: powers of two.
            slots = min(1 << (slots - 1).bit_length(), self.max_rows)
        generation = self.open(slots, length)
        try:
            for index, request in enumerate(requests):
                generation.add(index, request)
            while generation.busy:
                if tokens := generation.step():
                    yield tokens
        finally:
            self._idle = generation.workspace

    def open(self, slots: int, length: int) -> Generation:
        """A generation that requests may join and leave, `slots` at a time, each of at most
        `length` tokens, its prompt included. UserError if there is no room for that.

        The weights are taken as they are now.
        """
        self.model.refresh()
        return Generation(
            self._take_workspace(slots, length),
            self.tokenizer,
            slots=slots,
            lag=self.lag,
            patience=self.patience,
            prefill_tokens=self.prefill_tokens,
        )

    def _take_workspace(self, slots: int, length: int) -> Workspace:
        """The last one if it will do. Its cache is never resized: what can be needed is
        known and reserved before the loop, and in there only how much of it is read grows."""
        idle, self._idle = self._idle, None
        if idle is not None and idle.cache.rows == slots and idle.cache.length >= length:
            return idle
        # Gone before the next one is reserved.
        del idle
        if not self.compiled:
            cache = self.model.new_cache(slots, length)
            return Workspace(
                *(self.model, cache, partial(self.model.prefill, cache)),
                *(partial(self.model.step, cache), _nothing),
                read_chunk=1,
                all_rows=False,
            )
        cache = self.model.new_cache(slots, length + -length % READ_CHUNK)
        prefill, decode = GraphedPrefill(self.model, cache), GraphedDecode(self.model, cache)
        return Workspace(
            *(self.model, cache, prefill, decode, prefill.capture),
            read_chunk=READ_CHUNK,
            all_rows=True,
        )


def _nothing() -> None:
    """Nothing has to be captured."""


class TextStream:
    """Tokens in, text out; bytes of a character that is not complete are kept back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def close(self) -> str:
        """What was kept back: U+FFFD if a character never became complete."""
        return self._decoder.decode(b"", final=True)

"""``MACTransformer``: the original's calls on a ``titans`` model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titans.layers.neural_memory import NeuralMemory
from titans.models import ModelState, build_model
from titans.models.generation import sample
from titans.names import check_kind
from titans_miras.config import TransformerConfig


def min_p_filter(logits: Tensor, min_p: float = 0.1) -> Tensor:
    """Rule out, in logits [B, V], every token less than ``min_p`` times as likely as the likeliest (2407.01082)."""
    chances = logits.softmax(-1)
    return logits.masked_fill(chances < min_p * chances.amax(-1, keepdim=True), float("-inf"))


def _check_embedding(embedding: Any, config: TransformerConfig) -> None:
    if not isinstance(embedding, nn.Module):
        raise ValueError(f"token_emb must be a module, got {type(embedding).__name__}")
    wanted = [config.num_tokens, config.dim]
    if isinstance(embedding, nn.Embedding) and list(embedding.weight.shape) != wanted:
        raise ValueError(f"token_emb must have [num_tokens, dim] = {wanted}, got {list(embedding.weight.shape)}")


class MACTransformer(nn.Module):
    """Memory as Context under the names of python-titans-miras.

    Args:
        config: checked again here, in case it was changed since it was made.
        token_emb: embedding [B, T] -> [B, T, dim] to use instead of a new one.
        neural_memory_model: refused; a memory network of one's own is a ``titans.miras.Network``.

    Attributes:
        model: the ``titans`` model that does the work, with ``generate``, ``stream``, ``save_pretrained``, state files.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        neural_memory_model: nn.Module | None = None,
        token_emb: nn.Module | None = None,
    ):
        super().__init__()
        if neural_memory_model is not None:
            raise ValueError("neural_memory_model is refused: in titans, derive the network from titans.miras.Network")
        check_kind("config", config, TransformerConfig, "a TransformerConfig")
        self.config = TransformerConfig.model_validate(config.model_dump())
        self.model = build_model(self.config.to_titans())
        if token_emb is not None:
            _check_embedding(token_emb, self.config)
            self.model.embedding = token_emb  # type: ignore[assignment]
        for module in self.modules():
            if isinstance(module, NeuralMemory):
                self._start(module)

    @torch.no_grad()
    def _start(self, memory: NeuralMemory) -> None:
        """Starting values that a ``TitansConfig`` cannot name."""
        for weight in memory.initial_weights:
            weight /= self.config.rule.temperature
        given = self.config.neural_mem
        gates = memory.gates.up  # rows [θ | η | α], one per head each
        biases = [given.init_adaptive_step_bias, given.init_momentum_bias, given.init_decay_bias]
        if not memory.miras.algorithm.momentum:
            del biases[1]
        for i, bias in enumerate(biases):
            if bias is not None:
                rows = slice(i * memory.n_heads, (i + 1) * memory.n_heads)
                gates.weight[rows] = 0
                gates.bias[rows] = bias

    def forward(
        self,
        x: Tensor,
        *,
        return_loss: bool = False,
        return_loss_breakdown: bool = False,
        disable_flex_attn: bool = False,
        cache: ModelState | None = None,
        return_cache: bool = False,
        factorized_pos_emb: None = None,
        state: ModelState | None = None,
        return_state: bool = False,
    ) -> Any:
        """Logits, or the loss of predicting each next token.

        Args:
            x: int64 [B, T]: the tokens after ``state``; with ``cache`` the whole text so far, as in the original.
            return_loss: mean cross entropy of x[:, 1:], in nats, instead of logits.
            return_loss_breakdown, factorized_pos_emb: refused unless left alone: the loss is one term, and positions
                are rotary.
            disable_flex_attn: either way: FlexAttention is not used.
            cache: what ``return_cache`` gave; only the tokens of x that it has not seen are read.
            return_cache, return_state: also return the state after x.
            state: what ``return_state`` gave. Any split of a text gives what one call gives.

        Returns:
            logits [B, T, V] of the tokens read, or the scalar loss; with the state, if asked for, as a pair.
        """
        if return_loss_breakdown:
            raise ValueError("return_loss_breakdown is refused: the loss is one term, return_loss gives it")
        if factorized_pos_emb is not None:
            raise ValueError("factorized_pos_emb is refused: positions are rotary, there is nothing to precompute")
        if cache is not None:
            if state is not None or return_loss:
                raise ValueError("cache goes neither with state nor with return_loss: give state and new tokens")
            if len(set(cache.seen)) > 1:
                raise ValueError(f"the rows of cache must stand at one place, got {cache.seen}: give state instead")
            if x.shape[1] <= max(cache.seen):
                raise ValueError(f"x must be longer than the {max(cache.seen)} tokens of cache, got {x.shape[1]}")
            x, state = x[:, max(cache.seen) :], cache
        out = self.model(x, labels=x if return_loss else None, state=state)
        result = out.loss if return_loss else out.logits
        return (result, out.state) if return_cache or return_state else result

    @torch.no_grad()
    def sample(
        self,
        prompt: Tensor,
        seq_len: int,
        temperature: float = 1.5,
        filter_fn: Callable[..., Tensor] = min_p_filter,
        filter_kwargs: dict[str, Any] | None = None,
        show_progress: bool = True,
        use_cache: bool = False,
    ) -> Tensor:
        """Continue ``prompt`` [B, P] up to ``seq_len`` tokens in all; returns the new ones, [B, seq_len - P].

        A step costs the same whatever came before, so ``use_cache`` changes nothing; no progress bar is drawn.
        """
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be a finite number of at least 0, got {temperature}")
        piece, state, tokens = prompt, None, [prompt[:, :0]]
        for _ in range(seq_len - prompt.shape[1]):
            out = self.model(piece, state=state, logits_to_keep=1)
            logits = filter_fn(out.logits[:, -1], **(filter_kwargs or {}))
            piece, state = sample(logits, temperature, None, None, None).unsqueeze(1), out.state
            tokens.append(piece)
        return torch.cat(tokens, 1)

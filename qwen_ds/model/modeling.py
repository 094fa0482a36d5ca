"""The original Qwen (v1) as a native transformers model: official parameter names, official numbers.

Shapes: B rows, T new tokens, K keys (cached and new), D hidden, H heads, W head width, F = W / 2 rotary frequencies,
V vocabulary. q, k and v are [B, H, T, W] inside attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from qwen_ds.model.cache import declare_prompt_lens, prompt_lens, row_lens
from qwen_ds.model.chat import ChatMixin
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.masking import Visibility, causal_mask, visibility
from qwen_ds.model.rotary import apply_rotary, logn_factors, ntk_alpha, rotary_tables


class RMSNorm(nn.Module):
    """x / rms(x), computed in fp32 and rounded to x's dtype, then times the weight in that dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # Without a weight rms_norm rounds once, after the division: the weight's product must come after the rounding.
        return F.rms_norm(x, (x.shape[-1],), None, self.eps) * self.weight


class ResidualLinear(nn.Linear):
    """A Linear that writes into the residual stream; a class of its own because fresh weights of these are smaller."""


class QWenAttention(nn.Module):
    """Causal self-attention. `c_attn` gives q, k and v side by side and alone has a bias."""

    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.kv_channels
        self.dropout = config.attn_dropout_prob
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = ResidualLinear(
            config.hidden_size, config.hidden_size, bias=not config.no_bias
        )

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        logn: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        cache: Cache | None,
    ) -> Tensor:
        rows, length, width = x_BTD.shape
        qkv = self.c_attn(x_BTD).view(rows, length, 3, self.num_heads, self.head_dim)
        qk, v = qkv.split((2, 1), dim=2)  # views, whose gradients are joined by one copy
        q, k = apply_rotary(qk, cos, sin).unbind(2)
        if logn is not None:
            q = q * logn
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.squeeze(2).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        dropout = self.dropout if self.training else 0.0
        if self.config._attn_implementation == "eager":
            out = eager_attention(q, k, v, mask, dropout)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, mask, dropout_p=dropout, is_causal=is_causal
            )
        return self.c_proj(out.transpose(1, 2).reshape(rows, length, width))


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention as plain matrix products (softmax in fp32), for machines where those beat SDPA's kernels."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    probs = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return (F.dropout(probs, dropout) if dropout else probs) @ v


class QWenMLP(nn.Module):
    """c_proj(w1(x) * silu(w2(x))); w1 and w2 are intermediate_size // 2 wide."""

    def __init__(self, config: QWenConfig):
        super().__init__()
        inner, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, inner, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=bias)
        self.c_proj = ResidualLinear(inner, config.hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.c_proj(self.w1(x_BTD) * F.silu(self.w2(x_BTD)))


class QWenBlock(nn.Module):
    """One layer. Its forward takes plain tensors and decides nothing by their values: it can be compiled by itself."""

    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        assert config.layer_norm_epsilon is not None
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        logn: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = True,
        cache: Cache | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD), cos, sin, logn, mask, is_causal, cache)
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class QWenPreTrainedModel(PreTrainedModel):
    """What loading, saving and initialisation need to know."""

    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # Tables and masks that early checkpoints stored.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"\.attn\.(bias|masked_bias)$"]
    config: QWenConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the official flags bf16, fp16 and fp32 choose the dtype where `dtype` is not given."""
        config = kwargs.get("config")
        flags = vars(config) if isinstance(config, QWenConfig) else kwargs
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            for flag, dtype in (
                ("bf16", torch.bfloat16),
                ("fp16", torch.float16),
                ("fp32", torch.float32),
            ):
                if flags.get(flag):
                    kwargs["dtype"] = dtype
        return super().from_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights: N(0, initializer_range), and 1/sqrt(2 * layers) of that for the two matrices of each layer
        that write into the residual stream, so that the stream's variance does not grow with depth."""
        std = self.config.initializer_range
        if isinstance(module, ResidualLinear):
            std /= math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)


class QWenModel(QWenPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        assert config.layer_norm_epsilon is not None
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(QWenBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.checkpoint_every = 1  # with gradient_checkpointing: recompute every n-th block
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        extend_context: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states of all tokens.

        Right-padded rows need no attention mask: their real tokens come out the same without one.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, past + T], 1 for real tokens; or [B, 1, T, K] bool or additive, used as it is.
            position_ids: int64 [B or 1, T]. Default: the index in the row, cache included, not counting padding to its
                left.
            past_key_values: any transformers Cache; a new one is made when use_cache is set.
            use_cache: default: the config's, and never in training mode.
            extend_context: whether dynamic NTK and LogN act on what lies beyond seq_length. Default: in eval mode
                only, as in the official code; False gives the training formula in eval mode.
        Returns:
            last_hidden_state [B, T, D] after ln_f; hidden_states, if asked for: the embeddings, then the output of
            each block, where ln_f's stands in for the last one's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        x_BTD = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values
        if cache is None and (
            use_cache if use_cache is not None else self.config.use_cache and not self.training
        ):
            cache = DynamicCache(config=self.config)
        length, past_len = x_BTD.shape[1], 0 if cache is None else cache.get_seq_length()
        num_keys = length if cache is None else cache.get_mask_sizes(length, 0)[0]
        seen = visibility(attention_mask, length, num_keys, past_len, x_BTD.device)
        tables = self._tables(
            x_BTD, attention_mask, position_ids, cache, past_len, num_keys, seen, extend_context
        )
        mask = seen.mask
        if seen.is_causal and self.config._attn_implementation == "eager":
            mask = causal_mask(length, length, 0, x_BTD.device)

        if self.training and self.config.emb_dropout_prob:
            x_BTD = F.dropout(x_BTD, self.config.emb_dropout_prob)
        states = [x_BTD] if output_hidden_states else []
        # A recomputed block would write into the cache a second time.
        recompute = self.gradient_checkpointing and self.training and cache is None
        for i, block in enumerate(self.h):
            args = (x_BTD, *tables, mask, seen.is_causal, cache)
            if recompute and i % self.checkpoint_every == 0:
                x_BTD = self._gradient_checkpointing_func(block.__call__, *args)
            else:
                x_BTD = block(*args)
            if output_hidden_states:
                states.append(x_BTD)
        x_BTD = self.ln_f(x_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            past_key_values=cache,
            hidden_states=(*states[:-1], x_BTD) if output_hidden_states else None,
        )

    def _tables(
        self,
        x_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        past_len: int | Tensor,
        num_keys: int,
        seen: Visibility,
        extend_context: bool | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Once per forward: cos and sin, fp32 [B or 1, T, 1, 1, F]; LogN factors [B or 1, T, 1, 1] or None."""
        config, (rows, length, _) = self.config, x_BTD.shape
        positions_BT = position_ids
        if positions_BT is None:
            positions_BT = (torch.arange(length, device=x_BTD.device) + past_len).unsqueeze(0)
            if seen.left_pads_B is not None:
                positions_BT = (positions_BT - seen.left_pads_B.unsqueeze(-1)).clamp(min=0)
        extend = not self.training if extend_context is None else extend_context
        assert config.seq_length is not None
        alpha_B = None
        if extend and config.use_dynamic_ntk:
            mask_BT = (
                attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
            )
            lens = row_lens(mask_BT, num_keys, config.seq_length)
            if cache is not None:
                lens = prompt_lens(cache, past_len, lens, rows)
            if isinstance(lens, Tensor) or lens > config.seq_length:
                alpha_B = ntk_alpha(
                    torch.as_tensor(lens, device=x_BTD.device).view(-1), config.seq_length
                )
        cos, sin = rotary_tables(positions_BT, config.kv_channels, config.rotary_emb_base, alpha_B)
        logn = None
        # Positions that the caller chose may exceed seq_length however short the row is.
        if (
            extend
            and config.use_logn_attn
            and (position_ids is not None or num_keys > config.seq_length)
        ):
            logn = logn_factors(positions_BT, config.seq_length).to(x_BTD.dtype)[:, :, None, None]
        return cos[:, :, None, None], sin[:, :, None, None], logn


class QWenLMHeadModel(QWenPreTrainedModel, ChatMixin, GenerationMixin):
    """The decoder with its head, which is not tied to the embedding."""

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        extend_context: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] in the model's dtype, and the loss where labels are given. Arguments as in QWenModel, and:

        Args:
            labels: int64 [B, T], each under its own token, -100 where there is nothing to learn. The loss is the mean
                over the others of the cross entropy of the next token, in fp32 (the official code's is in the model's
                dtype); NaN if there are none.
            logits_to_keep: how many tokens from the end get logits (0: all), or their indices.
            token_type_ids: accepted because the official tokenizer makes them, and without effect, as there.

        Raises:
            ValueError: attention weights are asked for (they are never materialised).
        """
        if output_attentions:
            raise ValueError(
                "output_attentions is True; expected False: attention weights are not materialised"
            )
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            extend_context=extend_context,
            return_dict=True,
        )
        kept = (
            slice(-logits_to_keep, None)
            if isinstance(logits_to_keep, int) and logits_to_keep
            else logits_to_keep
        )
        hidden_BTD = outputs.last_hidden_state
        logits_BTV = self.lm_head(hidden_BTD if isinstance(kept, int) else hidden_BTD[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits_BTV[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Positions as forward makes them: only padding to the left is not counted (transformers counts out every zero
        of the mask, also those inside a row)."""
        mask_BT = model_kwargs.get("attention_mask")
        if mask_BT is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        index_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        return (index_T - mask_BT.int().argmax(-1, keepdim=True)).clamp(min=0)

    def _prefill(
        self,
        input_ids: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Alpha of dynamic NTK comes from the whole prompt, which the first of several chunks does not show."""
        cache, embeds = model_kwargs.get("past_key_values"), model_kwargs.get("inputs_embeds")
        if cache is not None and int(cache.get_seq_length()) == 0:
            length = (input_ids if embeds is None else embeds).shape[1]
            assert self.config.seq_length is not None
            declare_prompt_lens(
                cache, row_lens(model_kwargs.get("attention_mask"), length, self.config.seq_length)
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)  # type: ignore[misc]

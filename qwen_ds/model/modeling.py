"""The original Qwen (v1) as a transformers model, with the official parameter names and numbers.

Shapes: B rows, T new tokens, K keys (cached and new), D hidden, F rotary frequencies, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from qwen_ds.decode.kv import PackedCache
from qwen_ds.disk.weights import TORCH_DTYPES
from qwen_ds.model.attention import QWenAttention, ResidualLinear
from qwen_ds.model.cache import declare_prompt_lens, prompt_lens_of, row_lens
from qwen_ds.model.chat import ChatMixin
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.continuous import ContinuousGenerationMixin, TransformersPages
from qwen_ds.model.masking import Visibility, visibility
from qwen_ds.model.pieces import Pieced
from qwen_ds.model.rotary import logn_factors, ntk_alpha, rotary_tables
from qwen_ds.model.token_grid import TokenGrid, unflat


class RMSNorm(Pieced):
    """x / rms(x), computed in fp32 and rounded to x's dtype, then times the weight in it."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.pieces.here().norm(x, self.weight, self.eps)


class QWenMLP(Pieced):
    """c_proj(w1(x) * silu(w2(x))); w1 and w2 are intermediate_size // 2 wide."""

    def __init__(self, config: QWenConfig):
        super().__init__()
        inner, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, inner, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=bias)
        self.c_proj = ResidualLinear(inner, config.hidden_size, bias=bias)
        # Who computes the two maps of one x. An adapter on both computes them together.
        self.both = one_by_one

    def forward(self, x_BTD: Tensor) -> Tensor:
        up, gate = self.both(self.w1, self.w2, x_BTD)
        return self.c_proj(self.pieces.here().gated(up, gate))


def one_by_one(first: nn.Module, second: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps of one x."""
    return first(x), second(x)


class QWenBlock(nn.Module):
    """One layer. Its forward takes plain tensors and does not branch on their values, so it can be
    compiled by itself."""

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
        cache: Cache | PackedCache | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD), cos, sin, logn, mask, is_causal, cache)
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class QWenPreTrainedModel(PreTrainedModel):
    """Settings of loading and saving, and the initialisation of fresh weights."""

    config_class = QWenConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # Tables and masks that early checkpoints stored.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"\.attn\.(bias|masked_bias)$"]
    config: QWenConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does; the official flags bf16, fp16 and fp32 choose the dtype where
        `dtype` is not given."""
        config = kwargs.get("config")
        flags = vars(config) if isinstance(config, QWenConfig) else kwargs
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            for flag, name in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")):
                if flags.get(flag):
                    kwargs["dtype"] = TORCH_DTYPES[name]
        return super().from_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw fresh weights from N(0, initializer_range); the deviation of the two matrices of
        each layer that write into the residual stream is divided by sqrt(2 * layers), so that the
        stream's variance does not grow with depth (GPT-2, Radford et al. 2019)."""
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
        self.token_grid: TokenGrid | None = None
        """Where it is set, blocks get all tokens of a micro-batch as one row: for compiled training
        on a CPU with plain attention, which finds the rows by the length of the mask."""
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | PackedCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        extend_context: bool | None = None,
        prompt_lens: Tensor | int | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states of all tokens. Right-padded rows need no attention mask.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, past + T], 1 for real tokens; or as `visibility` takes it.
            position_ids: int64 [B or 1, T]. Default: the index in the row, cache included, not
                counting padding to its left.
            past_key_values: any transformers Cache; a new one is made if use_cache is set. A
                PackedCache makes the tokens of a row of its own rows: B is 1, position_ids are
                given, and prompt_lens are int64 [1, T], or an int up to seq_length for all.
            use_cache: default: the config's, but off in training mode.
            extend_context: whether dynamic NTK and LogN act beyond seq_length. Default: in eval
                mode only, as in the official code; False gives the training formula in eval mode.
            prompt_lens: tokens of each row's whole prompt, int64 [B] or one int for all rows; they
                decide alpha of dynamic NTK. The cache remembers them, and later forwards may not
                change them. Default: the cache's, else the rows' lengths in this forward. Needed
                beyond seq_length with a 4-D mask, which does not tell padding from causality, and
                for a prompt in chunks.
        Returns:
            last_hidden_state [B, T, D] after ln_f; hidden_states, if asked for: the embeddings and
            the output of each block, the last one after ln_f.

        Raises:
            ValueError: prompt_lens are needed and not given, or impossible.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        x_BTD = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        config, cache = self.config, past_key_values
        use_cache = config.use_cache and not self.training if use_cache is None else use_cache
        if cache is None and use_cache:
            cache = DynamicCache(config=config)
        (rows, length), device = x_BTD.shape[:2], x_BTD.device
        past_len = 0 if cache is None else cache.get_seq_length()
        num_keys = self._num_keys(cache, length)
        seen = Visibility(None, is_causal=False)
        if not isinstance(cache, PackedCache):
            is_sdpa = config._attn_implementation != "eager"
            seen = visibility(attention_mask, length, num_keys, past_len, device, is_sdpa)
        positions_BT = position_ids
        if positions_BT is None:
            positions_BT = seen.positions(length, past_len, device)
        extend = not self.training if extend_context is None else extend_context
        alpha_BT, seq_length = None, config.seq_length
        assert seq_length is not None
        if extend and config.use_dynamic_ntk:
            lens = prompt_lens
            if not isinstance(cache, PackedCache):
                new = (rows, length)
                lens = prompt_lens_of(cache, new, past_len, attention_mask, prompt_lens, seq_length)
            alpha_BT = self._alpha(lens, device)
        # Positions that the caller chose may exceed seq_length however short the row is.
        chosen = position_ids is not None and not isinstance(cache, PackedCache)
        is_long = extend and (chosen or num_keys > seq_length)
        cos, sin, logn = self._tables(positions_BT, alpha_BT, is_long, x_BTD.dtype)
        if self.training and config.emb_dropout_prob:
            x_BTD = F.dropout(x_BTD, config.emb_dropout_prob)
        states = [x_BTD] if output_hidden_states else None
        # One mask and one table for all rows, and nobody who looks at them in between.
        is_alike = attention_mask is None and seen.mask is not None and len(cos) == 1
        is_plain = cache is None and logn is None and states is None
        grid = self.token_grid if is_alike and is_plain else None
        if grid is not None:
            x_BTD = grid.flat(x_BTD)
            cos, sin = (table.repeat(1, rows, 1, 1, 1) for table in (cos, sin))
        x_BTD = self._blocks(x_BTD, cos, sin, logn, seen, cache, states)
        if grid is not None:
            x_BTD = unflat(x_BTD, rows, length)
        x_BTD = self.ln_f(x_BTD)
        hidden_states = None if states is None else (*states[:-1], x_BTD)
        return BaseModelOutputWithPast(
            x_BTD, None if isinstance(cache, PackedCache) else cache, hidden_states
        )

    def _blocks(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        logn: Tensor | None,
        seen: Visibility,
        cache: Cache | PackedCache | None,
        states: list[Tensor] | None,
    ) -> Tensor:
        """The output of the last block, before ln_f; `states` gets that of each block."""
        # A recomputed block would write into the cache a second time.
        recompute = self.gradient_checkpointing and self.training and cache is None
        for i, block in enumerate(self.h):
            args = (x_BTD, cos, sin, logn, seen.mask, seen.is_causal, cache)
            if recompute and i % self.checkpoint_every == 0:
                x_BTD = self._gradient_checkpointing_func(block.__call__, *args)
            else:
                x_BTD = block(*args)
            if states is not None:
                states.append(x_BTD)
        return x_BTD

    def _tables(
        self, positions_BT: Tensor, alpha_BT: Tensor | None, is_long: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cosines and sines, fp32 [B or 1, T, 1, 1, F], and where rows may be long LogN's factors,
        [B or 1, T, 1, 1] in `dtype`."""
        config = self.config
        angles = rotary_tables(positions_BT, config.kv_channels, config.rotary_emb_base, alpha_BT)
        cos, sin = (table[:, :, None, None] for table in angles)
        if not (is_long and config.use_logn_attn):
            return cos, sin, None
        assert config.seq_length is not None
        factors_BT = logn_factors(positions_BT, config.seq_length).to(dtype)
        return cos, sin, factors_BT[:, :, None, None]

    @staticmethod
    def _num_keys(cache: Cache | PackedCache | None, length: int) -> int:
        """Keys of the longest row, new ones included."""
        if isinstance(cache, PackedCache):
            return cache.num_keys
        return length if cache is None else cache.get_mask_sizes(length, 0)[0]

    def _alpha(self, lens: Tensor | int | None, device: torch.device) -> Tensor | None:
        """Alpha of dynamic NTK for prompts of so many tokens, int64 [B, 1 or T]; None where it is 1
        in every row."""
        seq_length = self.config.seq_length
        assert lens is not None and seq_length is not None, "packed rows come with prompt_lens"
        if not isinstance(lens, Tensor) and lens <= seq_length:
            return None
        lens_BT = torch.as_tensor(lens, device=device)
        return ntk_alpha(lens_BT if lens_BT.dim() == 2 else lens_BT.view(-1, 1), seq_length)


class QWenLMHeadModel(QWenPreTrainedModel, ChatMixin, ContinuousGenerationMixin):
    """The decoder with its head, which is not tied to the embedding."""

    # Without it HF's Trainer would take the further arguments of forward for the loss's.
    accepts_loss_kwargs = False

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | PackedCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        extend_context: bool | None = None,
        prompt_lens: Tensor | int | None = None,
        **pages: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] in the model's dtype, and the loss where labels are given.

        Args (the others, and the errors, as in QWenModel):
            labels: int64 [B, T], each at its own token, -100 where it is no target. The loss is
                the mean cross entropy of the targets, in fp32 (the official code's is in the
                model's dtype); NaN if there are none.
            logits_to_keep: how many tokens from the end get logits (0: all), or their indices.
            token_type_ids: without effect, as officially; the official tokenizer makes them.
            output_attentions: ValueError if true: attention weights are never materialised.
            pages: those of transformers' continuous batching, as it passes them.
        """
        if pages:
            past_key_values, prompt_lens = TransformersPages(attention_mask, pages), 0
        if output_attentions:
            came = "output_attentions is True; expected False"
            raise ValueError(f"{came}: attention weights are not materialised")
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            extend_context=extend_context,
            prompt_lens=prompt_lens,
            return_dict=True,
        )
        hidden_BTD = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden_BTD = hidden_BTD[:, logits_to_keep]
        elif logits_to_keep:
            hidden_BTD = hidden_BTD[:, -logits_to_keep:]
        logits_BTV = self.lm_head(hidden_BTD)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits_BTV[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutputWithPast(
            loss, logits_BTV, outputs.past_key_values, outputs.hidden_states
        )

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Positions as forward makes them: only padding to the left is not counted (transformers
        skips every zero of the mask, even one inside a row)."""
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
        """Tell the cache the prompts' lengths, which the first of several chunks does not show."""
        cache, embeds = model_kwargs.get("past_key_values"), model_kwargs.get("inputs_embeds")
        is_told = model_kwargs.get("prompt_lens") is not None
        if cache is not None and not is_told and int(cache.get_seq_length()) == 0:
            length = (input_ids if embeds is None else embeds).shape[1]
            assert self.config.seq_length is not None
            mask_BT = model_kwargs.get("attention_mask")
            declare_prompt_lens(cache, row_lens(mask_BT, length, self.config.seq_length))
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)  # type: ignore[misc]

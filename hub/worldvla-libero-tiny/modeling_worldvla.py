"""WorldVLA as a transformers model: Chameleon's decoder with the action mask, its image tokenizer, and the losses.

The model speaks tokens only. It holds all weights and never sees a unit, a camera name or a prompt string; what a
sequence looks like it asks of `tokens_worldvla`. The action mask lives in the backbone (trainers such as TRL's call the
backbone directly) and is a pure function of the full token ids: nothing is remembered between calls.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonDecoderLayer,
    ChameleonForConditionalGeneration,
    ChameleonImageVocabularyMapping,
    ChameleonModel,
    ChameleonPreTrainedModel,
    ChameleonRMSNorm,
    ChameleonRotaryEmbedding,
    ChameleonSwinDecoderLayer,
)
from transformers.utils import cached_file

from .card_worldvla import write_model_card
from .configuration_worldvla import WorldVLAConfig
from .generation_worldvla import WorldVLAGenerationMixin
from .loss_worldvla import IGNORE_INDEX, LossDenominators, LossTerms, world_vla_loss
from .tokens_worldvla import WorldVLATokens
from .vqvae_worldvla import WorldVLAVQVAE

ADAPTER_FIELDS_FILE = "worldvla_adapter.json"  # beside an adapter's weights: config fields that its training changed


@dataclass
class WorldVLACausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` and the parts of the loss, for logging (detached scalars, world_loss without alpha)."""

    action_loss: torch.Tensor | None = None
    world_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None


class WorldVLADecoderLayer(ChameleonDecoderLayer):
    """Chameleon's layer with dropout on both residual branches, as the authors train it."""

    def __init__(self, config: WorldVLAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        output_attentions: bool | None = False,
        last_rows: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        """As Chameleon's; the last layer returns only `last_rows` positions when nobody reads the others."""
        attended, attention = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), output_attentions=output_attentions, **kwargs
        )
        hidden_states = hidden_states + self.dropout(attended)
        if last_rows is not None and self.self_attn.layer_idx == self.self_attn.config.num_hidden_layers - 1:
            hidden_states = hidden_states[:, -last_rows:]
        hidden_states = hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        return (hidden_states, attention) if output_attentions else (hidden_states,)


class WorldVLAPreTrainedModel(ChameleonPreTrainedModel):
    config: WorldVLAConfig
    config_class = WorldVLAConfig
    _no_split_modules = ["WorldVLADecoderLayer", "ChameleonSwinDecoderLayer", "WorldVLAVQVAE"]
    _keep_in_fp32_modules_strict = ["vqmodel"]
    _can_record_outputs = {
        **ChameleonPreTrainedModel._can_record_outputs,
        "hidden_states": [WorldVLADecoderLayer, ChameleonSwinDecoderLayer],
    }


class WorldVLAModel(WorldVLAPreTrainedModel, ChameleonModel):
    """The decoder and the image tokenizer, without a head."""

    def __init__(self, config: WorldVLAConfig):
        super(ChameleonModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.tokens = WorldVLATokens.from_vocabulary(config.vocabulary_map)
        self.vocabulary_mapping = ChameleonImageVocabularyMapping(config.vocabulary_map)

        layer_class = ChameleonSwinDecoderLayer if config.swin_norm else WorldVLADecoderLayer
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([layer_class(config, index) for index in range(config.num_hidden_layers)])
        self.norm = ChameleonRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.vqmodel = WorldVLAVQVAE._from_config(config.vq_config)
        self.rotary_emb = ChameleonRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    # ---------------------------------------------------------------- pictures and tokens

    @torch.no_grad()
    def tokenize_images(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Pixels (n, 3, H, W) in [-1, 1] -> token ids of their codes (n, H/16, W/16), row by row."""
        codes = self.vqmodel.encode_codes(pixel_values.to(self.vqmodel.device))
        return torch.tensor(self.tokens.image_codes, device=codes.device)[codes]

    @torch.no_grad()
    def detokenize_images(self, ids: torch.LongTensor) -> torch.Tensor:
        """Token ids of codes (n, h, w), or whole image blocks (n, block length) -> pixels (n, 3, 16h, 16w) in [-1, 1].

        Raises ValueError for ids that are no image codes.
        """
        if ids.ndim == 2:
            blocks = [self.tokens.parse_image_block(block) for block in ids.tolist()]
            ids = torch.stack([torch.from_numpy(block) for block in blocks])
        ids = ids.to(self.vqmodel.device)
        known, order = torch.tensor(self.tokens.image_codes, device=ids.device).sort()  # ids, and the code of each
        slots = torch.searchsorted(known, ids.contiguous()).clamp(max=len(known) - 1)
        if wrong := int((known[slots] != ids).sum()):
            raise ValueError(f"{wrong} of {ids.numel()} ids are no image codes: pass code ids (n, h, w)")
        return self.vqmodel.decode_codes(order[slots])

    @torch.no_grad()
    def fill_image_tokens(
        self, input_ids: torch.LongTensor, pixel_values: torch.Tensor
    ) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """Replace the placeholders of (batch, length) ids by the codes of the pictures; also returns where they were.

        `pixel_values` (n, 3, H, W) holds the pictures in order of appearance. Each is cropped to the size that its grid
        tokens announce, so that pictures of different sizes share one tensor. Raises ValueError when the counts differ.
        """
        tokens = self.tokens
        placeholders = input_ids == tokens.image_placeholder
        # an image whose codes are pixels: <boi> grid_h grid_w <placeholder>
        starts = (input_ids[:, :-3] == tokens.image_start) & placeholders[:, 3:]
        rows, columns = starts.nonzero(as_tuple=True)
        sizes = torch.stack([input_ids[rows, columns + 1], input_ids[rows, columns + 2]], dim=-1).tolist()
        if len(sizes) != len(pixel_values):
            raise ValueError(
                f"{len(pixel_values)} pictures for {len(sizes)} image blocks with placeholders: "
                "pass input_ids and pixel_values of one processor call"
            )
        shapes = [(tokens.grid_codes(height), tokens.grid_codes(width)) for height, width in sizes]
        codes: list[torch.Tensor] = [torch.empty(0)] * len(shapes)
        for height, width in sorted(set(shapes)):
            members = [index for index, shape in enumerate(shapes) if shape == (height, width)]
            pixels = pixel_values[members][:, :, : height * self.vqmodel.stride, : width * self.vqmodel.stride]
            if pixels.shape[-2:] != (height * self.vqmodel.stride, width * self.vqmodel.stride):
                raise ValueError(
                    f"a picture of {tuple(pixels.shape[-2:])} pixels does not fill its block of {height}x{width} codes"
                )
            for index, ids in zip(members, self.tokenize_images(pixels), strict=True):
                codes[index] = ids.flatten()
        if codes:
            input_ids = input_ids.masked_scatter(placeholders, torch.cat(codes).to(input_ids))
        return input_ids, placeholders

    # ---------------------------------------------------------------- forward

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        action_block_ids: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Chameleon's forward under the action mask.

        Args:
            input_ids: (batch, length), placeholders where `pixel_values` belong.
            attention_mask: (batch, cached + length), 0 on padding; or a ready 4-D mask (under flex a BlockMask), which
                is used as it is.
            action_block_ids: (batch, cached + length) of the *whole* history. Needed with a filled cache, whose ids the
                model cannot see; derived from `input_ids` otherwise.
            seq_idx: (batch, length) number of the packed segment of each token; segments do not see one another.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids that say where the pictures stand")
            input_ids, _ = self.fill_image_tokens(input_ids, pixel_values)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = self._positions(inputs_embeds, attention_mask, seq_idx, cached)
        if attention_mask is None or getattr(attention_mask, "ndim", 4) == 2:
            attention_mask = self._action_mask(
                input_ids, inputs_embeds, attention_mask, past_key_values, cached, action_block_ids, seq_idx
            )
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    @staticmethod
    def _positions(
        inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, seq_idx: torch.Tensor | None, cached: int
    ) -> torch.LongTensor:
        """Position of each token in its own sample, padding and earlier segments not counted: (batch or 1, length)."""
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        if seq_idx is not None:
            index = torch.arange(length, device=device).expand_as(seq_idx)
            is_first = torch.ones_like(seq_idx, dtype=torch.bool)
            is_first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
            return index - torch.where(is_first, index, 0).cummax(-1).values
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return torch.arange(cached, cached + length, device=device)[None]

    def _action_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        cached: int,
        action_block_ids: torch.LongTensor | None,
        seq_idx: torch.LongTensor | None,
    ) -> Any:
        """The mask in the form the attention implementation wants it; see `WorldVLATokens.action_block_ids`."""
        independent = self.config.action_attention == "independent"
        implementation = self.config._attn_implementation or "sdpa"
        if (independent or seq_idx is not None) and "flash" in implementation:
            raise ValueError(
                f"{implementation} cannot hide action blocks from one another: load the model with "
                'attn_implementation="sdpa" (or "eager", "flex_attention"), or set config.action_attention="causal"'
            )
        if implementation == "flex_attention" and past_key_values is not None and past_key_values.is_compileable:
            raise ValueError('flex_attention does not work with a static cache: use a DynamicCache or "sdpa"')
        if seq_idx is not None and cached:
            raise ValueError("packed segments (seq_idx) cannot be continued from a cache: pass them in one forward")
        if independent and action_block_ids is None:
            if cached or input_ids is None:
                raise ValueError(
                    "the model cannot see the ids behind a filled cache or behind inputs_embeds: pass "
                    "action_block_ids=model.action_block_ids(all_ids) for the whole history, or a 4-D attention_mask"
                )
            action_block_ids = self.tokens.action_block_ids(input_ids, seq_idx)

        arguments: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
        }
        if not independent and seq_idx is None:
            return create_causal_mask(**arguments)
        length = inputs_embeds.shape[1]
        total = past_key_values.get_mask_sizes(length, 0)[0] if past_key_values is not None else length
        blocks = None if action_block_ids is None else _pad_to(action_block_ids, total)
        segments = None if seq_idx is None else _pad_to(seq_idx, total)

        def visible(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
            allowed = query >= key
            if blocks is not None:
                query_block, key_block = blocks[batch, query], blocks[batch, key]
                allowed = allowed & ((query_block < 0) | (key_block < 0) | (query_block == key_block))
            if segments is not None:
                allowed = allowed & (segments[batch, query] == segments[batch, key])
            return allowed

        return create_causal_mask(**arguments, and_mask_function=visible)


def _pad_to(table: torch.Tensor, length: int) -> torch.Tensor:
    """Extend (batch, known) to (batch, length) with -1: a static cache has columns that nobody wrote yet."""
    missing = length - table.shape[-1]
    return nn.functional.pad(table, (0, missing), value=-1) if missing > 0 else table


class WorldVLAForCausalLM(
    WorldVLAPreTrainedModel, WorldVLAGenerationMixin, ChameleonForConditionalGeneration, GenerationMixin
):
    """WorldVLA: policy (`generate_actions`), world model (`generate_frames`, `imagine`) and their training losses."""

    # a plain Trainer divides by its accumulation steps; denominators over all of them are arguments of their own
    accepts_loss_kwargs = False
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: WorldVLAConfig):
        super(ChameleonForConditionalGeneration, self).__init__(config)
        self.model = WorldVLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def tokens(self) -> WorldVLATokens:
        """The grammar of this checkpoint's vocabulary."""
        return self.model.tokens

    def tokenize_images(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Pixels (n, 3, H, W) in [-1, 1] -> token ids of their codes (n, H/16, W/16)."""
        return self.model.tokenize_images(pixel_values)

    def detokenize_images(self, ids: torch.LongTensor) -> torch.Tensor:
        """Code ids (n, h, w) or image blocks (n, block length) -> pixels (n, 3, 16h, 16w) in [-1, 1]."""
        return self.model.detokenize_images(ids)

    def action_block_ids(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Number of the answer's action block that each token belongs to, -1 outside: (batch, length)."""
        return self.tokens.action_block_ids(input_ids)

    @torch.no_grad()
    def discretize(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        """The same batch with pictures turned into token ids in `input_ids` and `labels`, and no pixels."""
        if pixel_values is not None:
            input_ids, placeholders = self.model.fill_image_tokens(input_ids, pixel_values)
            if labels is not None:
                labels = torch.where(placeholders & (labels != IGNORE_INDEX), input_ids, labels)
        if labels is not None:
            inputs["labels"] = labels
        return {"input_ids": input_ids, **inputs}

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weights: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        action_block_ids: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        action_weight_sum: torch.Tensor | None = None,
        world_weight_sum: torch.Tensor | None = None,
        class_weight_sum: torch.Tensor | None = None,
        label_count: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> WorldVLACausalLMOutputWithPast:
        """Next-token logits, and with `labels` the loss that the config names.

        Args:
            labels: (batch, length), -100 where there is no loss; the model shifts them.
            loss_weights: (batch, length), weight of each label; 1 by default. alpha is applied by the model, not here.
            logits_to_keep: only the last so many positions get logits (0: all). With labels in training mode no logits
                are returned: they are computed at labelled positions only, a chunk at a time.
            action_weight_sum, world_weight_sum, class_weight_sum, label_count: denominators of the loss over all ranks
                and accumulation steps (see `loss_worldvla.LossDenominators`); those of this batch by default.

        The other arguments are those of `WorldVLAModel.forward`.
        """
        if pixel_values is not None and input_ids is not None:
            discrete = self.discretize(input_ids, pixel_values, labels)
            input_ids, labels, pixel_values = discrete["input_ids"], discrete.get("labels"), None
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            action_block_ids=action_block_ids,
            seq_idx=seq_idx,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = None
        if labels is None or not self.training:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep])
        terms = None
        if labels is not None:
            if input_ids is None:
                raise ValueError("the loss needs input_ids, which tell action labels from world-model labels")
            sums = (action_weight_sum, world_weight_sum, class_weight_sum, label_count)
            terms = self._loss(hidden_states, input_ids, labels, loss_weights, seq_idx, sums)
        return WorldVLACausalLMOutputWithPast(
            loss=terms.loss if terms else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            action_loss=terms.action.detach() if terms else None,
            world_loss=terms.world.detach() if terms else None,
            z_loss=terms.z.detach() if terms else None,
        )

    def _loss(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor,
        loss_weights: torch.Tensor | None,
        seq_idx: torch.LongTensor | None,
        sums: tuple[torch.Tensor | None, ...],
    ) -> LossTerms:
        labels = labels[:, 1:]
        rows = labels != IGNORE_INDEX  # (batch, length - 1)
        if loss_weights is None:
            loss_weights = torch.ones_like(input_ids, dtype=torch.float32)
        supplied = [value is not None for value in sums]
        if any(supplied) and not all(supplied):
            raise ValueError(
                "pass all of action_weight_sum, world_weight_sum, class_weight_sum and label_count, or none"
            )
        device = hidden_states.device
        return world_vla_loss(
            hidden_states[:, :-1][rows.to(device)],
            self.lm_head,
            labels[rows].to(device),
            loss_weights[:, 1:][rows].to(device),
            self.tokens.world_mask(input_ids, seq_idx)[:, 1:][rows].to(device),
            reduction=self.config.loss_reduction,
            world_classes=self.authors_world_classes,
            alpha=self.config.world_loss_weight,
            z_loss_weight=self.config.z_loss_weight,
            chunk_size=self.config.loss_chunk_size,
            denominators=LossDenominators(*sums) if all(supplied) else None,
        )

    @property
    def authors_world_classes(self) -> tuple[int, int]:
        """First and last class id that the `authors` reduction weighs with alpha: off by one, as in their code."""
        if self.config.authors_world_classes is not None:
            first, last = self.config.authors_world_classes
            return first, last
        return min(self.tokens.image_codes) - 1, max(self.tokens.image_codes) - 1

    # ---------------------------------------------------------------- transformers' generate()

    def _expand_inputs_for_generation(
        self, *args: Any, input_ids: torch.LongTensor | None = None, **kwargs: Any
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Pictures become token ids first: a row may hold several, so they cannot be repeated as rows are."""
        pixel_values = kwargs.pop("pixel_values", None)
        if pixel_values is not None and input_ids is not None:
            input_ids, _ = self.model.fill_image_tokens(input_ids, pixel_values)
        return super()._expand_inputs_for_generation(*args, input_ids=input_ids, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Adds what the backbone needs to know of the whole history: `input_ids` holds all of it here."""
        independent = self.config.action_attention == "independent"
        blocks = self.action_block_ids(input_ids) if independent and inputs_embeds is None else None
        static = past_key_values is not None and past_key_values.is_compileable
        if static and blocks is not None and (attention_mask is None or attention_mask.ndim == 2):
            length = input_ids.shape[1] if next_sequence_length is None else next_sequence_length
            # only its shape, dtype and device are read
            states = torch.empty((len(input_ids), length, 0), dtype=self.dtype, device=input_ids.device)
            cached = input_ids.shape[1] - length
            attention_mask = self.model._action_mask(
                input_ids, states, attention_mask, past_key_values, cached, blocks, None
            )
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if blocks is not None and not static:
            model_inputs["action_block_ids"] = blocks
        return model_inputs

    # ---------------------------------------------------------------- adapters, saving

    def load_adapter(self, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As every model's; also takes over the config fields that the adapter's training changed: a new robot's D."""
        result = super().load_adapter(peft_model_id, *args, **kwargs)
        if peft_model_id is not None:
            options = {"_raise_exceptions_for_missing_entries": False, **(kwargs.get("adapter_kwargs") or {})}
            if file := cached_file(peft_model_id, ADAPTER_FIELDS_FILE, **options):
                fields = json.loads(Path(file).read_text(encoding="utf-8"))["model_fields"]
                for name, value in fields.items():
                    setattr(self.config, name, value)
        return result

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """As every model's; also names this class for `AutoModel` and writes a model card where there is none."""
        reference = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        entries = {"AutoModel": reference, "AutoModelForCausalLM": reference}
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | entries
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_model_card(save_directory, self.config)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        if self.config.action_attention == "independent":
            raise ValueError(
                "continuous batching builds its own mask and would drop the action mask: "
                "use generate_actions, or generate() with a dynamic or static cache"
            )
        return super().init_continuous_batching(*args, **kwargs)


WorldVLAForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["WorldVLAForCausalLM", "WorldVLAModel", "WorldVLAPreTrainedModel", "WorldVLAVQVAE"]

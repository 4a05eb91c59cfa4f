"""Configuration of WorldVLA: Chameleon's fields, and those that make it an action world model."""

from typing import Any

from transformers.models.chameleon.configuration_chameleon import ChameleonConfig, ChameleonVQVAEConfig

from .tokens_worldvla import BOS, NUM_BINS, PAD, SEPARATOR, published_vocabulary

ATTENTIONS = ("independent", "causal")
REDUCTIONS = ("paper", "authors")
# sizes that no model has: a damaged file must not cost hours, nor all memory, before somebody sees that it is one
LARGEST = {
    "num_hidden_layers": 1000,
    "hidden_size": 2**17,
    "intermediate_size": 2**19,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "vocab_size": 2**22,
}
LARGEST_VQ = {
    "num_embeddings": 2**20,
    "embed_dim": 2**14,
    "latent_channels": 2**14,
    "base_channels": 2**12,
    "num_res_blocks": 100,
}


class WorldVLAVQVAEConfig(ChameleonVQVAEConfig):
    """Image tokenizer (VQ-GAN) sizes; the defaults are those of Chameleon's `vqgan.yaml`."""

    model_type = "worldvla_vqvae"
    base_config_key = "vq_config"

    def __post_init__(self, **kwargs: Any) -> None:
        _check_sizes(self, LARGEST_VQ)
        super().__post_init__(**kwargs)


def _check_sizes(config: Any, largest: dict[str, int]) -> None:
    """Raise ValueError for a size that is no whole number, not positive, or beyond any model."""
    for name, limit in largest.items():
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value <= limit:
            raise ValueError(f"{name} is a whole number from 1 to {limit}, not {value!r}")


class WorldVLAConfig(ChameleonConfig):
    """Chameleon decoder, image tokenizer and the fields of the action world model.

    Args:
        vocabulary_map: names and ids of the shared vocabulary; every special id is
            looked up in it by name. Defaults to the published ids.
        action_attention: `independent` hides the answer's action blocks from one
            another (paper Figure 3b, authors' `generate_att_mask_3`); `causal` is the ordinary mask (Figure 3a).
        action_bin_window: how `generate_actions` chooses without sampling. 0 answers the likeliest bin (the authors'
            decoding); w > 0 the expected bin within the likeliest range of 2 w + 1 bins, which suits models trained
            with jittered labels or on little data, whose single bins are noise.
        action_dim: D of the default embodiment, used when `generate_actions` is given none.
        num_cameras: pictures a time step (C), used for video prediction; a world prompt shows
            its C.
        dropout: residual dropout in training (authors' `modeling_chameleon.py`).
        loss_reduction: `paper` is L_action + alpha L_world with a mean each (equation
            4); `authors` is one class-weighted mean over all labelled tokens (their released training code).
        world_loss_weight: alpha.
        authors_world_classes: first and last class id that `authors` weighs with alpha.
            Defaults to the image codes shifted down by one, as in their code (3..8194 for the published ids).
        z_loss_weight: weight of the mean squared logsumexp over labelled tokens.
        loss_chunk_size: labelled rows whose logits are held at once in training.
        generator_version: version of this library that wrote the checkpoint.
    """

    model_type = "worldvla"
    keys_to_ignore_at_inference = ["past_key_values", "action_loss", "world_loss", "z_loss"]
    # the first name is read by transformers >= 5.20, the second by earlier ones
    sub_configs_defaults = {"vq_config": WorldVLAVQVAEConfig}
    sub_configs = {"vq_config": WorldVLAVQVAEConfig}

    action_attention: str = "independent"
    action_bin_window: int = 0
    action_dim: int | None = None
    num_cameras: int = 1
    dropout: float | int = 0.05
    loss_reduction: str = "paper"
    world_loss_weight: float | int = 0.04
    authors_world_classes: list[int] | tuple[int, ...] | None = None
    z_loss_weight: float | int = 1e-5
    loss_chunk_size: int = 512
    generator_version: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vocabulary_map is None:
            self.vocabulary_map = published_vocabulary()
        if self.vq_config is None:
            self.vq_config = WorldVLAVQVAEConfig()
        elif isinstance(self.vq_config, dict):
            fields = {key: value for key, value in self.vq_config.items() if key != "model_type"}
            self.vq_config = WorldVLAVQVAEConfig(**fields)
        _check_sizes(self, LARGEST)
        for name, legal in (("action_attention", ATTENTIONS), ("loss_reduction", REDUCTIONS)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} is one of {', '.join(legal)}, not {getattr(self, name)!r}")
        if type(self.action_bin_window) is not int or not 0 <= self.action_bin_window < NUM_BINS:
            raise ValueError(f"action_bin_window is a whole number from 0 to 255, not {self.action_bin_window!r}")
        # the published configs name other ids, which their sequences never use: the vocabulary decides
        self.bos_token_id = self.vocabulary_map.get(BOS)
        self.pad_token_id = self.vocabulary_map.get(PAD)
        self.eos_token_id = self.vocabulary_map.get(SEPARATOR)
        super().__post_init__(**kwargs)


WorldVLAConfig.register_for_auto_class()

__all__ = ["WorldVLAConfig", "WorldVLAVQVAEConfig"]

"""The configuration: ids from names, checked fields, and files that come back as they were written."""

import json

import pytest
from model_factory import compact_vocabulary, tiny_config
from transformers import AutoConfig, ChameleonConfig, PreTrainedConfig

from transformers_worldvla import WorldVLAConfig, WorldVLAVQVAEConfig


def test_defaults_are_the_published_model():
    config = WorldVLAConfig()
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 8710)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (65536, 4096, 32)
    assert config.vocabulary_map["<reserved10000>"] == 10004
    vq = config.vq_config
    assert isinstance(vq, WorldVLAVQVAEConfig)
    assert (vq.embed_dim, vq.num_embeddings, vq.base_channels, vq.resolution) == (256, 8192, 128, 512)
    assert list(vq.channel_multiplier) == [1, 1, 2, 2, 4]
    assert (config.action_attention, config.loss_reduction) == ("independent", "paper")
    assert (config.world_loss_weight, config.z_loss_weight, config.dropout) == (0.04, 1e-5, 0.05)
    assert config.action_dim is None and config.num_cameras == 1


def test_the_vocabulary_decides_over_ids_in_a_file():
    """The published config.json says bos 1 and eos 2, which no sequence of theirs uses."""
    config = WorldVLAConfig(bos_token_id=1, eos_token_id=2, pad_token_id=None)
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 8710)
    vocabulary = compact_vocabulary()
    config = tiny_config()
    assert config.bos_token_id == vocabulary["<s>"]
    assert config.pad_token_id == vocabulary["<pad>"]
    assert config.eos_token_id == vocabulary["<reserved08706>"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action_attention": "none"}, "action_attention is one of independent, causal, not 'none'"),
        ({"loss_reduction": "mean"}, "loss_reduction is one of paper, authors, not 'mean'"),
        ({"action_bin_window": -1}, "action_bin_window is a whole number from 0 to 255, not -1"),
        ({"action_bin_window": 2.0}, "action_bin_window is a whole number from 0 to 255, not 2.0"),
    ],
)
def test_unknown_choices(fields, message):
    with pytest.raises(ValueError, match=message):
        WorldVLAConfig(**fields)


def test_round_trip_through_a_folder(tmp_path):
    config = tiny_config(
        action_attention="causal",
        loss_reduction="authors",
        action_dim=7,
        num_cameras=2,
        world_loss_weight=1,
        authors_world_classes=(3, 34),
        z_loss_weight=0.0,
        loss_chunk_size=16,
        dropout=0.1,
    )
    config.save_pretrained(tmp_path)
    for loaded in (WorldVLAConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is WorldVLAConfig and type(loaded.vq_config) is WorldVLAVQVAEConfig
        expected, actual = config.to_dict(), loaded.to_dict()
        assert list(actual.pop("authors_world_classes")) == list(expected.pop("authors_world_classes")) == [3, 34]
        assert actual | {"_name_or_path": ""} == expected
        assert loaded.vocabulary_map == config.vocabulary_map
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "worldvla" and stored["vq_config"]["model_type"] == "worldvla_vqvae"


def test_fields_of_an_upstream_config_are_taken_over():
    """What a converter does with a stock Chameleon folder: its dict without the model type."""
    upstream = ChameleonConfig(vocabulary_map=compact_vocabulary(), hidden_size=64, swin_norm=True)
    fields = {name: value for name, value in upstream.to_dict().items() if name != "model_type"}
    config = WorldVLAConfig(**fields)
    assert config.model_type == "worldvla" and type(config.vq_config) is WorldVLAVQVAEConfig
    assert (config.hidden_size, config.swin_norm) == (64, True)
    assert config.vq_config.num_embeddings == upstream.vq_config.num_embeddings
    assert config.eos_token_id == compact_vocabulary()["<reserved08706>"]


def test_the_image_tokenizer_has_a_configuration_of_its_own(tmp_path):
    config = WorldVLAVQVAEConfig(base_channels=32, num_embeddings=16)
    config.save_pretrained(tmp_path)
    loaded = WorldVLAVQVAEConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedConfig) and (loaded.base_channels, loaded.num_embeddings) == (32, 16)
    whole = tiny_config()
    whole.save_pretrained(tmp_path)
    assert WorldVLAVQVAEConfig.from_pretrained(tmp_path).num_embeddings == whole.vq_config.num_embeddings

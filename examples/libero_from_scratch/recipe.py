"""What the stages of this recipe share: held-out episodes, the text tokenizer and the sizes of the small model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from transformers_worldvla import (
    WorldVLAConfig,
    WorldVLAImageProcessor,
    WorldVLAProcessor,
    WorldVLAVQVAEConfig,
    __version__,
)
from transformers_worldvla.data import Episode, load_episodes, name_trajectories, split_trajectories
from transformers_worldvla.tokens_worldvla import special_token_names

CAMERA = "image"
VAL_SHARE = 0.05  # of the episodes of every task
TARGET_SIZE = 128
NUM_ACTIONS = 10
MAX_GRID = 16  # pictures of up to 512 pixels a side have a grid token

VQ_CONFIG = {
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2, 4, 4],
    "num_res_blocks": 1,
    "latent_channels": 64,
    "embed_dim": 16,
    "num_embeddings": 1024,
    "resolution": TARGET_SIZE,
}
LM_CONFIG = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
}


def read_split(dataset: str) -> tuple[list[Episode], list[Episode]]:
    """(train, held out) of a dataset (a folder or a Hub id): the same episodes as in `worldvla tokenize` below."""
    episodes = load_episodes(dataset, cameras=[CAMERA])
    split = split_trajectories(name_trajectories(episodes), val_share=VAL_SHARE, ood_share=0.0)
    train, held_out = ([episodes[position] for position in split[name]] for name in ("train", "val_ind"))
    return train, held_out


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the texts; its vocabulary starts with the names in use, ordered as the published ids."""
    names = special_token_names(VQ_CONFIG["num_embeddings"], MAX_GRID)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(names) + len(alphabet) + 256,
        special_tokens=names,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def make_processor(episodes: Sequence[Episode]) -> WorldVLAProcessor:
    """Tokenizer and action ranges (min and max, paper section 3.2) of the training episodes."""
    actions = np.concatenate([episode.actions for episode in episodes]).astype(np.float64)
    embodiment: dict[str, Any] = {
        "low": actions.min(0).tolist(),
        "high": actions.max(0).tolist(),
        "action_names": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"],
        "semantics": "delta",
        "gripper": {"index": 6, "open": -1.0, "close": 1.0},
        "rotation": 180,
        "control_hz": 20,
        "cameras": [CAMERA],
        "raw_cameras": ["agentview"],
    }
    processor = WorldVLAProcessor(
        image_processor=WorldVLAImageProcessor(target_size=TARGET_SIZE),
        tokenizer=make_tokenizer(["placeholder"]),
        embodiments={"libero": embodiment},
        num_actions=NUM_ACTIONS,
        history=2,
    )
    instructions = sorted({episode.instruction for episode in episodes})
    prompts = [processor.prompts["world"], *(processor.prompts["action"].format(instruction=i) for i in instructions)]
    prompts += [processor.prompts["video"].format(instruction=i) for i in instructions]
    return WorldVLAProcessor(
        image_processor=processor.image_processor,
        tokenizer=make_tokenizer(prompts),
        embodiments=processor.embodiments,
        num_actions=NUM_ACTIONS,
        history=2,
    )


def make_config(processor: WorldVLAProcessor) -> WorldVLAConfig:
    """The small model over the processor's vocabulary."""
    vocabulary = processor.tokenizer.get_vocab()
    return WorldVLAConfig(
        vocab_size=len(vocabulary),
        vocabulary_map=vocabulary,
        vq_config=WorldVLAVQVAEConfig(**VQ_CONFIG),
        action_dim=processor.get_embodiment().action_dim,
        dropout=0.0,
        generator_version=__version__,
        world_loss_weight=1.0,  # from scratch both halves need to be learnt
        **LM_CONFIG,
    )

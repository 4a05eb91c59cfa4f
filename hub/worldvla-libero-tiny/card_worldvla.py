"""The model card of a saved checkpoint: what it is and how to use it, with its own sizes filled in.

It says only what the configuration knows. Training data, results and licence are the publisher's to add, and a card
that stands in the folder already is never touched.
"""

from pathlib import Path

from .configuration_worldvla import WorldVLAConfig

CARD_NAME = "README.md"
TAGS = ("worldvla", "robotics", "vision-language-action", "world-model")

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: robotics
tags:
{tags}
---

# WorldVLA checkpoint

An autoregressive action world model: from camera images and an instruction it predicts chunks of robot actions, and
from an image and an action it predicts the next image, with one decoder over text, image and action tokens
([paper](https://arxiv.org/abs/2506.21539)).

| | |
|---|---|
| decoder | {num_hidden_layers} layers, hidden size {hidden_size}, {num_attention_heads} heads |
| vocabulary | {vocab_size} tokens for text, images and actions |
| image tokenizer | VQ-GAN with {num_embeddings} codes; one code is {stride} x {stride} pixels |
| action dimension | {action_dim} |
| cameras a time step | {num_cameras} |
| action blocks of one answer | {attention} |

Action ranges, units, camera names, prompts, chunk and history length are in `processor_config.json`.

## Act

```python
from transformers import AutoModelForCausalLM, AutoProcessor

repo = "..."  # this repository, or a local copy of it
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)

inputs = processor(images=[previous, current], instruction="open the middle drawer of the cabinet")
tokens = model.generate_actions(**inputs, num_actions=processor.num_actions)
actions = processor.decode_actions(tokens)  # (1, num_actions, action dimension), in the robot's units
```

## Imagine

```python
frames = model.imagine(processor, image=current, actions=plan)  # one picture for each action of the plan
```

The code travels with the checkpoint. With `transformers_worldvla` installed, `import transformers_worldvla` makes
`trust_remote_code` unnecessary.
"""


def model_card(config: WorldVLAConfig) -> str:
    """Markdown with a metadata header for a checkpoint of this configuration."""
    independent = config.action_attention == "independent"
    return _TEMPLATE.format(
        tags="\n".join(f"- {tag}" for tag in TAGS),
        num_embeddings=config.vq_config.num_embeddings,
        stride=2 ** (len(config.vq_config.channel_multiplier) - 1),
        action_dim=config.action_dim or "depends on the embodiment",
        attention="do not see one another" if independent else "see the earlier ones",
        **{
            name: getattr(config, name)
            for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "num_cameras")
        },
    )


def write_model_card(folder: str | Path, config: WorldVLAConfig) -> None:
    """Write the card into a checkpoint folder that has none."""
    path = Path(folder) / CARD_NAME
    if not path.exists():
        path.write_text(model_card(config), encoding="utf-8")

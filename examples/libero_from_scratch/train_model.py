"""Stage 2: tokenize every frame once, then train the decoder on action and world-model samples with the plain Trainer.

    python train_model.py --dataset DIR_OR_REPO --output runs/tiny --minutes 45

Needs OUTPUT/vqvae of stage 1. Writes OUTPUT/checkpoint: a complete checkpoint (weights, tokenizer, embodiment, prompts,
code, card) and `training_statistics.json`. Frames are read from OUTPUT/tokens.npz once it exists; the Trainer's own
checkpoints make a killed run go on where it stopped.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from recipe import CAMERA, NUM_ACTIONS, make_config, make_processor, read_split
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor, WorldVLAVQVAE
from transformers_worldvla.data import (
    Episode,
    SampleDataset,
    TokenizedEpisode,
    WorldVLADataCollator,
    tokenize_episode,
)


class StopAfter(TrainerCallback):
    """End training after some minutes; the schedule runs on the clock too, so that it always reaches its end.

    Time spent is kept in a file beside the Trainer's checkpoints, so that a resumed run does not start the clock anew.
    """

    def __init__(self, minutes: float, clock_file: Path):
        self.clock_file = clock_file
        spent = json.loads(clock_file.read_text()) if clock_file.exists() else 0.0
        self.seconds, self.start = minutes * 60, time.time() - spent

    def on_save(self, args, state, control, **kwargs):
        self.clock_file.write_text(json.dumps(time.time() - self.start))

    def share_left(self) -> float:
        """From 1 at the start to 0 at the end."""
        return max(0.0, 1 - (time.time() - self.start) / self.seconds)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.share_left() == 0
        return control


class MovedCodesCollator(WorldVLADataCollator):
    """Weighs the codes of a world-model answer that differ from the frame before: few codes move, most are copied."""

    def __init__(self, processor: WorldVLAProcessor, weight: float):
        super().__init__(processor)
        self.weight = weight

    def __call__(self, samples):
        batch = super().__call__(samples)
        tokens, ids = self.processor.tokens, batch["input_ids"]
        block = tokens.image_block_length(*samples[0]["image_tokens"][0].shape)
        action = tokens.action_block_length(self.processor.get_embodiment().action_dim)
        # ... <frame> <action> <separator> <next frame> <separator>, aligned on the right
        answer = slice(-1 - block, -1)
        before = slice(-2 - 2 * block - action, -2 - block - action)
        is_world = ids[:, -2] == tokens.image_end
        moved = (ids[:, answer] != ids[:, before]) & is_world[:, None]
        batch["loss_weights"][:, answer] *= torch.where(moved, self.weight, 1.0)
        return batch


def tokenize(
    episodes: list[Episode], model: WorldVLAForCausalLM, processor: WorldVLAProcessor, cache: Path
) -> dict[int, TokenizedEpisode]:
    """Every episode as token ids, from the cache file where it exists."""
    if not cache.exists():
        frames = {}
        for number, episode in enumerate(episodes):
            frames[str(episode.index)] = tokenize_episode(episode, model, processor, [CAMERA]).frames
            print(f"tokenized {number + 1} of {len(episodes)} episodes", flush=True)
        np.savez(cache, **frames)
    frames = dict(np.load(cache))
    return {e.index: TokenizedEpisode(e.index, e.instruction, frames[str(e.index)], e.actions) for e in episodes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--kinds", nargs="+", default=["action", "world"], help="repeat a kind to see it more often")
    parser.add_argument("--moved-weight", type=float, default=1.0, help="loss weight of codes that change")
    parser.add_argument("--start-from", type=Path, help="go on from this checkpoint with a new schedule")
    args = parser.parse_args()
    set_seed(0)
    train, held_out = read_split(args.dataset)
    if args.start_from:
        processor = WorldVLAProcessor.from_pretrained(args.start_from)
        model = WorldVLAForCausalLM.from_pretrained(args.start_from)
    else:
        processor = make_processor(train)
        model = WorldVLAForCausalLM(make_config(processor))
        model.model.vqmodel = WorldVLAVQVAE.from_pretrained(args.output / "vqvae")
    tokenized = tokenize([*train, *held_out], model, processor, args.output / "tokens.npz")
    samples = SampleDataset(
        [tokenized[episode.index] for episode in train],
        kinds=args.kinds,
        num_actions=NUM_ACTIONS,
        history_dropout=0.15,
    )
    clock = StopAfter(args.minutes, args.output / "clock.json")
    decay = {"params": [p for p in model.parameters() if p.requires_grad and p.ndim > 1], "weight_decay": 0.05}
    plain = {"params": [p for p in model.parameters() if p.requires_grad and p.ndim <= 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decay, plain], lr=args.learning_rate, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 200) * min(1.0, 1.6 * clock.share_left() + 0.01)
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output / "trainer"),
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=1000,  # the clock ends it
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=50,
            save_steps=1000,
            save_total_limit=1,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=0,
        ),
        train_dataset=samples,
        data_collator=MovedCodesCollator(processor, args.moved_weight),
        optimizers=(optimizer, scheduler),
        callbacks=[clock],
    )
    last = get_last_checkpoint(trainer.args.output_dir) if Path(trainer.args.output_dir).exists() else None
    trainer.train(resume_from_checkpoint=last)
    save_checkpoint(model, processor, train, args.output / "checkpoint")


def save_checkpoint(
    model: WorldVLAForCausalLM, processor: WorldVLAProcessor, train: list[Episode], folder: Path
) -> None:
    """Decoder weights are rounded to bfloat16 on disk and opened in float32; the image tokenizer stays float32."""
    model.eval()
    for name, module in model.named_modules():
        if not name.startswith("model.vqmodel"):
            for key, parameter in module.named_parameters(recurse=False):
                setattr(module, key, torch.nn.Parameter(parameter.detach().to(torch.bfloat16)))
    model.save_pretrained(folder, max_shard_size="15MB")
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    actions = np.concatenate([episode.actions for episode in train]).astype(np.float64)
    statistics = {"action_mean": actions.mean(0).tolist(), "action_std": actions.std(0).tolist(), "steps": len(actions)}
    (folder / "training_statistics.json").write_text(json.dumps(statistics, indent=2) + "\n")


if __name__ == "__main__":
    main()

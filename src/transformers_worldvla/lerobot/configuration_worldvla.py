"""LeRobot's configuration of the policy `worldvla`: the options behind `--policy.`, and what LeRobot's loops ask of it.

It holds only what a WorldVLA checkpoint does not say itself. Embodiments, picture size, prompts and the sizes of the
model stay in the checkpoint; nothing here is needed to open one.
"""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig

from ..data.samples import KINDS

# transformers reads this file where `config.json` names it in `configuration_files`: one folder is a policy of LeRobot
# and a checkpoint of transformers
TRANSFORMERS_CONFIG = "config.5.0.0.json"
FEATURE_TYPES = ("VISUAL", "STATE", "ENV", "ACTION")


@PreTrainedConfig.register_subclass("worldvla")
@dataclass
class LeRobotWorldVLAConfig(PreTrainedConfig):
    """WorldVLA under LeRobot. Its name is not `WorldVLAConfig`, which is the configuration of the model.

    Args:
        checkpoint: a WorldVLA checkpoint (folder or Hub id) to begin with: `--policy.type=worldvla
            --policy.checkpoint=...`. What this policy has saved is opened with `--policy.path=...` instead.
        checkpoint_revision: branch, tag or commit of it on the Hub.
        embodiment: whose actions; not needed where the checkpoint has one, or a default. In training a name that the
            checkpoint does not know makes a new robot, with the ranges, names and cameras of the dataset.
        camera_map: picture key of the observations -> camera of the embodiment, where they are not called alike
            (`{"observation.images.front": "image"}`).
        prompt: instruction for observations without a task.
        n_obs_steps: time steps an action prompt shows (the checkpoint's history by default).
        chunk_size: actions a chunk, K (the checkpoint's by default).
        n_action_steps: actions of a chunk that are executed before the next is planned; K by default, 1 with
            `aggregation=ensemble`.
        aggregation: `latest` or `ensemble` (temporal ensembling).
        kinds: samples made of every frame in training, of `action`, `world` (frame and action -> next frame) and
            `video`.
        loss_reduction, world_loss_weight, z_loss_weight, dropout: as in `WorldVLAConfig`; the checkpoint's by default.
        weights_dtype: of the weights: `auto` (as they are stored), `float32`, `bfloat16`. Weights that are trained must
            be float32.
        gradient_checkpointing: recompute the layers in the backward pass.
        optimizer_*, scheduler_*: AdamW and a cosine, those of the recipe `full` of `worldvla train`.
        discover_packages_path: LeRobot's own option; it comes here when it is given together with `--policy.path`.
        new_robot: the embodiment that training made of its dataset, for an adapter, whose folder has no processor.
        configuration_files, model_type: for those who open the saved folder as a checkpoint of transformers.
    """

    checkpoint: str | None = None
    checkpoint_revision: str | None = None
    embodiment: str | None = None
    camera_map: dict[str, str] = field(default_factory=dict)
    prompt: str | None = None

    n_obs_steps: int | None = None
    chunk_size: int | None = None
    n_action_steps: int | None = None
    aggregation: str = "latest"

    kinds: list[str] = field(default_factory=lambda: ["action", "world"])
    loss_reduction: str | None = None
    world_loss_weight: float | None = None
    z_loss_weight: float | None = None
    dropout: float | None = None
    weights_dtype: str = "auto"
    gradient_checkpointing: bool = False

    optimizer_lr: float = 1e-5
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    optimizer_weight_decay: float = 0.1
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 1_000
    scheduler_decay_steps: int = 100_000
    scheduler_decay_lr: float = 0.0

    # the processor of the checkpoint normalises pictures and actions; LeRobot's steps are there and do nothing
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(FEATURE_TYPES, NormalizationMode.IDENTITY)
    )
    discover_packages_path: str | None = None
    new_robot: dict[str, Any] | None = None
    configuration_files: list[str] = field(default_factory=lambda: [TRANSFORMERS_CONFIG])
    model_type: str = "worldvla"

    def complete(self, processor: Any = None) -> None:
        """Take from the checkpoint's processor what was left to it; it is loaded where it is needed and not given.

        Raises ValueError or OSError, one line: no checkpoint, one that cannot be opened, an option out of its range.
        """
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise ValueError(f"kinds are {', '.join(KINDS)}, not {', '.join(unknown)}")
        if self.n_obs_steps is None or self.chunk_size is None:
            if processor is None:
                from ..serving.loading import load_processor

                processor = load_processor(*self.source)
            self.n_obs_steps = processor.history if self.n_obs_steps is None else self.n_obs_steps
            self.chunk_size = processor.num_actions if self.chunk_size is None else self.chunk_size
        for name, value in (("n_obs_steps", self.n_obs_steps), ("chunk_size", self.chunk_size)):
            if value < 1:
                raise ValueError(f"{name} is a number >= 1, not {value}")

    @property
    def source(self) -> tuple[str, str | None]:
        """The checkpoint to open and its revision."""
        if self.pretrained_path is not None:
            return str(self.pretrained_path), getattr(self, "pretrained_revision", None)  # LeRobot >= 0.5 has revisions
        if self.checkpoint is None:
            raise ValueError(
                "no checkpoint: --policy.type=worldvla needs --policy.checkpoint=FOLDER_OR_REPO with a WorldVLA "
                "checkpoint; what this policy has saved is opened with --policy.path=FOLDER_OR_REPO"
            )
        return self.checkpoint, self.checkpoint_revision

    # ---------------------------------------------------------------- what LeRobot's loaders ask

    @property
    def observation_delta_indices(self) -> list[int]:
        """Frames of a training row: those that a prompt shows, and the next one where a sample has to predict it."""
        self.complete()
        return list(range(1 - (self.n_obs_steps or 1), 1 if set(self.kinds) == {"action"} else 2))

    @property
    def action_delta_indices(self) -> list[int]:
        """Actions of a training row: one chunk."""
        self.complete()
        return list(range(self.chunk_size or 1))

    @property
    def reward_delta_indices(self) -> None:
        return None

    @property
    def drop_n_last_frames(self) -> int:
        """Frames at an episode's end that LeRobot's sampler leaves out: no whole chunk of actions follows them."""
        return len(self.action_delta_indices) - 1

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
        )

    def validate_features(self) -> None:
        """Raise ValueError for what no embodiment could make work; `robots.check_features` knows the embodiment."""
        if any(mode is not NormalizationMode.IDENTITY for mode in self.normalization_mapping.values()):
            raise ValueError(
                "normalization_mapping stays IDENTITY: the checkpoint's processor normalises by its ranges"
            )
        if self.input_features and not self.image_features:
            raise ValueError(f"WorldVLA needs pictures, but the inputs are {', '.join(self.input_features)}")
        if self.output_features and self.action_feature is None:
            raise ValueError(f'WorldVLA answers "action", but the outputs are {", ".join(self.output_features)}')

"""WorldVLA as LeRobot's `PreTrainedPolicy`: a thin layer over the model, its processor, the collator and the policy.

It translates batches (`batches`) and says what LeRobot's loops want to know. What the model is shown is the business of
`data.samples` and the processor, acting that of `serving.policy`, the loss the model's.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from transformers.utils import cached_file

from ..data.collator import WorldVLADataCollator
from ..serving.history import Frame
from ..serving.loading import load_model, load_processor
from ..serving.policy import WorldVLAPolicy
from ..serving.prediction import ChunkRequest
from ..training.adapters import TARGETS
from ..training.trainer import prepare_model
from .batches import Row, read_rows, training_samples, unlabel_padding
from .configuration_worldvla import TRANSFORMERS_CONFIG, LeRobotWorldVLAConfig
from .robots import check_features, choose_robot, warn_of_clipping

CONFIG = "config.json"
HUB_OPTIONS = ("force_download", "resume_download", "proxies", "token", "cache_dir", "local_files_only")


class LeRobotWorldVLAPolicy(PreTrainedPolicy):
    """A WorldVLA checkpoint as a policy of LeRobot. Its name is not `WorldVLAPolicy`, which it acts with.

    Names, dimensions and options are checked before weights are read.

    Args:
        config: see `LeRobotWorldVLAConfig`; what it leaves open is filled in.
        dataset_stats, dataset_meta: of the dataset of a training run, as LeRobot's factory passes them.
        source, revision: the checkpoint, by default the one that the config names.

    Attributes:
        model: the `WorldVLAForCausalLM`; its image tokenizer stays frozen.
        processor: the `WorldVLAProcessor`.
        robot: the `Embodiment` it acts for.
    """

    config_class = LeRobotWorldVLAConfig
    name = "worldvla"

    def __init__(
        self,
        config: LeRobotWorldVLAConfig,
        dataset_stats: dict[str, dict[str, Any]] | None = None,
        dataset_meta: Any = None,
        *,
        source: str | None = None,
        revision: str | None = None,
        **_: Any,  # whatever else a later LeRobot passes to every policy
    ):
        super().__init__(config)
        if source is None:
            source, revision = config.source
        self.processor = load_processor(source, revision)
        config.complete(self.processor)
        self.processor.history, self.processor.num_actions = config.n_obs_steps, config.chunk_size
        self.robot = choose_robot(self.processor, config, dataset_meta)
        config.embodiment = self.robot.name
        check_features(config, self.robot)
        if dataset_meta is not None:
            warn_of_clipping(self.robot, dataset_stats)
        self._actor = WorldVLAPolicy(  # checks its options
            None,
            self.processor,
            embodiment=self.robot.name,
            prompt=config.prompt,
            replan_interval=config.n_action_steps,
            aggregation=config.aggregation,
            overlap=False,  # LeRobot's autocast does not reach another thread
        )
        config.n_action_steps = self._actor.replan_interval
        self.model = load_model(source, revision, torch.device(config.device), config.weights_dtype)
        prepare_model(self.model, config, self.processor)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self._actor.predictor.model = self.model
        self._collator = WorldVLADataCollator(self.processor)
        self.name_or_path = source  # what PEFT writes into an adapter as its base
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: LeRobotWorldVLAConfig | None = None,
        revision: str | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> "LeRobotWorldVLAPolicy":
        """Open what `save_pretrained` wrote, or any other WorldVLA checkpoint: a folder or a Hub id.

        Weights are always read strictly. Raises ValueError or OSError, one line.
        """
        if given := [name for name in HUB_OPTIONS if kwargs.pop(name, None)]:
            raise ValueError(
                f"{given[0]} is not an option here: the Hub is set up with HF_TOKEN, HF_HOME, HF_HUB_OFFLINE"
            )
        source = str(pretrained_name_or_path)
        if config is None:
            config = _read_config(source, revision)
        policy = cls(config, source=source, revision=revision, **kwargs)
        policy.to(config.device)
        policy.eval()
        return policy

    def _save_pretrained(self, save_directory: Path) -> None:
        """One folder for both: `config.json` is LeRobot's and points transformers to its own."""
        self.model.save_pretrained(save_directory)
        self.processor.save_pretrained(save_directory)
        (save_directory / CONFIG).replace(save_directory / TRANSFORMERS_CONFIG)
        self.config._save_pretrained(save_directory)

    # ---------------------------------------------------------------- training

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a batch of a dataset, that of the model for its samples, and its parts for the log.

        Raises ValueError, one line, when the batch does not fit the checkpoint.
        """
        if reduction != "mean":
            raise ValueError("WorldVLA's loss is a mean over the tokens of a batch: it has no values by sample (RA-BC)")
        rows = self._rows(batch)
        if "action" in self.config.kinds or "video" in self.config.kinds:
            rows = [self._with_task(row) for row in rows]
        samples, counts = training_samples(batch, rows, self.config.kinds, self.robot.name)
        if not samples:
            raise ValueError("no row of the batch has a next frame: nothing to learn for kinds without action")
        inputs = self._collator(samples)
        unlabel_padding(inputs, counts, self.processor.tokens)
        outputs = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()}, logits_to_keep=1)
        parts = {"action_loss": outputs.action_loss, "world_loss": outputs.world_loss, "z_loss": outputs.z_loss}
        return outputs.loss, {name: value.item() for name, value in parts.items()}

    def get_optim_params(self) -> list[torch.nn.Parameter]:
        """What is trained: everything but the image tokenizer, or the adapter alone.

        Raises ValueError for weights of 16 bits, which small steps do not move.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if coarse := {str(each.dtype) for each in trained if each.dtype in (torch.bfloat16, torch.float16)}:
            raise ValueError(
                f"trained weights are {coarse.pop()}: use --policy.weights_dtype=float32, or an adapter (--peft.r=32)"
            )
        return trained

    def _get_default_peft_targets(self) -> dict[str, Any]:
        return {"target_modules": TARGETS}

    def _validate_peft_config(self, peft_config: Any) -> None:
        """LeRobot wants a `pretrained_path` under an adapter; this policy always begins with a checkpoint."""

    # ---------------------------------------------------------------- acting

    def reset(self) -> None:
        """A new episode begins in every row."""
        self._sessions: list[WorldVLAPolicy] = []

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        """The action (B, D) in robot units for this control step of B robots; call it at every control step.

        Each row is a robot of its own with its own frames and chunks, from one `reset` to the next.
        """
        rows = [self._with_task(row) for row in self._rows(batch)]
        if len(self._sessions) != len(rows):
            self._sessions = [self._actor.session() for _ in rows]
        observations = [_observation(self.robot.cameras, row) for row in rows]
        actions = [session.select_action(seen) for session, seen in zip(self._sessions, observations, strict=True)]
        return self._to_tensor(np.stack(actions))

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        """A chunk (B, K, D) in robot units for each row, seen on its own: nothing is remembered.

        Rows with a time axis, as a dataset gives them, show up to `n_obs_steps` frames, others one.
        """
        rows = [self._with_task(row) for row in self._rows(batch)]
        requests = [ChunkRequest([Frame(_pictures(step)) for step in row.steps], str(row.task)) for row in rows]
        return self._to_tensor(np.stack([chunk.actions for chunk in self._actor.predictor.predict(requests)]))

    # ---------------------------------------------------------------- helpers

    def _rows(self, batch: dict[str, Any]) -> list[Row]:
        return read_rows(batch, self.robot.cameras, self.config.camera_map, self.config.n_obs_steps)

    def _with_task(self, row: Row) -> Row:
        task = row.task or self.config.prompt
        if task is None:
            raise ValueError('a row has no "task": say what to do there, or for all with --policy.prompt="..."')
        return Row(row.steps, row.following, task)

    def _to_tensor(self, actions: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(actions).to(self.model.device, torch.float32)


def _observation(cameras: tuple[str, ...], row: Row) -> dict[str, Any]:
    """A row as `WorldVLAPolicy` takes it; one time step, for it remembers the earlier ones itself."""
    return {**dict(zip(cameras, row.steps[-1], strict=True)), "prompt": row.task}


def _pictures(step: list[np.ndarray]) -> tuple[Any, ...]:
    from ..image_processing_worldvla import to_pil

    return tuple(to_pil(picture) for picture in step)


def _read_config(source: str, revision: str | None) -> LeRobotWorldVLAConfig:
    """LeRobot's configuration in a folder or repository; a new one for a checkpoint that has none."""
    options: dict[str, Any] = {"local_files_only": True} if Path(source).is_dir() else {"revision": revision}
    path = cached_file(source, CONFIG, **options)
    if "type" not in json.loads(Path(str(path)).read_text(encoding="utf-8")):
        return LeRobotWorldVLAConfig(checkpoint=source, checkpoint_revision=revision)
    config = PreTrainedConfig.from_pretrained(source, revision=revision)
    if not isinstance(config, LeRobotWorldVLAConfig):
        raise ValueError(f"{source} is a policy of type {config.type!r}, not 'worldvla'")
    return config

"""`WorldVLATrainingArguments`: transformers' TrainingArguments and the few fields that WorldVLA's training adds."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

MODEL_FIELDS = ("loss_reduction", "world_loss_weight", "z_loss_weight", "dropout")


@dataclass
class WorldVLATrainingArguments(TrainingArguments):
    """As `TrainingArguments`; the fields below are None where the checkpoint's own value stays.

    Args:
        loss_reduction: `paper` (L_action + alpha L_world, a mean each) or `authors` (one class-weighted mean).
        world_loss_weight: alpha, the weight of the world-model loss.
        z_loss_weight: weight of the mean squared logsumexp over labelled tokens.
        dropout: on both residual branches of every decoder layer.
        decay_all_parameters: weight decay on norms and biases too, as the authors' optimizer does; transformers leaves
            them out.
        remove_unused_columns: False here, for samples are the processor's arguments and not the model's.
    """

    loss_reduction: str | None = field(default=None, metadata={"help": "paper or authors; None: the checkpoint's."})
    world_loss_weight: float | None = field(default=None, metadata={"help": "alpha; None: the checkpoint's."})
    z_loss_weight: float | None = field(default=None, metadata={"help": "None: the checkpoint's."})
    dropout: float | None = field(default=None, metadata={"help": "Residual dropout; None: the checkpoint's."})
    decay_all_parameters: bool = field(default=False, metadata={"help": "Weight decay on norms and biases too."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Samples are no arguments of the model."})

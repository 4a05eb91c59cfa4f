"""TRL's SFTTrainer trains WorldVLA with WorldVLA's loss."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from small_checkpoint import LIBERO, small_model, small_processor, write_checkpoint, write_episode
from transformers import AutoModelForCausalLM, AutoProcessor

pytest.importorskip("trl", reason="the example needs TRL: pip install trl")

from transformers_worldvla import WorldVLATrainer, WorldVLATrainingArguments  # noqa: E402
from transformers_worldvla.cli.main import main as worldvla  # noqa: E402
from transformers_worldvla.data import FrameTokenCache, SampleDataset  # noqa: E402
from transformers_worldvla.training import add_lora  # noqa: E402

FOLDER = Path(__file__).parents[2] / "examples" / "trl_sft"
ALPHA, Z = 0.3, 1e-2
OFF = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "bf16": False}

pytestmark = pytest.mark.slow  # TRL alone takes several seconds to import


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trl_sft_train", FOLDER / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "arm")


@pytest.fixture(scope="module")
def cache(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes of a task, one of them held out, as `worldvla tokenize` leaves them."""
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(3):
        write_episode(folder / "made", steps=8, seed=number)
        (folder / "made" / "episode_0").rename(folder / f"episode_{number}")
    (folder / "made").rmdir()
    output = tmp_path_factory.mktemp("caches") / "arm"
    code = worldvla(["tokenize", str(folder), "--model", str(checkpoint), "--output", str(output),
                     "--val-share", "0.3", "--ood-share", "0"])  # fmt: skip
    assert code == 0
    return output


@pytest.fixture
def make(example: ModuleType, cache: Path, tmp_path: Path) -> Callable[..., tuple[Any, Any]]:
    """An SFTTrainer and a WorldVLATrainer of one model and the same samples."""

    def trainers(wrap: Callable[[Any], Any] = lambda model: model, **fields: Any) -> tuple[Any, Any]:
        processor = small_processor(LIBERO)
        model = small_model(processor, dropout=0.0, **fields)
        samples = SampleDataset(FrameTokenCache(cache).verify(model, processor).episodes("train"), num_actions=4)
        processor.embodiments = {FrameTokenCache(cache).embodiment.name: FrameTokenCache(cache).embodiment.to_dict()}
        model = wrap(model)
        config = example.sft_config(str(tmp_path), max_steps=1, per_device_train_batch_size=6, **OFF)
        sft = example.WorldVLASFTTrainer(model, config, {"train": samples}, processor)
        arguments = WorldVLATrainingArguments(str(tmp_path), max_steps=1, **OFF)
        own = WorldVLATrainer(model, arguments, processing_class=processor, train_dataset=samples)
        return sft, own

    return trainers


def batch_of(trainer: Any) -> dict[str, torch.Tensor]:
    """The first batch, with samples of both kinds and a weight other than 1."""
    batch = next(iter(trainer.get_train_dataloader()))
    batch["loss_weights"][0] *= 2.5
    return dict(batch)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("reduction", ["paper", "authors"])
def test_loss_and_gradients_are_those_of_our_trainer(make: Callable[..., Any], reduction: str) -> None:
    sft, own = make(loss_reduction=reduction, world_loss_weight=ALPHA, z_loss_weight=Z)
    batch = batch_of(sft)
    found = {}
    for name, trainer in {"sft": sft, "own": own}.items():
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        found[name] = loss.item(), gradients(trainer.model)
    assert found["sft"][0] == pytest.approx(found["own"][0], rel=1e-6)
    assert found["sft"][1].keys() == found["own"][1].keys() and len(found["sft"][1]) > 10
    for name, gradient in found["sft"][1].items():
        torch.testing.assert_close(gradient, found["own"][1][name], rtol=1e-5, atol=1e-7)


def test_loss_is_the_formula_over_what_trl_computes(make: Callable[..., Any]) -> None:
    """The authors' class-weighted mean of log-probabilities by TRL's own fused head."""
    sft, _ = make(loss_reduction="authors", world_loss_weight=ALPHA, z_loss_weight=0.0)
    batch, model = batch_of(sft), sft.model.train()
    loss = sft.compute_loss(model, dict(batch)).item()
    weights = batch.pop("loss_weights")[:, 1:]
    scored = model(**batch, fused_lm_head=True)
    first, last = model.authors_world_classes
    labels = batch["labels"][:, 1:]
    factors = torch.where((labels >= first) & (labels <= last), ALPHA, 1.0) * weights * scored.label_mask
    assert loss == pytest.approx(float(-(factors * scored.log_probs).sum() / factors.sum()), rel=1e-5)


def test_without_weights_it_is_the_loss_of_stock_sft(make: Callable[..., Any]) -> None:
    """alpha 1, no z-loss, one mean: nothing is left to say. Anything else is lost on stock TRL without a word."""
    from trl import SFTTrainer

    sft, _ = make(loss_reduction="authors", world_loss_weight=1.0, z_loss_weight=0.0)
    batch, model = dict(next(iter(sft.get_train_dataloader()))), sft.model.train()

    def stock() -> float:
        return SFTTrainer.compute_loss(sft, model, dict(batch)).item()

    expected = stock()
    assert sft.compute_loss(model, dict(batch)).item() == pytest.approx(expected, rel=1e-5)
    model.config.world_loss_weight = ALPHA
    batch["loss_weights"][0] *= 2.5
    assert stock() == expected, "stock TRL takes no notice"
    assert abs(sft.compute_loss(model, dict(batch)).item() - expected) > 1e-3


def test_rows_of_the_head_are_trained_in_an_adapter(make: Callable[..., Any]) -> None:
    """TRL's fused head refuses or ignores adapters of `lm_head`; the model's own forward does neither."""
    sft, own = make(wrap=lambda model: add_lora(model, rank=4))
    batch = batch_of(sft)
    losses = [trainer.compute_loss(trainer.model.train(), dict(batch)) for trainer in (sft, own)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    losses[0].backward()
    rows = [name for name in gradients(sft.model) if "lm_head" in name]
    assert rows, "the action tokens' rows of the head"


@pytest.mark.parametrize("more", [[], ["--lora"]])
def test_trains_a_checkpoint_that_opens(
    example: ModuleType, cache: Path, checkpoint: Path, tmp_path: Path, more: list[str]
) -> None:
    output = tmp_path / "run"
    options = ["--steps", "12", "--batch-size", "4", "--learning-rate", "3e-3", *more]
    example.main(["--cache", str(cache), "--model", str(checkpoint), "--output", str(output), *options])
    state = json.loads((output / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["global_step"] == 12
    processor = AutoProcessor.from_pretrained(output)
    model, before = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (output, checkpoint))
    separator = model.tokens.separator
    assert model.config.eos_token_id == model.generation_config.eos_token_id == separator
    assert model.config.use_cache and processor.get_embodiment().low[0] > LIBERO.low[0], "the ranges of the cache"
    for name, weight in model.model.vqmodel.state_dict().items():
        assert torch.equal(weight, before.model.vqmodel.state_dict()[name]), "the image tokenizer is frozen"

    samples = SampleDataset(FrameTokenCache(cache).verify(model, processor).episodes("train"), num_actions=4)
    batch = example.WorldVLADataCollator(processor)([samples[item] for item in range(0, len(samples), 3)])
    with torch.no_grad():
        assert model(**batch).loss < before(**batch).loss - 0.1

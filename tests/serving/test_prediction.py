"""What the model is asked, against the processor and the model called by hand and against plain forwards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_worldvla.action_tokenization_worldvla import LIBERO
from transformers_worldvla.serving.history import Frame
from transformers_worldvla.serving.policy import WorldVLAPolicy
from transformers_worldvla.serving.prediction import ActionPredictor, ChunkRequest

PROMPT = "push the square to the right"


def frame_of(array: np.ndarray) -> Frame:
    return Frame((Image.fromarray(array),))


def bin_distribution(arm: WorldVLAPolicy, pictures: list[np.ndarray], bins: np.ndarray) -> torch.Tensor:
    """Probabilities (K, D, 256) by one forward for each action alone: no other block is even there to be seen."""
    tokens = arm.processor.tokens
    prompt = arm.model.discretize(**arm.processor(images=pictures, instruction=PROMPT))["input_ids"]
    stride = tokens.action_block_length(bins.shape[1])
    rows = []
    for index, action in enumerate(bins.tolist()):
        block = torch.tensor([tokens.action_block(action)])
        positions = torch.arange(prompt.shape[1] + stride)[None]
        positions[:, prompt.shape[1] :] += index * stride
        with torch.no_grad():
            logits = arm.model(input_ids=torch.cat([prompt, block], -1), position_ids=positions).logits[0]
        legal = logits[prompt.shape[1] : prompt.shape[1] + bins.shape[1]][:, list(tokens.action_bins)]
        rows.append(legal.double().softmax(-1))
    return torch.stack(rows)


def by_hand(arm: WorldVLAPolicy, pictures: list[np.ndarray]) -> Any:
    inputs = arm.processor(images=pictures, instruction=PROMPT)
    return arm.model.generate_actions(**inputs, num_actions=4, return_dict_in_generate=True)


def test_a_chunk_is_that_of_processor_and_generate_actions(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    request = ChunkRequest([frame_of(frames[0]), frame_of(frames[1])], PROMPT)
    chunk = arm.predictor.predict([request])[0]
    answer = by_hand(arm, frames[:2])
    assert chunk.actions.tolist() == arm.processor.decode_actions(answer.sequences)[0].tolist()
    np.testing.assert_allclose(chunk.logprobs, answer.logprobs[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(chunk.confidence, np.exp(answer.logprobs[0].numpy().mean(-1)), rtol=1e-4)
    assert (chunk.num_frames, chunk.entropy) == (2, None)


def test_a_batch_of_several_robots_gives_what_each_gets_alone(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    requests = [
        ChunkRequest([frame_of(frames[0])], "go"),
        ChunkRequest([frame_of(frames[1]), frame_of(frames[2])], PROMPT),
        ChunkRequest([frame_of(frames[3][:, :50])], "another, longer thing to do"),  # another size
    ]
    together = arm.predictor.predict(requests)
    for request, chunk in zip(requests, together, strict=True):
        alone = arm.predictor.predict([request])[0]
        assert chunk.actions.tolist() == alone.actions.tolist()
        np.testing.assert_allclose(chunk.logprobs, alone.logprobs, atol=1e-4)


def test_a_frame_is_tokenized_once(
    arm: WorldVLAPolicy, frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    encode = arm.model.model.vqmodel.encode_codes
    monkeypatch.setattr(
        arm.model.model.vqmodel, "encode_codes", lambda pixels: (sizes.append(len(pixels)), encode(pixels))[1]
    )
    first, second, third = map(frame_of, frames[:3])
    arm.predictor.predict([ChunkRequest([first, second], PROMPT)])
    arm.predictor.predict([ChunkRequest([second, third], PROMPT)])
    arm.predictor.surprise(second, np.zeros(7), third)
    assert sizes == [2, 1]


def test_entropy_and_expected_value_are_those_of_the_distribution_over_bins(
    arm: WorldVLAPolicy, frames: list[np.ndarray]
) -> None:
    predictor = ActionPredictor(arm.model, arm.processor, entropy=True, expected_value=True)
    chunk = predictor.predict([ChunkRequest([frame_of(frames[0])], PROMPT)])[0]
    probabilities = bin_distribution(arm, frames[:1], by_hand(arm, frames[:1]).sequences[0].numpy()).numpy()
    entropy = -(probabilities * np.log(probabilities)).sum(-1)
    np.testing.assert_allclose(chunk.entropy, entropy, rtol=1e-3)
    # centres of 255 bins between 256 edges over the range; the last index means the last bin
    low, high = np.array(LIBERO.low), np.array(LIBERO.high)
    centres = low + (high - low) * (np.minimum(np.arange(256), 254)[:, None] + 0.5) / 255
    expected = (probabilities[..., None, :] @ centres.T[None, ..., None])[..., 0, 0]
    np.testing.assert_allclose(chunk.actions, expected, atol=1e-4)
    assert np.abs(chunk.actions - arm.predictor.predict([ChunkRequest([frame_of(frames[0])], PROMPT)])[0].actions).max()


def test_surprise_is_the_mean_negative_log_likelihood_of_the_codes(
    arm: WorldVLAPolicy, frames: list[np.ndarray]
) -> None:
    action = np.linspace(-0.3, 0.3, 7)
    surprise = arm.predictor.surprise(frame_of(frames[0]), action, frame_of(frames[1]))
    sample = arm.processor(images=[frames[0]], actions=[action], target_images=[frames[1]])
    sample = arm.model.discretize(**sample)
    codes = list(arm.processor.tokens.image_codes)
    with torch.no_grad():
        logits = arm.model(sample["input_ids"]).logits[0, :, codes].double().log_softmax(-1)
    told = [
        -float(logits[position - 1, codes.index(label)])
        for position, label in enumerate(sample["labels"][0].tolist())
        if label in codes
    ]
    assert len(told) == 16 and surprise == pytest.approx(np.mean(told), rel=1e-4)


def test_the_frame_that_the_world_model_imagines_surprises_it_least(
    arm: WorldVLAPolicy, frames: list[np.ndarray]
) -> None:
    before, action = frame_of(frames[0]), np.zeros(7)
    inputs = arm.processor(images=[frames[0]], actions=[action])
    block = arm.model.generate_frames(**inputs)[0, 0].tolist()
    imagined = Frame(before.pictures, codes=[arm.processor.tokens.parse_image_block(block)])
    others = [arm.predictor.surprise(before, action, frame_of(other)) for other in frames[1:5]]
    assert arm.predictor.surprise(before, action, imagined) < min(others)


def test_a_prefix_changes_no_answer(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    older, newest = frame_of(frames[0]), frame_of(frames[1])
    prefix = arm.predictor.prepare(ChunkRequest([older], PROMPT))
    ahead = arm.predictor.predict([ChunkRequest([older, newest], PROMPT, prefix)])[0]
    plain = arm.predictor.predict([ChunkRequest([older, newest], PROMPT)])[0]
    assert len(prefix.result()) > 16 and ahead.actions.tolist() == plain.actions.tolist()
    np.testing.assert_allclose(ahead.logprobs, plain.logprobs, atol=1e-4)


def test_a_prefix_of_another_prompt_is_not_used(arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    prefix = arm.predictor.prepare(ChunkRequest([frame_of(frames[0])], "another thing"))
    request = ChunkRequest([frame_of(frames[2]), frame_of(frames[1])], PROMPT, prefix)
    plain = arm.predictor.predict([ChunkRequest(request.frames, PROMPT)])[0]
    assert arm.predictor.predict([request])[0].actions.tolist() == plain.actions.tolist()


def test_sampling_is_passed_on(arm_checkpoint: Path, arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    request = ChunkRequest([frame_of(frames[0])], PROMPT)

    def sampled(seed: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        options = {"do_sample": True, "temperature": 2.0, "generator": generator}
        return ActionPredictor(arm.model, arm.processor, generate_kwargs=options).predict([request])[0].actions.tolist()

    assert sampled(1) == sampled(1) and sampled(1) != sampled(2)

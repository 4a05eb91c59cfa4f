"""The engine on a GPU: compiled layers and CUDA graphs give the answers of the modules. Runs where there is one."""

import pytest
import torch
from model_factory import left_pad, tiny_model, writer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.slow,
]


@pytest.mark.parametrize("compile", [False, True])
def test_answers_are_those_of_the_modules(compile):
    model = tiny_model(action_dim=7).cuda()
    write = writer(model)
    actions = [left_pad(model, [write.action_prompt(length, 2)]) for length in (3, 9, 30)]
    frames = left_pad(model, [write.world_prompt(grid=(2, 2), length=3 + row) for row in range(2)])
    expected = [model.generate_actions(**one, num_actions=4) for one in actions]
    imagined = model.generate_frames(**frames)
    model.enable_engine(compile=compile)
    model.warm_up(40, num_actions=4)
    for _ in range(2):  # captured, then replayed
        for one, answer in zip(actions, expected, strict=True):
            assert torch.equal(model.generate_actions(**one, num_actions=4), answer)
            shorter = {name: torch.cat([value[:, :-11], value[:, -1:]], dim=-1) for name, value in one.items()}
            prefix = model.prefill_actions(**shorter)
            assert torch.equal(model.generate_actions(**one, num_actions=4, prefix=prefix), answer)
        assert torch.equal(model.generate_frames(**frames), imagined)
        assert torch.equal(model.generate_frames(**frames, draft="previous"), imagined)


def test_new_weights_reach_a_captured_graph():
    model = tiny_model(action_dim=7).cuda()
    batch = left_pad(model, [writer(model).action_prompt(3, 2)])
    model.enable_engine(compile=False)
    before = model.generate_actions(**batch, num_actions=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    after = model.generate_actions(**batch, num_actions=4)
    model.disable_engine()
    assert torch.equal(after, model.generate_actions(**batch, num_actions=4))
    assert not torch.equal(after, before)

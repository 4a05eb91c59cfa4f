"""How many codes of the previous frame are right on real episodes, and what that saves.

    python benchmarks/draft_acceptance.py [--frames 12] [--window 16] [--threads 1]

The bundled checkpoint imagines next frames of the bundled held-out LIBERO episode, once code by code and once from the
previous frame's codes, in turn. Both give the same frames, which is checked. Prints the share of codes that the drafts
had right, forwards a frame, and medians of the time (wall and processor).
"""

import argparse
import json
import statistics
import time

import torch

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.assets import DEFAULT_CHECKPOINT, DEFAULT_EPISODE, bundled_folder
from transformers_worldvla.data import load_episodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=12, help="how many of the episode, evenly spread")
    parser.add_argument("--window", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = bundled_folder(DEFAULT_CHECKPOINT)
    model = WorldVLAForCausalLM.from_pretrained(folder).eval()
    processor = WorldVLAProcessor.from_pretrained(folder)
    episode = load_episodes(bundled_folder(DEFAULT_EPISODE))[0]
    camera = episode.cameras[0]
    passes = []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    arms = {"code by code": {}} | {
        f"draft, window {window}": {"draft": "previous", "draft_window": window} for window in args.window
    }
    wall = {arm: [] for arm in arms}
    processor_time = {arm: [] for arm in arms}
    forwards = {arm: [] for arm in arms}
    shares = []
    codes = torch.tensor(model.tokens.image_codes)
    for step in torch.linspace(0, len(episode) - 2, args.frames).long().tolist():
        inputs = processor(images=[episode.frame(camera, step)], actions=[episode.actions[step]])
        inputs = model.discretize(**inputs)
        frames = {}
        for arm, options in arms.items():
            passes.clear()
            used, began = time.process_time(), time.perf_counter()
            frames[arm] = model.generate_frames(**inputs, **options)[0, 0]
            wall[arm].append(time.perf_counter() - began)
            processor_time[arm].append(time.process_time() - used)
            forwards[arm].append(len(passes))
        plain = frames["code by code"]
        assert all(torch.equal(frame, plain) for frame in frames.values())
        ids = inputs["input_ids"][0]
        start = int((ids == model.tokens.image_start).nonzero()[-1])
        previous = ids[start : start + len(plain)]
        free = torch.isin(plain, codes)
        shares.append(float((previous == plain)[free].float().mean()))
    print(json.dumps({"frames": args.frames, "threads": args.threads, "codes_right": statistics.mean(shares)}))
    for arm in arms:
        slow = statistics.median(processor_time["code by code"])
        print(
            json.dumps(
                {
                    "arm": arm,
                    "forwards": statistics.mean(forwards[arm]),
                    "median_s": statistics.median(wall[arm]),
                    "cpu_s": statistics.median(processor_time[arm]),
                    "speed_up_cpu": slow / statistics.median(processor_time[arm]),
                    "speed_up_wall": statistics.median(
                        a / b for a, b in zip(wall["code by code"], wall[arm], strict=True)
                    ),
                }
            )
        )


if __name__ == "__main__":
    main()

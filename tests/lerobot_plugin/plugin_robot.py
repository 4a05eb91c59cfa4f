"""The robot of the dataset that LeRobot's own writer made (`fixtures/lerobot_small`), and how to name the plugin."""

from pathlib import Path

from transformers_worldvla.action_tokenization_worldvla import Embodiment

DATASET = Path(__file__).parents[1] / "fixtures" / "lerobot_small" / "v30_image"
ROBOT = Embodiment("toy", (-3.0,) * 4, (3.0,) * 4, action_names=("x", "y", "z", "gripper"), cameras=("front", "wrist"))
PLUGIN = "--policy.discover_packages_path=transformers_worldvla.lerobot"

"""LeRobot itself finds the policy, in both of its ways and under the names of its rules."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from lerobot_environment import require_lerobot

require_lerobot()

REGISTERED = "from lerobot.configs.policies import PreTrainedConfig; "
REGISTERED += "print('worldvla' in PreTrainedConfig.get_known_choices())"


def run(code: str) -> list[str]:
    """Lines that a fresh interpreter prints, in which nothing of ours is imported yet."""
    prepare = "from lerobot_environment import require_lerobot; require_lerobot(); "
    command = [sys.executable, "-c", f"{prepare}\n{REGISTERED}\n{code}\n{REGISTERED}"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
def test_by_the_name_of_the_distribution() -> None:
    try:
        version("lerobot_policy_worldvla")
    except PackageNotFoundError:
        pytest.skip("the distribution is not installed: pip install --no-deps packages/lerobot_policy_worldvla")
    code = "from lerobot.utils.import_utils import register_third_party_plugins; register_third_party_plugins()"
    assert run(code) == ["False", "True"]


@pytest.mark.slow
def test_by_the_option_of_the_command_line() -> None:
    code = "from lerobot.configs.parser import load_plugin; load_plugin('transformers_worldvla.lerobot')"
    assert run(code) == ["False", "True"]


def test_the_factory_derives_every_name_from_the_configuration(checkpoint: Path) -> None:
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

    import transformers_worldvla.lerobot as plugin

    config = make_policy_config("worldvla", checkpoint=str(checkpoint), device="cpu")
    assert type(config) is plugin.LeRobotWorldVLAConfig and config.type == "worldvla"
    assert get_policy_class("worldvla") is plugin.LeRobotWorldVLAPolicy
    before, after = make_pre_post_processors(config)
    assert (before.name, after.name) == ("policy_preprocessor", "policy_postprocessor")

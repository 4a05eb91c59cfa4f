"""WorldVLA as a policy of LeRobot: `lerobot-train`, `lerobot-eval` and LeRobot's robot commands run it.

LeRobot finds it under the name `worldvla` in either of its two ways: the option
`--policy.discover_packages_path=transformers_worldvla.lerobot`, or an installed distribution `lerobot_policy_worldvla`
(in `packages/` of this repository), which does no more than import this package. The module names follow LeRobot's
rules, by which its factory finds policy and processors from the configuration. Everything that decides what the model
sees and says is that of the rest of the library; nothing in the rest of the library imports LeRobot.
"""

from typing import Any

try:
    from .configuration_worldvla import LeRobotWorldVLAConfig
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lerobot":
        raise
    raise ImportError("transformers_worldvla.lerobot is a plugin of LeRobot, which is not installed here") from None

__all__ = ["LeRobotWorldVLAConfig", "LeRobotWorldVLAPolicy", "make_worldvla_pre_post_processors"]


def __getattr__(name: str) -> Any:
    """Policy and processors on first use: LeRobot's commands first want the configuration alone."""
    if name == "LeRobotWorldVLAPolicy":
        from .modeling_worldvla import LeRobotWorldVLAPolicy

        return LeRobotWorldVLAPolicy
    if name == "make_worldvla_pre_post_processors":
        from .processor_worldvla import make_worldvla_pre_post_processors

        return make_worldvla_pre_post_processors
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

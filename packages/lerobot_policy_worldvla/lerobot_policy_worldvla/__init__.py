"""LeRobot imports this distribution because of its name; the policy is registered by the import of the real package."""

from transformers_worldvla.lerobot import LeRobotWorldVLAConfig

__all__ = ["LeRobotWorldVLAConfig"]

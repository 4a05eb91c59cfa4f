"""The robot's end of a WorldVLA policy server: no torch, no transformers, not even `transformers_worldvla`.

    from worldvla_client import ChunkRunner, WorldVLAClient

    with WorldVLAClient("127.0.0.1", 8000) as client:
        chunk = client.infer({"image": picture, "prompt": "open the drawer"})["actions"]  # (K, D) float32

It needs numpy, msgpack and websockets. The server shares its wire format and its way of joining chunks.
"""

from .chunking import ActionTimeline
from .client import ChunkRunner, ServerError, WorldVLAClient
from .protocol import ProtocolError, pack, unpack

__all__ = ["ActionTimeline", "ChunkRunner", "ProtocolError", "ServerError", "WorldVLAClient", "pack", "unpack"]

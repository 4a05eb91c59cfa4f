"""`worldvla serve`: a checkpoint on a port, for robots and simulators."""

import argparse
import os
import ssl
import sys
from pathlib import Path
from typing import Any

from .checkpoints import add_model_arguments, find_checkpoint, positive_float, positive_int
from .errors import UserError

_KEY_VARIABLE = "WORLDVLA_API_KEY"
_EPILOG = f"""\
examples:
  # the bundled small model on this computer, for any openpi client at ws://127.0.0.1:8000
  worldvla serve
  # a checkpoint of one's own, for clients that call its camera by another name
  worldvla serve --model my-checkpoint --camera-map observation/image=image
  # for other computers: with a key and TLS
  {_KEY_VARIABLE}=... worldvla serve --host 0.0.0.0 --tls-cert server.pem --tls-key server.key
  # one action over REST, as from OpenVLA's server
  curl -s localhost:8000/act -H 'Content-Type: application/json' \\
      -d '{{"image": "'$(base64 -w0 now.png)'", "instruction": "open the drawer", "format": "list"}}'

Also there: GET /healthz, GET /metrics (Prometheus). SIGTERM and Ctrl-C answer what is under way, then stop.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "serve",
        help="serve actions to robots and simulators over the network",
        description="Serve a checkpoint: openpi's websocket protocol and OpenVLA's POST /act on one port.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=_port, default=8000, metavar="P", help="port, 0 for any free one (%(default)s)")
    policy = parser.add_argument_group("policy")
    policy.add_argument("--embodiment", metavar="E", help="whose actions, where the checkpoint has several")
    policy.add_argument(
        "--camera-map", nargs="+", default=[], metavar="KEY=CAMERA", help="keys of clients that name cameras otherwise"
    )
    policy.add_argument("--prompt", metavar="TEXT", help="instruction for clients that send none")
    policy.add_argument("--num-actions", type=positive_int, metavar="K", help="length of a chunk (the checkpoint's)")
    policy.add_argument("--entropy", action="store_true", help="answer with the entropy of every bin, too")
    policy.add_argument("--expected-value", action="store_true", help="mean over bins instead of the likeliest bin")
    policy.add_argument(
        "--engine", action="store_true", help="compile the decoder: slow to start, a fraction of the time a plan"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-clients", type=positive_int, default=32, metavar="N", help="at a time (%(default)s)")
    limits.add_argument(
        "--max-batch", type=positive_int, default=8, metavar="N", help="requests answered together (%(default)s)"
    )
    limits.add_argument(
        "--batch-wait",
        type=_milliseconds,
        default=0.0,
        metavar="MS",
        help="that a request waits for others (%(default)s)",
    )
    limits.add_argument(
        "--max-message-mb", type=positive_float, default=16.0, metavar="MB", help="largest message (%(default)s)"
    )
    limits.add_argument(
        "--request-timeout", type=positive_float, default=30.0, metavar="S", help="until it is given up (%(default)s)"
    )
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key", metavar="KEY", help=f"that clients must send (better: the variable {_KEY_VARIABLE})"
    )
    access.add_argument("--tls-cert", metavar="FILE", help="certificate chain (PEM); the port then speaks TLS")
    access.add_argument("--tls-key", metavar="FILE", help="its private key (PEM)")
    parser.add_argument("--json", action="store_true", help="print what was served as JSON, after the server stopped")
    add_model_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    camera_map = _camera_map(args.camera_map)
    tls = _tls(args.tls_cert, args.tls_key)
    source = args.model if _is_adapter(args.model) else find_checkpoint(args.model, args.revision).name

    from ..serving.policy import WorldVLAPolicy
    from ..serving.server import PolicyServer, ServerOptions, bind

    port = bind(args.host, args.port)
    options = ServerOptions(
        api_key=args.api_key or os.environ.get(_KEY_VARIABLE) or None,
        tls=tls,
        max_clients=args.max_clients,
        max_batch=args.max_batch,
        batch_wait=args.batch_wait / 1000,
        request_timeout=args.request_timeout,
        max_message_bytes=int(args.max_message_mb * 2**20),
    )
    policy = WorldVLAPolicy.from_pretrained(
        source,
        revision=args.revision,
        device=args.device,
        dtype=args.dtype,
        embodiment=args.embodiment,
        camera_map=camera_map,
        prompt=args.prompt,
        num_actions=args.num_actions,
        entropy=args.entropy,
        expected_value=args.expected_value,
        engine=args.engine,
    )
    server = PolicyServer(policy, port, options)
    number = port.getsockname()[1]
    address = f"{'wss' if tls else 'ws'}://{args.host}:{number}"
    if args.host not in ("127.0.0.1", "localhost", "::1") and options.api_key is None:
        print("warning: anyone who reaches this address can use the model: set a key", file=sys.stderr, flush=True)
    server.run(lambda: _announce(server.metadata, address))
    return {"model": str(source), "address": address, "metadata": server.metadata}


def _announce(about: dict[str, Any], address: str) -> None:
    print(
        f"serving {about['embodiment']} (cameras {', '.join(about['cameras'])}; {about['num_actions']} actions of "
        f"{about['action_dim']} dimensions) at {address}",
        flush=True,
    )


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port (0 to 65535)")
    return int(text)


def _milliseconds(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else positive_float(text)


def _camera_map(pairs: list[str]) -> dict[str, str]:
    if wrong := [pair for pair in pairs if not all(pair.partition("="))]:
        raise UserError(f"--camera-map {wrong[0]}: write KEY=CAMERA, the client's key first")
    return {pair.rpartition("=")[0]: pair.rpartition("=")[2] for pair in pairs}


def _tls(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    if certificate is None:
        if key is not None:
            raise UserError("--tls-key needs --tls-cert")
        return None
    for file in (certificate, key):
        if file is not None and not Path(file).is_file():
            raise UserError(f"{file}: no such file")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise UserError(f"--tls-cert {certificate}: no certificate with its key in PEM ({error.reason})") from error
    return context


def _is_adapter(model: str | None) -> bool:
    """An adapter's folder need not hold a config; which base it has, it says itself."""
    return model is not None and (Path(model).expanduser() / "adapter_config.json").is_file()

"""A Ray Serve application: replicas of the server, each with its own engine and devices.

`serve run ovis_jax.server.ray_app:build model=ovis-tiny num_replicas=2` starts it.
"""

import os
from contextlib import ExitStack
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, Field, Json, PositiveFloat, PositiveInt
from ray import serve  # pyright: ignore[reportMissingImports]

from ovis_jax.compile_cache import enable_compilation_cache
from ovis_jax.console import model_display_name
from ovis_jax.engine.request import EngineError
from ovis_jax.engine.scheduler import run_engine
from ovis_jax.engine.sizes import choose_sizes
from ovis_jax.loading import load
from ovis_jax.mesh import tensor_parallel_mesh
from ovis_jax.server.app import create_app
from ovis_jax.server.preprocess import RequestLimits, default_max_requests

Options = dict[str, Any] | Json[dict[str, Any]]
"""Ray's options: an object in a config file, or JSON on the command line."""


class Arguments(BaseModel, extra="forbid"):
    """Arguments of `build`: options of `ovis-jax serve`, per replica, and those of a deployment."""

    model: str = "ovis-tiny"
    served_model_name: str | None = None
    api_key: Annotated[str | None, Field(min_length=1, validate_default=True)] = Field(
        default_factory=lambda: os.environ.get("OVIS_API_KEY")
    )
    max_num_seqs: PositiveInt = 8
    max_queued_requests: PositiveInt = 64
    max_model_len: PositiveInt | None = None
    max_new_tokens: PositiveInt = 2048
    request_timeout: PositiveFloat = 300.0
    enable_prefix_caching: bool = True
    dtype: str | None = None
    quantization: str | None = None
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    adapters: str | None = None
    tensor_parallel: PositiveInt = 1
    num_replicas: PositiveInt | Literal["auto"] | None = None
    autoscaling_config: Options | None = None
    ray_actor_options: Options = {}


class Replica:
    """A server with its own engine, in a process to which only its own devices are visible."""

    def __init__(self, args: Arguments):
        self._args, self._stack = args, ExitStack()
        enable_compilation_cache()
        loading = args.model_dump(include={"dtype", "quantization", "kv_cache_dtype", "adapters"})
        ovis = load(args.model, mesh=tensor_parallel_mesh(args.tensor_parallel), **loading)
        _, max_model_len = choose_sizes(ovis, args.max_num_seqs, args.max_model_len)
        engine = run_engine(
            ovis,
            max_num_seqs=args.max_num_seqs,
            max_model_len=max_model_len,
            max_queued_requests=args.max_queued_requests,
            enable_prefix_caching=args.enable_prefix_caching,
        )
        self._scheduler = self._stack.enter_context(engine)

    def __serve_build_asgi_app__(self) -> FastAPI:
        args = self._args
        limits = RequestLimits(
            max_requests=default_max_requests(args.max_num_seqs, args.max_queued_requests),
            max_tokens=args.max_new_tokens,
            request_timeout=args.request_timeout,
        )
        name = args.served_model_name or model_display_name(args.model)
        return create_app([self._scheduler], name, limits=limits, api_key=args.api_key)

    def check_health(self) -> None:
        """Raise an error if the model has failed, so that Ray replaces the replica."""
        if self._scheduler.failure:
            raise EngineError(self._scheduler.failure)

    def __del__(self) -> None:
        self._stack.close()  # Ray calls this after the replica has finished its requests


def build(args: Arguments) -> serve.Application:
    """Return the application, for `serve run`, a Serve config file or `serve.run`."""
    options: dict[str, Any] = {
        "num_replicas": args.num_replicas,
        "ray_actor_options": args.ray_actor_options,
        "max_ongoing_requests": args.max_num_seqs + args.max_queued_requests,
    }
    if args.autoscaling_config or args.num_replicas == "auto":
        target = {"target_ongoing_requests": args.max_num_seqs}
        options["autoscaling_config"] = target | (args.autoscaling_config or {})
    deployment = serve.deployment(name="ovis", **options)
    return deployment(serve.ingress()(Replica)).bind(args)

"""The Ray Serve application: two replicas on loopback, of which one is killed."""

import secrets
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial

import httpx
import pytest
import ray
from openai import OpenAI
from pydantic import ValidationError
from ray import serve
from serving_setup import ENDLESS_FIELDS, FIELDS, read_metrics, user_message

from ovis_jax.server.ray_app import Arguments, build
from ovis_jax.server.sockets import bind_sockets

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def ray_url():
    """The address of two replicas."""
    with bind_sockets("127.0.0.1", 0) as (bound,):
        port = bound.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # otherwise, Ray stores one in ~/.ray
        ray.init(
            num_cpus=2,  # one per replica, even if this machine has only one
            include_dashboard=False,
            object_store_memory=80 * 2**20,
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        sizes = {"max_num_seqs": 4, "max_model_len": 256, "max_new_tokens": 200}
        serve.run(build(Arguments(num_replicas=2, **sizes)))
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()


def test_two_replicas_answer_as_one_server(ray_url):
    with (
        OpenAI(base_url=f"{ray_url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor() as pool,
    ):
        create = partial(client.chat.completions.create, messages=user_message("Who?"), **FIELDS)
        answers = list(pool.map(lambda _: create(), range(10)))
        (text,) = {answer.choices[0].message.content for answer in answers}
        chunks = list(create(stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    counts = set()
    while len(counts) < 2:  # one per replica; they differ, because their sum is odd
        counts.add(read_metrics(ray_url)['ovis_requests_total{status="200"}'])
    assert sum(counts) == 11


def test_no_request_is_lost_that_is_retried_after_a_replica_is_killed(ray_url):
    statuses = []
    http_client = httpx.Client(
        event_hooks={"response": [lambda response: statuses.append(response.status_code)]}
    )
    with (
        OpenAI(
            base_url=f"{ray_url}/v1", api_key="none", max_retries=20, http_client=http_client
        ) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        fields = FIELDS | ENDLESS_FIELDS | {"max_tokens": 100}
        create = partial(client.chat.completions.create, messages=user_message("Go on."), **fields)
        answers = [pool.submit(create) for _ in range(48)]
        next(as_completed(answers))
        actors = ray.util.list_named_actors(all_namespaces=True)
        names = [actor["name"] for actor in actors if actor["name"].startswith("SERVE_REPLICA")]
        assert len(names) == 2
        ray.kill(ray.get_actor(names[0], "serve"))
        texts = {answer.result().choices[0].message.content for answer in answers}
    assert len(texts) == 1
    assert set(statuses) == {200, 500} and statuses.count(200) == 48


def test_arguments_of_the_command_line():
    options = build(Arguments(num_replicas="3", ray_actor_options='{"num_gpus": 1}'))
    deployment = options._bound_deployment
    assert deployment.num_replicas == 3 and deployment.ray_actor_options["num_gpus"] == 1
    automatic = Arguments(num_replicas="auto", autoscaling_config='{"max_replicas": 4}')
    config = build(automatic)._bound_deployment._deployment_config.autoscaling_config
    assert config.max_replicas == 4 and config.target_ongoing_requests == 8
    with pytest.raises(ValidationError, match="max_seqs"):
        Arguments(max_seqs=3)

"""Ovis1.6-Llama3.2 from the checkpoint to answers of the engine, and on a mesh."""

import json
import time

import jax
import numpy as np
import pytest
from golden_copies import GOLDEN_LLAMA
from jax.sharding import Mesh
from serving_setup import SIZES, Submitted

import ovis_jax
from ovis_jax import Sampling
from ovis_jax.engine.request import Request
from ovis_jax.engine.scheduler import run_engine
from ovis_jax.inputs.dataset import read_dataset
from ovis_jax.server.preprocess import convert_messages
from ovis_jax.server.request_schema import ChatRequest
from ovis_jax.sharding import RULES_BY_NAME

CHECKPOINT = GOLDEN_LLAMA / "tiny-f32"
IMAGE = GOLDEN_LLAMA / "images" / "square.png"


@pytest.fixture(scope="module")
def ovis():
    return ovis_jax.load(CHECKPOINT)


def test_repr_names_the_family(ovis):
    assert "tiny-f32: Ovis1.6-Llama3.2 with 206,368 parameters in float32" in repr(ovis)


def test_a_literal_pad_token_is_masked(ovis):
    """As in the original, but only if special tokens in texts are parsed."""
    encode = ovis.processor.encode
    plain = encode("a mirror").tokens
    np.testing.assert_array_equal(encode("a<|end_of_text|> mirror").tokens, plain)
    safe = encode("a<|end_of_text|> mirror", parse_special_tokens=False).tokens
    assert len(safe) > len(plain) and ovis.config.pad_id not in safe


def test_system_turns_of_rows_and_requests(ovis, tmp_path):
    """Rows of a dataset are encoded like requests to the server."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "I."},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    (row,) = read_dataset([path], system_turns=True).rows
    assert list(row.turns) == messages
    body = ChatRequest.model_validate({"model": "a", "messages": messages[:2]})
    turns, _, _ = convert_messages(body.messages, system_turns=True)
    found = ovis.processor.encode(turns).tokens.tolist()
    assert found == ovis.processor.encode(row.turns[:-1]).tokens.tolist()
    assert found != ovis.processor.encode("Who?").tokens.tolist()


@pytest.mark.exhaustive
def test_the_engine_equals_generate(ovis):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    questions = [("Where is the mirror?", [IMAGE]), (prompt, [])]
    with run_engine(ovis, **SIZES) as scheduler:
        submitted = []
        for question, images in questions:
            example = ovis.processor.encode(question, images)
            submitted.append(Submitted())
            submitted[-1].request = Request(
                example.tokens,
                example.pixels,
                sampling=Sampling(),
                seed=0,
                max_new_tokens=24,
                deadline=time.monotonic() + 120,
                on_event=submitted[-1].on_event,
                ignore_eos=True,
                top_logprobs=0,
            )
            scheduler.submit(submitted[-1].request)
        for (question, images), found in zip(questions, submitted, strict=True):
            inputs = ovis.processor([question], [images])
            out = ovis_jax.generate(ovis.model, ovis.params, inputs, max_new_tokens=24, eos_ids=())
            found.wait()
            ids = [x.token.token_id for delta in found.events for x in delta.logprobs]
            assert ids == np.asarray(out.tokens)[0].tolist()
            assert found.text() == ovis.processor.tokenizer.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES_BY_NAME)
def test_on_a_mesh_the_logits_are_the_same(ovis, rules):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    sharded = ovis_jax.load(CHECKPOINT, mesh=mesh, rules=rules)
    inputs = ovis.processor(["Where is the mirror?"] * 2, [[IMAGE]] * 2)
    expected = ovis_jax.forward(ovis.model, ovis.params, inputs)
    found = ovis_jax.forward(sharded.model, sharded.params, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-3)

"""Scores of answers against forward, generation and training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations

from ovis_jax import encode_answers, score
from ovis_jax.errors import PromptError, RequestError
from ovis_jax.inference import label_logits
from ovis_jax.inference.generate import generate
from ovis_jax.inputs.batch import Inputs, pad_batch, pad_rows
from ovis_jax.inputs.open_image import open_image
from ovis_jax.loading import load
from ovis_jax.model.ovis import forward
from ovis_jax.training.losses import answer_log_probs

PROMPTS = ["Who is there?", "<image>\nCount to ten.", "First <image> then <image>. Why?"]
ANSWERS = [["Nobody.", "A man"], ["One two three", "1"], ["No", "Because the first is wide."]]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def ovis(shallow_checkpoint):
    return load(shallow_checkpoint)


@pytest.fixture(scope="module")
def images(golden):
    wide, square = (open_image(golden / "images" / f"{name}.png") for name in ("wide", "square"))
    return [[], [wide], [square, wide]]


@pytest.fixture(scope="module")
def inputs(ovis, images) -> Inputs:
    return ovis.processor(PROMPTS, images)


@pytest.fixture(scope="module")
def answers(ovis) -> np.ndarray:
    found = encode_answers(ovis.processor, ANSWERS)
    assert found.shape == (3, 2, 24) and len({tuple(x) for x in found.reshape(6, -1)}) == 6
    return found


@pytest.fixture(scope="module")
def scores(ovis, inputs, answers):
    return score(ovis.model, ovis.params, inputs, answers)


def ids_of(answer: np.ndarray) -> list[int]:
    return [i for i in answer.tolist() if i != -100]


@pytest.mark.slow
def test_each_token_equals_forward_on_the_tokens_before_it(ovis, inputs, answers, scores):
    """Token by token, without the later tokens in the sequence."""
    prompt, text = inputs.tokens[0][inputs.positions[0] >= 0], ids_of(answers[0, 0])
    for n, token in enumerate(text):
        so_far = [np.concatenate([prompt, text[:n]])]
        logits = forward(ovis.model, ovis.params, pad_batch(so_far, inputs.pixels[:0], ovis.config))
        logits = logits[0, len(prompt) + n - 1]
        expected = jax.nn.log_softmax(logits)[token]
        assert abs(scores.token_log_probs[0, 0, n] - expected) < TOLERANCE
        assert scores.token_greedy[0, 0, n] == (jnp.argmax(logits) == token)
    assert scores.lengths[0, 0] == len(text) > 4
    assert not scores.token_log_probs[0, 0, len(text) :].any()
    total = scores.token_log_probs.sum(axis=-1)
    np.testing.assert_allclose(scores.log_probs, total, rtol=1e-6)
    np.testing.assert_allclose(scores.mean_log_probs, total / scores.lengths, rtol=1e-6)


@pytest.mark.slow
def test_scores_equal_those_of_training(ovis, images, scores):
    """The ids and log-probabilities are those of the same conversation as a training example."""
    examples = [
        ovis.processor.encode_training_example(
            [{"role": "user", "content": asked}, {"role": "assistant", "content": said[0]}], shown
        )
        for asked, said, shown in zip(PROMPTS, ANSWERS, images, strict=True)
    ]
    pixels = np.concatenate([example.pixels for example in examples])
    batch = pad_batch([example.tokens for example in examples], pixels, ovis.config)
    labels = pad_rows([example.labels for example in examples], batch.tokens.shape[1], -100)
    hidden = ovis.model.last_hidden_states(ovis.params, batch)
    expected = answer_log_probs(ovis.model, ovis.params, hidden, jnp.array(labels))
    np.testing.assert_allclose(scores.log_probs[:, 0], expected, atol=10 * TOLERANCE)


@pytest.mark.slow
def test_scores_in_chunks(ovis, inputs, answers, scores, monkeypatch):
    limit = 6 * 5 * ovis.config.decoder.vocab_size
    monkeypatch.setattr(label_logits, "LOGITS_PER_CHUNK", limit)
    jax.clear_caches()
    found = score(ovis.model, ovis.params, inputs, answers)
    jax.clear_caches()
    np.testing.assert_allclose(found.token_log_probs, scores.token_log_probs, atol=TOLERANCE)
    assert np.array_equal(found.token_greedy, scores.token_greedy)


@pytest.mark.slow
def test_scores_of_greedy_answers_equal_those_of_generate(ovis, inputs):
    out = generate(ovis.model, ovis.params, inputs, max_new_tokens=24, eos_ids=())
    greedy = np.asarray(out.tokens)
    other = greedy.copy()
    other[:, 5] = 300 + (other[:, 5] == 300)
    found = score(ovis.model, ovis.params, inputs, np.stack([greedy, other], axis=1))
    np.testing.assert_allclose(found.token_log_probs[:, 0], out.log_probs, atol=TOLERANCE)
    assert found.greedy.tolist() == [[True, False]] * 3
    assert found.token_greedy[:, 0].all() and found.token_greedy[:, 1, :5].all()
    assert not found.token_greedy[:, 1, 5].any()


def test_other_rows_and_padding_change_nothing(ovis, inputs, answers, scores):
    alone = score(ovis.model, ovis.params, ovis.processor(PROMPTS[:1]), answers[:1])
    np.testing.assert_allclose(alone.log_probs, scores.log_probs[:1], atol=10 * TOLERANCE)
    shift = (inputs.positions < 0).sum(axis=1)
    assert shift[:2].all()
    tokens, positions = (
        np.stack([np.roll(row, n) for row, n in zip(rows, shift, strict=True)])
        for rows in inputs[:2]
    )
    left = score(ovis.model, ovis.params, Inputs(tokens, positions, inputs.pixels), answers)
    np.testing.assert_allclose(left.log_probs, scores.log_probs, atol=10 * TOLERANCE)


def test_a_row_may_have_fewer_answers_or_none(ovis, inputs, answers, scores):
    fewer, positions = answers.copy(), inputs.positions.copy()
    fewer[1, 1], positions[2] = -100, -1
    found = score(ovis.model, ovis.params, inputs._replace(positions=positions), fewer)
    there = np.array([[True, True], [True, False], [False, False]])
    np.testing.assert_allclose(
        found.log_probs, np.where(there, scores.log_probs, -np.inf), atol=10 * TOLERANCE
    )
    assert (found.lengths > 0).tolist() == there.tolist()
    assert not found.greedy[~there].any() and not found.token_log_probs[~there].any()


def test_prompts_of_several_blocks(ovis, answers):
    """Their kernel bounds the window by columns, so no padding may precede an answer."""
    inputs = ovis.processor(["x " * 60 + "Who?", PROMPTS[0]])
    assert inputs.tokens.shape[1] > 128
    both = score(ovis.model, ovis.params, inputs, answers[[0, 0]])
    alone = score(ovis.model, ovis.params, ovis.processor(PROMPTS[:1]), answers[:1])
    np.testing.assert_allclose(both.log_probs[1], alone.log_probs[0], atol=10 * TOLERANCE)


def test_similar_lengths_share_a_program_inside_jit_too(ovis, answers):
    inputs = ovis.processor(PROMPTS[:1])
    scored = score(ovis.model, ovis.params, inputs, answers[:1])
    with compilations() as found:
        other = encode_answers(ovis.processor, [["Somebody with a hat.", "No"]])
        score(ovis.model, ovis.params, ovis.processor(["Who?"]), other)
    assert found == []
    inside = jax.jit(lambda params, ids: score(ovis.model, params, inputs, ids).log_probs)
    np.testing.assert_allclose(inside(ovis.params, answers[:1]), scored.log_probs, atol=TOLERANCE)


def test_encoded_answers_equal_those_in_training(ovis):
    processor = ovis.processor
    assert encode_answers(processor, [["A", "B"]], add_end_of_turn=False).shape == (1, 2, 1)
    closed, open_end, unstripped = (
        ids_of(encode_answers(processor, [[" red"]], **options)[0, 0])
        for options in ({}, {"add_end_of_turn": False}, {"add_end_of_turn": False, "strip": False})
    )
    assert closed == [*open_end, processor.tokenizer.token_to_id("<end_of_turn>")]
    assert unstripped != open_end and processor.tokenizer.decode(unstripped) == " red"
    uneven = encode_answers(processor, [["A"], ["A", "B"]])
    assert (uneven[0, 1] == -100).all() and uneven[0, 0].tolist() == uneven[1, 0].tolist()


@pytest.mark.parametrize(
    "answers, message",
    [
        ([], "a list of texts for each prompt"),
        ("Yes", "a list of texts for each prompt"),
        ([[]], r"answers\[0\]"),
        (["Yes"], r"answers\[0\] is 'Yes'"),
        ([["Yes", 3]], r"answers\[0\]\[1\] is 3"),
        ([["<image>"]], r"answers\[0\]\[0\]"),
        ([["A", " "]], r"answers\[0\]\[1\] is empty"),
    ],
)
def test_bad_texts(ovis, answers, message):
    with pytest.raises(PromptError, match=message):
        encode_answers(ovis.processor, answers, add_end_of_turn=False)


def test_bad_ids(ovis, inputs, answers):
    def refused(given) -> str:
        with pytest.raises(RequestError) as caught:
            score(ovis.model, ovis.params, inputs, given)
        return str(caught.value)

    assert "[3, 24]" in refused(answers[:, 0])
    assert "[3, 2, 0]" in refused(answers[..., :0])
    assert "for 2 prompts, but inputs contain 3" in refused(answers[:2])
    assert "contain -300" in refused(np.where(answers == -100, -300, answers))
    assert "contain float32" in refused(answers.astype(np.float32))
    assert "before an id" in refused(answers[..., ::-1])

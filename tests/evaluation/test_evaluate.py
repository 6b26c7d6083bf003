"""ovis-tiny gives the same answers through `ovis-jax eval`, the recipe, lmms-eval and VLMEvalKit.

The two harnesses depend on PyTorch and are not installed here. `tests/harnesses.py` has fakes of
their base classes.
"""

import json

import harnesses
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from ovis_jax.cli import app
from ovis_jax.errors import RequestError
from ovis_jax.evaluation import batch_answering, evaluate
from ovis_jax.evaluation.questions import read_questions
from ovis_jax.inference.score import Scores
from recipes.ovis_tiny import measure_accuracy

QUESTIONS, BATCH, TOKENS = 26, 13, 64


def run_eval(*arguments: object, strict: bool = True):
    """Run `ovis-jax eval`, by default with the comparison that the recipe uses, too."""
    sizes = ["--batch-size", BATCH, "--max-new-tokens", TOKENS, *(["--strict"] if strict else [])]
    return CliRunner().invoke(app, [str(x) for x in ["eval", *arguments, *sizes]])


def parse_table(text: str) -> dict[str, list[str]]:
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.fixture(scope="module")
def evaluated(ovis, scene_questions, tmp_path_factory):
    """The printed table, the results file, and the results by question id."""
    out = tmp_path_factory.mktemp("results") / "results.jsonl"
    result = run_eval(scene_questions, "--output", out)
    assert result.exit_code == 0, result
    header, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert header["format"] == "ovis-jax eval 2" and header["strict"] is True
    return parse_table(result.stdout), out, {line["id"]: line for line in lines}


@pytest.mark.slow
def test_command_and_recipe_agree(ovis, scene_questions, evaluated, monkeypatch):
    monkeypatch.setattr(measure_accuracy, "BATCH_SIZE", BATCH)
    table, _, results = evaluated
    found = list(measure_accuracy.answer_test_questions(ovis, scene_questions))
    assert len(found) == len(results) == QUESTIONS
    for answer, line in found:
        result = results[line["id"]]
        assert (result["answer"], result["correct"]) == (answer.text, answer.is_correct)
    shares = {
        kind: columns[measure_accuracy.ALL]
        for kind, columns in measure_accuracy.summarize_accuracy(found).items()
    }
    mean = shares.pop(measure_accuracy.MEAN)
    assert 0.8 < mean <= 1
    assert {kind: f"{share:.1%}" for kind, share in shares.items()} == {
        kind: cells[2] for kind, cells in table.items() if kind != "all"
    }
    assert table["all"][2] == f"{mean:.1%}"


@pytest.mark.slow
def test_interrupted_evaluation_resumes(scene_questions, evaluated, tmp_path, monkeypatch):
    table, complete, results = evaluated
    lines = complete.read_text().splitlines(keepends=True)
    out = tmp_path / "results.jsonl"
    out.write_text("".join(lines[:20]) + lines[20][:30])
    answered = []

    def record(*arguments, **options):
        for answer in answer_rows(*arguments, **options):
            answered.append(answer.row.name)
            yield answer

    answer_rows = evaluate.answer_rows
    monkeypatch.setattr(evaluate, "answer_rows", record)
    assert parse_table(run_eval(scene_questions, "--output", out).stdout) == table
    assert len(answered) == QUESTIONS - 19
    resumed = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(x["id"] for x in resumed[1:]) == sorted(results)
    before = out.read_bytes()
    assert parse_table(run_eval(scene_questions, "--output", out).stdout) == table
    assert out.read_bytes() == before and len(answered) == QUESTIONS - 19


def test_results_of_another_evaluation_are_rejected(scene_questions, evaluated, golden, tmp_path):
    _, out, _ = evaluated
    before = out.read_bytes()

    def error_of(*arguments: object, strict: bool = True) -> str:
        result = run_eval(*arguments, "--output", out, strict=strict)
        assert result.exit_code == 1 and out.read_bytes() == before
        return str(result.exception)

    assert "(model is " in error_of(scene_questions, "--model", golden / "tiny-f32")
    fewer = scene_questions.parent / "fewer.jsonl"
    fewer.write_text("\n".join(scene_questions.read_text().splitlines()[:-1]))
    assert "(questions is " in error_of(fewer)
    assert "(max_partition is 9 there and 4 here)" in error_of(
        scene_questions, "--max-partition", 4
    )
    assert "(strict is True there and False here)" in error_of(scene_questions, strict=False)
    other = tmp_path / "other.jsonl"
    other.write_text(scene_questions.read_text())
    assert "is not a results file" in str(run_eval(scene_questions, "--output", other).exception)
    assert other.read_text() == scene_questions.read_text()


def test_options_by_log_probability(ovis, scene_questions, tmp_path, monkeypatch):
    """The most probable letter among the options of the question; `score` has its own tests."""
    question = {"question": "Which shape?", "answer": "B"}
    path = tmp_path / "options.jsonl"
    lines = [question | {"choices": list("xyz")[:number]} for number in (2, 3)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    scored = []

    def fake_score(model, params, inputs, answers):
        """Later letters are more probable; a missing third answer has log-probability -inf."""
        scored.append(ovis.processor.tokenizer.decode(answers[1, :, 0].tolist()))
        assert answers.shape == (BATCH, 3, 1) and inputs.tokens.shape[0] == BATCH
        log_probs = jnp.where(answers[..., 0] >= 0, -3.0 + jnp.arange(3), -jnp.inf)
        zeros = jnp.zeros(answers.shape)
        return Scores(log_probs, zeros, zeros > 0, jnp.zeros(answers.shape[:2], jnp.int32))

    monkeypatch.setattr(batch_answering, "score", fake_score)
    out = tmp_path / "results.jsonl"
    assert run_eval(path, "--choose-by", "log_prob", "--output", out).exit_code == 0
    found = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert [(x["id"], x["parsed"], x["correct"]) for x in found] == [
        ("options-1", "B", True),
        ("options-2", "C", False),
    ]
    assert scored == ["ABC"]


@pytest.mark.parametrize("choose_by", ["letter", "log_prob"])
def test_question_that_is_too_long_is_named(ovis, tmp_path, choose_by):
    rows = [{"question": text, "choices": ["x", "y"], "answer": "A"} for text in ("?", "so " * 999)]
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    message = str(run_eval(tmp_path, "--choose-by", choose_by).exception)
    assert "long.jsonl: row 2 is " in message and "1024" in message


def test_answers_are_compared_as_people_grade_unless_strict(ovis, tmp_path, monkeypatch):
    """The same answers, compared in both ways; the results file states which one was used."""
    questions = [
        {"question": "Which?", "choices": ["wolf", "cat"], "answer": "A"},
        {"question": "Is it?", "answer": "Yes"},
        {"question": "Who?", "answer": "A wolf."},
        {"question": "Who?", "answer": "A cat."},
    ]
    texts = dict(zip("1234", ("A WOLF", "Yes, it is.", "wolf", "wolf"), strict=True))
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))

    def answer_rows(ovis, rows, **options):
        for row in rows:
            text = texts[row.name[-1]]
            yield batch_answering.ScoredAnswer(row, row.turns[-1]["content"], text, jnp.zeros(1))

    monkeypatch.setattr(evaluate, "answer_rows", answer_rows)
    for strict, expected in ((True, [False] * 4), (False, [True, True, True, False])):
        out = tmp_path / f"{strict}.jsonl"
        assert run_eval(tmp_path / "q.jsonl", "--output", out, strict=strict).exit_code == 0
        header, *results = [json.loads(line) for line in out.read_text().splitlines()]
        assert header["strict"] is strict
        assert [result["correct"] for result in results] == expected
        assert [result["answer"] for result in results] == list(texts.values())


@pytest.mark.parametrize("size", ["auto", "auto:2", "0", 0, "2.5"])
def test_lmms_eval_batch_size_must_be_a_number(monkeypatch, size):
    """lmms-eval also passes the value of --max_batch_size."""
    harnesses.install_lmms_eval(monkeypatch)
    from ovis_jax.evaluation.lmms_eval_model import OvisForLmmsEval

    with pytest.raises(RequestError, match=f"batch_size is {size!r}, expected a number of at leas"):
        OvisForLmmsEval(batch_size=size, max_batch_size=4)


@pytest.mark.exhaustive
def test_lmms_eval(ovis, scene_questions, evaluated, monkeypatch):
    harnesses.install_lmms_eval(monkeypatch)
    from ovis_jax.evaluation.lmms_eval_entry import manifest

    made = manifest()
    assert made.model_id == "ovis_jax"
    model = harnesses.load_class(made.simple_class_path)(pretrained="ovis-tiny", batch_size=BATCH)
    assert model.is_simple
    questions = [q for q in read_questions(scene_questions) if len(q.prompt) == 1]
    model.task_dict = {"drawn": {"test": questions}}
    settings = {"max_new_tokens": TOKENS, "temperature": 0, "do_sample": False, "until": ["\n\n"]}

    def images(question):
        return question.row.open_images()

    requests = [
        harnesses.Instance((q.prompt[0]["content"], dict(settings), images, n, "drawn", "test"))
        for n, q in enumerate(questions)
    ]
    texts = model.generate_until(requests)
    _, _, results = evaluated
    assert len(texts) > 20 and texts == [results[q.id]["answer"] for q in questions]
    assert [model.cache_hook.kept[n] for n in (0, -1)] == [texts[0], texts[-1]]
    _check_loglikelihood(model, questions, texts, images)
    _check_multi_round(model, questions, texts, images, settings)
    short = requests[0].args[:1] + ({**settings, "until": [" "]},) + requests[0].args[2:]
    assert model.generate_until([harnesses.Instance(short)]) == [texts[0].split(" ")[0]]
    beams = requests[0].args[:1] + ({"num_beams": 4},) + requests[0].args[2:]
    with pytest.raises(RequestError, match="num_beams is 4"):
        model.generate_until([harnesses.Instance(beams)])
    video = requests[0].args[:2] + (lambda _: ["a.mp4"],) + requests[0].args[3:]
    with pytest.raises(RequestError, match="a task has an input of type str"):
        model.generate_until([harnesses.Instance(video)])


def _check_loglikelihood(model, questions, texts, images) -> None:
    """The greedy answer is reported as greedy and has the lowest loss, as lmms-eval expects."""
    n = next(n for n, q in enumerate(questions) if q.row.kind == "shape")
    other = next(text for text in texts if text != texts[n])
    asked = questions[n].prompt[0]["content"]
    requests = [
        harnesses.Instance((asked, target, images, n, "drawn", "test"))
        for target in (other, lambda question: texts[n])
    ]
    (worse, is_other), (best, is_greedy) = model.loglikelihood(requests)
    assert is_greedy and not is_other
    assert 0 <= best < 0.5 < worse


def _check_multi_round(model, questions, texts, images, settings) -> None:
    """Each round is built from the previous answers until the task ends."""
    seen = []

    def more(question, *, previous_output, round_idx, previous_round_info):
        seen.append((list(previous_output), round_idx, previous_round_info))
        asked = question.prompt[0]["content"]
        return images(question), asked, round_idx == 2, previous_output, f"info {round_idx}"

    asked = questions[0].prompt[0]["content"]
    request = harnesses.Instance((asked, settings, images, more, 0, "drawn", "test"))
    assert model.generate_until_multi_round([request]) == [[texts[0]] * 2]
    assert seen == [([texts[0]], 1, None), ([texts[0]] * 2, 2, "info 1")]


@pytest.mark.slow
def test_vlmevalkit(ovis, scene_questions, evaluated, monkeypatch):
    harnesses.install_vlmeval(monkeypatch)
    from ovis_jax.evaluation.vlmeval_model import OvisForVLMEvalKit, message_to_prompt

    model = OvisForVLMEvalKit("ovis-tiny", max_new_tokens=TOKENS)
    questions = {q.row.kind: q for q in read_questions(scene_questions)}
    for kind in ("shape", "compare", "text"):
        question = questions[kind]
        message = [{"type": "image", "value": path} for path in question.row.images]
        text = question.prompt[0]["content"].replace("<image>", "").strip()
        said = model.generate([*message, {"type": "text", "value": text}], "drawn")
        assert said == evaluated[2][question.id]["answer"]
    picture = questions["shape"].row.images[0]
    model.set_dump_image(lambda line: [picture])
    line = {"question": "Which?", "A": "x", "B": "y", "C": float("nan"), "hint": float("nan")}
    assert model.use_custom_prompt("some_MCQ") and not model.use_custom_prompt("some_VQA")
    assert model.build_prompt(line, "some_MCQ") == [
        {
            "type": "text",
            "value": "Which?\nA. x\nB. y"
            "\nAnswer with the option's letter from the given choices directly.",
        },
        {"type": "image", "value": picture},
    ]
    (asked, _) = model.build_prompt(line, "some_Y/N")
    assert asked["value"] == "Which?\nAnswer the question using a single word or phrase."
    image, text = {"type": "image", "value": picture}, {"type": "text", "value": "And <image>?"}
    assert message_to_prompt([text, image]).text == "<image>\nAnd ?"
    assert message_to_prompt([text, image, text]).text == "And ?\n<image>\nAnd ?"
    with pytest.raises(RequestError, match="'video'"):
        message_to_prompt([{"type": "video", "value": "a.mp4"}])

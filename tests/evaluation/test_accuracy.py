"""One accuracy, however ovis-tiny is asked: by the command, the recipe, or a harnesses.

lmms-eval and VLMEvalKit pull in PyTorch and are not installed here. Small stand-ins of their base
classes are, with what their harnesses call; `tests/harnesses.py` says what of them is copied.
"""

import json

import harnesses
import numpy as np
import pytest
from typer.testing import CliRunner

from ovis_jax.cli import app
from ovis_jax.errors import RequestError
from ovis_jax.evaluation import run as running
from ovis_jax.evaluation.questions import read_questions
from ovis_jax.inference.score import Scores
from recipes.ovis_tiny import score

QUESTIONS, BATCH, TOKENS = 26, 13, 64


def run(*arguments: object):
    sizes = ["--batch", BATCH, "--max-new-tokens", TOKENS]
    return CliRunner().invoke(app, [str(x) for x in ["eval", *arguments, *sizes]])


def table_of(text: str) -> dict[str, list[str]]:
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.fixture(scope="module")
def evaluated(ovis, drawn, tmp_path_factory):
    """The command's table, its file of results, and the results by question."""
    out = tmp_path_factory.mktemp("results") / "results.jsonl"
    result = run(drawn, "--out", out)
    assert result.exit_code == 0, result
    head, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert head["format"] == "ovis-jax eval 1"
    return table_of(result.stdout), out, {line["id"]: line for line in lines}


def test_the_command_counts_as_the_recipe_does(ovis, drawn, evaluated, monkeypatch):
    monkeypatch.setattr(score, "BATCH", BATCH)
    counts, _, results = evaluated
    found = list(score.answers(ovis, drawn))
    assert len(found) == len(results) == QUESTIONS
    for answer, line in found:
        result = results[line["id"]]
        assert (result["answer"], result["right"]) == (answer.text, answer.right)
    shares = {kind: columns[score.ALL] for kind, columns in score.shares_by_kind(found).items()}
    mean = shares.pop(score.MEAN)
    assert 0.8 < mean < 1.01
    assert {kind: f"{share:.1%}" for kind, share in shares.items()} == {
        kind: cells[2] for kind, cells in counts.items() if kind != "all"
    }
    assert counts["all"][2] == f"{mean:.1%}"


def test_a_run_goes_on_where_it_was_stopped(drawn, evaluated, tmp_path, monkeypatch):
    counts, whole, results = evaluated
    lines = whole.read_text().splitlines(keepends=True)
    out = tmp_path / "results.jsonl"
    out.write_text("".join(lines[:20]) + lines[20][:30])
    asked = []

    def note(*arguments, **options):
        for answer in answer_rows(*arguments, **options):
            asked.append(answer.row.name)
            yield answer

    answer_rows = running.answer_rows
    monkeypatch.setattr(running, "answer_rows", note)
    assert table_of(run(drawn, "--out", out).stdout) == counts
    assert len(asked) == QUESTIONS - 19
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(x["id"] for x in again[1:]) == sorted(results)
    before = out.read_bytes()
    assert table_of(run(drawn, "--out", out).stdout) == counts
    assert out.read_bytes() == before and len(asked) == QUESTIONS - 19


def test_results_of_something_else_are_refused(drawn, evaluated, golden, tmp_path):
    _, out, _ = evaluated
    before = out.read_bytes()

    def refused(*arguments: object) -> str:
        result = run(*arguments, "--out", out)
        assert result.exit_code == 1 and out.read_bytes() == before
        return str(result.exception)

    assert "results of other model" in refused(drawn, "--model", golden / "tiny-f32")
    fewer = drawn.parent / "fewer.jsonl"
    fewer.write_text("\n".join(drawn.read_text().splitlines()[:-1]))
    assert "results of other questions" in refused(fewer)
    assert "results of other max partition: 9, not 4" in refused(drawn, "--max-partition", 4)
    other = tmp_path / "other.jsonl"
    other.write_text(drawn.read_text())
    assert "not a file of results" in str(run(drawn, "--out", other).exception)
    assert other.read_text() == drawn.read_text()


def test_options_by_score(ovis, drawn, tmp_path, monkeypatch):
    """The likeliest of the letters that a question has; what `score` says is tested with it."""
    asked = {"question": "Which shape?", "answer": "B"}
    path = tmp_path / "options.jsonl"
    lines = [asked | {"choices": list("xyz")[:number]} for number in (2, 3)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    given = []

    def fake(model, params, inputs, answers):
        """Likelier the later its letter; a row without a third answer has no log-probability."""
        given.append(ovis.processor.tokenizer.decode(answers[1, :, 0].tolist()))
        assert answers.shape == (BATCH, 3, 1) and inputs.tokens.shape[0] == BATCH
        log_probs = np.where(answers[..., 0] >= 0, -3.0 + np.arange(3), -np.inf)
        return Scores(log_probs, *[np.zeros(1)] * 3)

    monkeypatch.setattr(running, "score", fake)
    out = tmp_path / "results.jsonl"
    assert run(path, "--by", "score", "--out", out).exit_code == 0
    found = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert [(x["id"], x["read"], x["right"]) for x in found] == [
        ("options-1", "B", True),
        ("options-2", "C", False),
    ]
    assert given == ["ABC"]


@pytest.mark.parametrize("by", ["letter", "score"])
def test_a_row_that_the_model_cannot_be_given_is_named(ovis, tmp_path, by):
    rows = [{"question": text, "choices": ["x", "y"], "answer": "A"} for text in ("?", "so " * 999)]
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    message = str(run(tmp_path, "--by", by).exception)
    assert "long.jsonl: row 2: " in message and "1024" in message


def test_lmms_eval(ovis, drawn, evaluated, monkeypatch):
    harnesses.install_lmms_eval(monkeypatch)
    from ovis_jax.evaluation.lmms_eval_entry import manifest

    made = manifest()
    assert made.model_id == "ovis_jax"
    model = harnesses.load_class(made.simple_class_path)(pretrained="ovis-tiny", batch_size=BATCH)
    assert model.is_simple
    questions = [q for q in read_questions(drawn) if len(q.prompt) == 1]
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
    _check_rounds(model, questions, texts, images, settings)
    short = requests[0].args[:1] + ({**settings, "until": [" "]},) + requests[0].args[2:]
    assert model.generate_until([harnesses.Instance(short)]) == [texts[0].split(" ")[0]]
    beams = requests[0].args[:1] + ({"num_beams": 4},) + requests[0].args[2:]
    with pytest.raises(RequestError, match="num_beams is 4"):
        model.generate_until([harnesses.Instance(beams)])
    video = requests[0].args[:2] + (lambda _: ["a.mp4"],) + requests[0].args[3:]
    with pytest.raises(RequestError, match="a task gave a str"):
        model.generate_until([harnesses.Instance(video)])


def _check_loglikelihood(model, questions, texts, images) -> None:
    """The greedy answer is greedy, and has the least loss, which is what lmms-eval looks for."""
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


def _check_rounds(model, questions, texts, images, settings) -> None:
    """Each round is made from the answers so far, and the last call ends them."""
    seen = []

    def more(question, *, previous_output, round_idx, previous_round_info):
        seen.append((list(previous_output), round_idx, previous_round_info))
        asked = question.prompt[0]["content"]
        return images(question), asked, round_idx == 2, previous_output, f"info {round_idx}"

    asked = questions[0].prompt[0]["content"]
    request = harnesses.Instance((asked, settings, images, more, 0, "drawn", "test"))
    assert model.generate_until_multi_round([request]) == [[texts[0]] * 2]
    assert seen == [([texts[0]], 1, None), ([texts[0]] * 2, 2, "info 1")]


def test_vlmevalkit(ovis, drawn, evaluated, monkeypatch):
    harnesses.install_vlmeval(monkeypatch)
    from ovis_jax.evaluation.vlmeval_model import OvisJax, to_request

    model = OvisJax("ovis-tiny", max_new_tokens=TOKENS)
    questions = {q.row.kind: q for q in read_questions(drawn)}
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
    assert to_request([text, image]).text == "<image>\nAnd ?"
    assert to_request([text, image, text]).text == "And ?\n<image>\nAnd ?"
    with pytest.raises(RequestError, match="'video'"):
        to_request([{"type": "video", "value": "a.mp4"}])

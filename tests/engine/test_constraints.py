"""Answers with a constraint: each one that ends by itself meets it, and other answers are equal."""

import json
import operator
import re
import threading
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from compilations import compilations
from serving_setup import MAX_NUM_SEQS, is_idle

from ovis_jax import Sampling
from ovis_jax.config import OvisConfig
from ovis_jax.engine.constraints import Constraint, ConstraintCompiler, ConstraintError, Matcher
from ovis_jax.engine.request import Failure, Logprob, Request, Sequence, TokenLogprobs
from ovis_jax.engine.runner import ModelRunner
from ovis_jax.inputs.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "gemma": ROOT / "ovis_jax/assets/ovis-tiny",
    "llama": ROOT / "tests/golden-llama/tiny-f32",
}

TEXT = {"type": "string", "maxLength": 6}
CHILD = {"type": "object", "properties": {"x": TEXT}, "additionalProperties": False}
SCHEMAS = [
    {"type": "null"},
    {"type": "boolean"},
    {"type": "integer", "minimum": -20, "maximum": 3000},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "multipleOf": 0.25},
    TEXT,
    {"type": "string", "minLength": 3, "maxLength": 9},
    {"type": "string", "pattern": "^[A-C]{2}-[0-9]{1,3}$"},
    {"type": "string", "pattern": "^[é-ü😀 .']{1,5}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "ipv4"},
    {"enum": ["a .", "b ?", 3, None, {"c": [1]}]},
    {"const": {"never ,": ["n't", 1.5]}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    {"type": "array", "prefixItems": [TEXT, {"type": "null"}], "items": False, "minItems": 2},
    CHILD | {"required": ["x"]},
    {"type": "object", "properties": {"a": CHILD, "b": TEXT}, "additionalProperties": False},
    {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, TEXT]},
    {"oneOf": [{"const": "a"}, {"type": "array", "maxItems": 0}]},
    {"type": ["boolean", "null"]},
    {"$defs": {"t": {"type": "array", "items": CHILD, "maxItems": 2}}, "$ref": "#/$defs/t"},
]
PATTERNS = [
    "",
    "a{0,5}",
    r"\d{3}-\d{2,4}",
    "(yes|no)( sir)?",
    "[^a]{4}",
    r"[a-dÀ-Ö.!? ]{1,9}\n",
    "[à-ÿ€😀]{2,3}",
]
CHOICES = ["a", "a b", "a/b", 'say "no" .', "tab\there", "naïve 😀\n", "[x](y)*", "<eos>", ""]
ENDLESS = Sampling(repetition_penalty=0.01)


@pytest.fixture(scope="module", params=FOLDERS)
def random_answer(request):
    """Make an answer of random tokens of one tokenizer, as the engine would make it."""
    folder = FOLDERS[request.param]
    config, tokenizer = OvisConfig.from_folder(folder), Tokenizer.from_folder(folder)
    vocab_size = config.decoder.vocab_size + 40  # padded
    compiler = ConstraintCompiler(tokenizer, vocab_size, config.eos_ids)

    def answer(kind, value: str, seed: int) -> str:
        matchers = compiler.compile(Constraint("the field", kind, value)).result(60)
        deltas, rng = [], np.random.default_rng(seed)
        asked = Request(
            np.zeros(1, np.int32),
            np.zeros((0, 1, 1, 3), np.float32),
            Sampling(),
            seed,
            400,
            0.0,
            deltas.append,
            matchers=matchers,
        )
        sequence, (matcher,), reason = Sequence(asked, 0, tokenizer, config.eos_ids), matchers, None
        while reason is None:
            matcher.wait()
            bits = np.unpackbits(matcher.mask.view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits)
            assert allowed.max() < len(tokenizer.pieces)
            token = Logprob(int(rng.choice(allowed)), 0.0)
            assert token.token_id in config.eos_ids or token.token_id not in tokenizer.special_ids
            reason = sequence.append(TokenLogprobs(token, ())) or sequence.check_constraint()
        assert reason == "stop"
        return "".join(delta.text for delta in deltas)

    return answer


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_answers_to_a_schema_are_valid(random_answer, schema):
    for seed in range(3):
        answer = random_answer("json", json.dumps(schema), seed)
        jsonschema.validate(json.loads(answer), schema)
        assert json.loads(answer) in ("", None) or answer == answer.strip()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_to_a_pattern_match_it(random_answer, pattern):
    for seed in range(3):
        assert re.fullmatch(pattern, random_answer("regex", pattern, seed))


def test_choices_and_grammars(random_answer):
    found = {random_answer("choice", json.dumps(CHOICES), seed) for seed in range(60)}
    assert found <= set(CHOICES) and len(found) > 4
    for grammar in ('start: "<" /[0-9]{2}/ ">"', 'root ::= "<" [0-9] d ">"\nd ::= [0-9]'):
        assert re.fullmatch("<[0-9]{2}>", random_answer("grammar", grammar, 0))


@pytest.mark.parametrize(
    "kind, value, message",
    [
        ("json", '{"type": "objekt"}', "Invalid type: objekt"),
        ("json", '{"not": {}}', 'Unimplemented keys: ["not"]'),
        ("json", '{"$ref": "#"}', "no answer can satisfy it"),
        ("json", '{"a":' * 900, "recursion limit"),
        ("regex", "(a", "unclosed group"),
        ("regex", "a" * 2**17 + "a", "131073 characters, but the maximum is 131072"),
        ("regex", "(" * 300 + "a" + ")" * 300, "invalid regex"),
        ("grammar", "start: (", "Expected token"),
        ("grammar", "root ::= (", "Failed to convert the grammar"),
    ],
)
def test_constraints_that_cannot_be_compiled(compile_constraint, kind, value, message):
    with pytest.raises(ConstraintError, match=re.escape(message)) as caught:
        compile_constraint(kind, value)
    error = str(caught.value)
    assert error.startswith("the field: ") and "\n" not in error and len(error) < 400


def test_deeply_nested_references_do_not_overflow_the_stack(compile_constraint):
    """The compiler recurses; with the usual stack, these would end the process."""
    defs = {f"{n:x}": {"items": {"$ref": f"#/$defs/{n + 1:x}"}} for n in range(2900)}
    schema = {"$defs": defs | {"b54": {}}, "$ref": "#/$defs/0"}
    compile_constraint("json", json.dumps(schema))
    rules = "\n".join(f"a{n:x}: a{n + 1:x}" for n in range(1200))
    compile_constraint("grammar", f'start: a0\n{rules}\na4b0: "x"')


def schema_of(**properties) -> str:
    return json.dumps(
        {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    )


REPLY = schema_of(name=TEXT, good={"type": "boolean"}, n={"type": "integer", "maximum": 99})


@pytest.mark.slow
def test_answers_with_and_without_constrained_neighbours(scheduler, submit, compile_constraint):
    """In one batch; the tokens of each are those that it has alone, and nothing is compiled."""

    def constrained(seed, **options):
        options |= dict(sampling=Sampling(1.5), seed=seed, max_new_tokens=90)
        return submit(scheduler, "Who?", matchers=compile_constraint("json", REPLY), **options)

    def plain(n):
        sampling = (Sampling(), Sampling(1.4), Sampling(1.2, top_p=0.9, frequency_penalty=0.5))[n]
        options = dict(sampling=sampling, seed=n, top_logprobs=2 * n, ignore_eos=True)
        return submit(scheduler, "Tell me a story.", max_new_tokens=60, **options)

    with compilations() as found:
        shapes_alone = [constrained(seed).wait().events for seed in range(2)]
        plain_alone = [plain(n).wait().events for n in range(3)]
        for n in range(3):
            together = [constrained(0), plain(n), constrained(1)]
            events = [submitted.wait().events for submitted in together]
            assert events[1] == plain_alone[n]
            assert [events[0], events[2]] == shapes_alone
    assert found == []
    for submitted in together[::2]:
        jsonschema.validate(json.loads(submitted.text()), json.loads(REPLY))
        assert submitted.last_event().finish_reason == "stop"
    assert together[0].text() != together[2].text() and is_idle(scheduler)


def test_choices_of_one_request(scheduler, submit, compile_constraint):
    """Each follows the constraint on its own, and a seed gives the same answers again."""
    texts = []
    for _ in range(2):
        matchers = compile_constraint("json", REPLY, MAX_NUM_SEQS)
        options = dict(sampling=Sampling(1.5), seed=3, max_new_tokens=90, num_choices=MAX_NUM_SEQS)
        submitted = submit(scheduler, "Who?", matchers=matchers, **options)
        texts.append([submitted.text(n) for n in range(MAX_NUM_SEQS)])
    assert texts[0] == texts[1] and len({*texts[0]}) == MAX_NUM_SEQS
    for text in texts[0]:
        jsonschema.validate(json.loads(text), json.loads(REPLY))


def test_the_end_of_a_constrained_answer(scheduler, submit, compile_constraint):
    """A complete answer ends with `stop`, even at the maximum length or before `min_tokens`."""
    for kind, value, options, expected in (
        ("regex", "[0-9]{3}", {}, "stop"),
        ("regex", "[0-9]{3}", {"max_new_tokens": 3}, "stop"),
        ("regex", "[0-9]{3}", {"max_new_tokens": 2}, "length"),
        ("regex", "[0-9]{3}", {"min_tokens": 30}, "stop"),
        ("regex", "", {"min_tokens": 30}, "stop"),
        ("regex", "[0-9]{3}", {"ignore_eos": True}, "stop"),
    ):
        matchers = compile_constraint(kind, value)
        submitted = submit(scheduler, "Who?", matchers=matchers, **options)
        complete = re.fullmatch(value, submitted.text()) is not None
        assert submitted.last_event().finish_reason == expected
        assert complete == (expected == "stop")


def test_log_probabilities_are_those_of_the_allowed_tokens(scheduler, submit, compile_constraint):
    matchers = compile_constraint("choice", '["a", "b", "c"]')
    submitted = submit(scheduler, "Who?", matchers=matchers, top_logprobs=20, stream=False)
    (token,) = submitted.last_event().logprobs
    assert token.token == token.top[0] and 3 <= len(token.top) <= 6  # letters, and their bytes
    assert np.sum(np.exp([x.logprob for x in token.top])) == pytest.approx(1)


@pytest.mark.slow
def test_constrained_sequences_join_every_second_step(
    make_scheduler, submit, compile_constraint, decode_gate, monkeypatch
):
    """The others join every step, also while a mask takes long."""
    steps, may_advance = [], threading.Event()
    run_decode, advance = ModelRunner.run_decode, Matcher._advance

    def noted(self, state, active, mode, masks=None):
        steps.append((int(active.sum()), masks is not None))
        return run_decode(self, state, active, mode, masks)

    def blocked(self, token):
        assert may_advance.wait(60)
        advance(self, token)

    monkeypatch.setattr(ModelRunner, "run_decode", noted)
    monkeypatch.setattr(Matcher, "_advance", blocked)
    scheduler = make_scheduler()
    plain = submit(scheduler, "Go on.", sampling=ENDLESS, max_new_tokens=300)
    decode_gate.run(0)
    matchers = compile_constraint("regex", "a{300}")
    constrained = submit(scheduler, "Who?", matchers=matchers, max_new_tokens=9)
    decode_gate.run(50)
    assert constrained.request.completion_tokens == 1 and {*steps} == {(1, False)}
    may_advance.set()
    decode_gate.open()
    assert constrained.last_event().finish_reason == plain.last_event().finish_reason == "length"
    both = [active == 2 for active, _ in steps]
    assert sum(both) > 3 and not any(map(operator.and_, both, both[1:]))
    assert [masked for active, masked in steps if active == 2] == [True] * sum(both)


@pytest.mark.slow
def test_a_constraint_that_becomes_too_complex(scheduler, submit, compile_constraint):
    """Only its own request fails."""
    other = submit(scheduler, "Go on.", sampling=ENDLESS, max_new_tokens=60)
    matchers = compile_constraint("regex", "((a{1000}){1000}){1000}")
    failed = submit(scheduler, "Who?", matchers=matchers)
    failure = failed.last_event()
    assert isinstance(failure, Failure) and failure.param == "the field"
    assert failure.code == "constraint_too_complex" and "\n" not in failure.message
    assert other.last_event().finish_reason == "length" and is_idle(scheduler)

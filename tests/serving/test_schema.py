"""What the server says of itself, and bodies made from it: none is answered with a 500."""

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

EXAMPLES = settings(max_examples=20, derandomize=True, suppress_health_check=list(HealthCheck))


def test_no_request_makes_the_server_fail(url):
    described = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) == 5
    statuses = set()

    # Bodies that fit the description, and bodies that do not: no run may depend on drawing one.
    wrong = GenerationMode.NEGATIVE
    drawn = [operation.as_strategy() for operation in operations]
    drawn += [x.as_strategy(generation_mode=wrong) for x in operations if x.body]
    assert len(drawn) == 6

    for cases in drawn:

        @EXAMPLES
        @given(case=cases)
        def check(case):
            answer = case.call(timeout=60)
            statuses.add(answer.status_code)
            case.validate_response(answer, checks=[not_a_server_error])

        check()
    assert {200, 404, 422} <= statuses and 500 not in statuses


def test_it_describes_its_routes(app):
    paths = app.openapi()["paths"]
    assert {"/v1/chat/completions", "/v1/models", "/health", "/metrics"} < paths.keys()
    answers = paths["/v1/chat/completions"]["post"]["responses"]
    assert {"400", "401", "404", "413", "422", "429", "503"} < answers.keys()

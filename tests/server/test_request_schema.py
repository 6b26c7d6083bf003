"""Requests generated from the OpenAPI description: none is answered with a 500."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

EXAMPLES = settings(max_examples=20, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
def test_no_request_makes_the_server_fail(url):
    description = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in description.get_all_operations()]
    assert len(operations) == 7
    statuses = set()

    # Valid and invalid bodies from strategies of their own: no run depends on drawing an invalid
    # one by chance.
    invalid = GenerationMode.NEGATIVE
    strategies = [operation.as_strategy() for operation in operations]
    strategies += [x.as_strategy(generation_mode=invalid) for x in operations if x.body]
    assert len(strategies) == 9

    for cases in strategies:

        @EXAMPLES
        @given(case=cases)
        def check(case):
            response = case.call(timeout=60)
            statuses.add(response.status_code)
            case.validate_response(response, checks=[not_a_server_error])

        check()
    assert {200, 400, 404} <= statuses and not {422, 500} & statuses


def test_the_description_lists_all_responses(app):
    paths = app.openapi()["paths"]
    assert {"/v1/chat/completions", "/v1/models", "/tokenize", "/version"} < paths.keys()
    assert {"/health", "/metrics"} < paths.keys()
    responses = paths["/v1/chat/completions"]["post"]["responses"]
    assert {"400", "401", "404", "413", "429", "503"} < responses.keys()
    assert "422" not in responses

"""docs/serving.md lists every status and every code that the server sends."""

import ast
from pathlib import Path

from fastapi.testclient import TestClient

from ovis_jax.engine import scheduler as engine

ROOT = Path(__file__).parents[2]
FAILURES = [engine.SHUTTING_DOWN, engine.ENGINE_FAILED, engine.DEADLINE_EXCEEDED]


def documented() -> dict[str, set[str]]:
    """The codes of each status in the table of errors."""
    table: dict[str, set[str]] = {}
    for line in (ROOT / "docs" / "serving.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and cells[1].isdigit():
            table.setdefault(cells[1], set()).update(cells[2].replace("`", "").split(", "))
    return table


def sent() -> set[tuple[str, str]]:
    """The status and the code of every error that the source of the server raises or returns."""
    found = {("503", failure.code) for failure in FAILURES}
    for path in (ROOT / "ovis_jax" / "server").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            constants = [x.value if isinstance(x, ast.Constant) else None for x in node.args]
            if node.func.id == "ApiError" and constants[0]:
                codes = [x.value for x in node.keywords if x.arg == "code"]
                code = codes[0].value if codes and isinstance(codes[0], ast.Constant) else ""
                found.add((str(constants[0]), code if code or not codes else "*"))
            elif node.func.id == "bad_request":
                code = constants[2] if len(constants) > 2 else "invalid_value"
                found.add(("400", code or "*"))
    return found


def test_all_statuses_and_codes_are_documented():
    table = documented()
    assert len(sent()) > 15
    for status, code in sent():
        assert status in table and (code in table[status] or code == "*"), (status, code)
    assert set(table) == {status for status, _ in sent()} | {"405"}


def test_another_method_is_a_405(app):
    response = TestClient(app).get("/v1/chat/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert response.json()["error"]["type"] == "invalid_request_error"

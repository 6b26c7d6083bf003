"""The Python example of the README runs as it is printed."""

import re
from pathlib import Path

from golden_copies import GOLDEN

README = Path(__file__).parents[1] / "README.md"


def test_the_python_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert '"checkpoints/demo"' in example and '"tests/golden/' in example
    example = example.replace("tests/golden", str(GOLDEN))
    example = example.replace("checkpoints/demo", str(GOLDEN / "tiny-f32"))
    found = {}
    exec(compile(example, str(README), "exec"), found)
    assert found["logits"].shape == (1, found["inputs"].tokens.shape[1], 600)
    assert found["draws"].tokens.shape == (4, 1, 16)
    assert found["words"].shape[1:] == (9, 64)
    assert capsys.readouterr().out.startswith(found["texts"][0][:5])

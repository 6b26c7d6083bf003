"""The Python examples of the README run as they are printed."""

import re
from pathlib import Path

from golden_copies import GOLDEN

README = Path(__file__).parents[1] / "README.md"


def test_the_python_examples_run(capsys):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(examples) == 2
    example = "\n".join(examples)
    assert '"checkpoints/demo"' in example and '"tests/golden/' in example
    example = example.replace("tests/golden", str(GOLDEN))
    example = example.replace("checkpoints/demo", str(GOLDEN / "tiny-f32"))
    found = {}
    exec(compile(example, str(README), "exec"), found)
    assert found["logits"].shape == (1, found["inputs"].tokens.shape[1], 600)
    assert found["draws"].tokens.shape == (4, 1, 16)
    assert found["words"].shape[1:] == (9, 64)
    assert found["metrics"].loss > 1.0 and found["params"].keys() == found["ovis"].params.keys()
    assert capsys.readouterr().out.startswith(found["texts"][0][:5])

"""What lmms-eval's entry-point group `lmms_eval.models` loads: the name of the model's class."""

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of `--model ovis_jax`; lmms-eval imports the class when it is asked for.

    The class takes text and pictures ("simple" in lmms-eval), which all tasks give.
    """
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(
        model_id="ovis_jax",
        simple_class_path="ovis_jax.evaluation.lmms_eval_model.OvisJax",
    )

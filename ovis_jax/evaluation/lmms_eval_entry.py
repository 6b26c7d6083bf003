"""The entry point for lmms-eval (group `lmms_eval.models`); it does not import JAX."""

from typing import Any


def manifest() -> Any:
    """Return the `ModelManifest` that makes `lmms-eval --model ovis_jax` available.

    lmms-eval imports the model's class only when the model is selected. lmms-eval calls a model
    that takes text and images "simple".
    """
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(
        model_id="ovis_jax",
        simple_class_path="ovis_jax.evaluation.lmms_eval_model.OvisForLmmsEval",
    )

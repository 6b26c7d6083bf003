"""Reading the settings of LoRA adapters from the folder format of the PyTorch library PEFT.

PEFT applies an adapter to a module if the file has tensors for the module and the config targets
the module. An unsupported field that would change the result raises an error that names the field.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ovis_jax.checkpoint.key_map import make_hub_key_map
from ovis_jax.checkpoint.resolve import PEFT_CONFIG_FILE
from ovis_jax.config import OvisConfig
from ovis_jax.errors import ConfigError
from ovis_jax.json_fields import JsonObject, read_json
from ovis_jax.sharding import supports_adapter

PEFT_WEIGHTS_FILE = "adapter_model.safetensors"

_PEFT_NAMES = {"lora_a": "lora_A", "lora_b": "lora_B"}

_SUPPORTED_FIELDS = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("bias", "init_lora_weights"),
}
_FIELDS_WITHOUT_EFFECT = {
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version"),
    *("inference_mode", "lora_dropout", "runtime_config"),
    # These only matter together with a field that is not supported.
    *("megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying"),
}

_ADVICE = "merge the adapters into the model with PEFT, and convert the result"


def find_peft_modules(config: OvisConfig) -> dict[str, str]:
    """Return the PyTorch module names of all matrices that can have an adapter, by path."""
    keys = make_hub_key_map(config).parameters
    return {
        path: key.removesuffix(".weight") for key, path in keys.items() if supports_adapter(path)
    }


def peft_keys(path: str, module: str) -> dict[str, str]:
    """Return the keys of a module's adapter in PEFT's file, by path of the adapter's arrays."""
    return {
        f"{path}/{factor}": f"base_model.model.{module}.{name}.weight"
        for factor, name in _PEFT_NAMES.items()
    }


@dataclass(frozen=True)
class PeftConfig:
    """The content of adapter_config.json; modules are named as in PyTorch."""

    fields: JsonObject

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read adapter_config.json.

        Raises:
          ConfigError: The file cannot be read, or a field is missing or not supported.
        """
        path = folder / PEFT_CONFIG_FILE
        fields = JsonObject(read_json(path), str(path))
        fields.require_value("peft_type", "LORA")
        fields.require_absent("bias", f"'none'; {_ADVICE}", allowed=("none",))
        fields.require_absent(
            "init_lora_weights",
            "a boolean, 'gaussian', 'eva' or 'orthogonal', which leave the model's matrices as they"
            " are; save the adapters with path_initial_model_for_weight_conversion, or " + _ADVICE,
            allowed=(True, "gaussian", "eva", "orthogonal"),
        )
        for key in sorted(fields.values.keys() - _SUPPORTED_FIELDS - _FIELDS_WITHOUT_EFFECT):
            fields.require_absent(key, f"null, false or empty: only plain LoRA is read; {_ADVICE}")
        return cls(fields)

    def rank(self, module: str) -> int:
        """Return the rank of a module's adapter.

        Raises:
          ConfigError: The rank is missing or not a positive integer, or a pattern is invalid.
        """
        source, key = self._find("rank_pattern", "r", module)
        return source.get_positive_int(key)

    def scale(self, module: str) -> float:
        """Return the factor by which the product of a module's adapter is multiplied.

        Raises:
          ConfigError: `lora_alpha` is missing or not a positive number, or a pattern is invalid.
        """
        source, key = self._find("alpha_pattern", "lora_alpha", module)
        rank = self.rank(module)
        rslora = self.fields.get_optional("use_rslora", False)
        return source.get_positive_number(key) / (math.sqrt(rank) if rslora else rank)

    def targets(self, module: str) -> bool:
        """Return whether the config targets a module.

        Raises:
          ConfigError: `target_modules` is missing, or a pattern is invalid.
        """
        target = self.fields.get("target_modules")
        excluded = self.fields.get_optional("exclude_modules", None) or []
        if self._matches("exclude_modules", excluded, module):
            return False
        if isinstance(target, str) and target.lower() == "all-linear":
            return module != "llm.lm_head"
        return self._matches("target_modules", target, module) and (
            isinstance(target, str) or self._in_transformed_layer(module)
        )

    def _matches(self, key: str, names: str | list[str], module: str) -> bool:
        """Return whether a module matches a regular expression or ends with a name in a list."""
        if isinstance(names, str):
            return self._match(key, names, module)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.fields.error(key, names, "a regular expression or a list of module names")
        return any(f".{module}".endswith(f".{name}") for name in names)

    def _in_transformed_layer(self, module: str) -> bool:
        layers = self.fields.get_optional("layers_to_transform", None)
        if layers is None or layers == []:
            return True
        patterns = self.fields.get_optional("layers_pattern", None) or [r"[^.]*"]
        layers = layers if isinstance(layers, list) else [layers]
        patterns = patterns if isinstance(patterns, list) else [patterns]
        return any(
            self._match("layers_pattern", pattern, module, r"(.*?\.)?", rf"\.{layer}\..*")
            for pattern in patterns
            for layer in layers
        )

    def _find(self, pattern_key: str, key: str, module: str) -> tuple[JsonObject, str]:
        """Return the JSON object, and the key in this object, that set a module's rank or alpha."""
        if self.fields.get_optional(pattern_key, None):
            patterns = self.fields.get_object(pattern_key)
            for pattern in patterns.values:
                if self._match(pattern_key, pattern, module, r"(.*\.)?(", ")"):
                    return patterns, pattern
        return self.fields, key

    def _match(
        self, key: str, pattern: str, module: str, before: str = "", after: str = ""
    ) -> bool:
        try:
            return re.fullmatch(f"{before}{pattern}{after}", module) is not None
        except re.error as error:
            raise ConfigError(
                f"{self.fields.name}: {key}: {pattern!r} is not a regular expression: {error}"
            ) from None

"""Fakes of the parts of lmms-eval 0.7 and VLMEvalKit that the models for them use.

They copy the names and modules, the attributes that the base classes set, their abstract methods,
the order of a request's arguments, and how a message reaches `generate_inner`.
"""

import abc
import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

MODEL_MODULES = ("ovis_jax.evaluation.lmms_eval_model", "ovis_jax.evaluation.vlmeval_model")


@dataclass
class Instance:
    args: tuple


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class CacheHook:
    def __init__(self):
        self.kept: list[Any] = []

    def add_partial(self, attr: str, req: tuple, res: Any) -> None:
        self.kept.append(res)


class Lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank = 0
        self._world_size = 1
        self.cache_hook = CacheHook()
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


class BaseModel:
    allowed_types = ("text", "image", "video")

    def __init__(self):
        self.dump_image_func = None

    def set_dump_image(self, function):
        self.dump_image_func = function

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def generate(self, message, dataset=None):
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)


def install_lmms_eval(monkeypatch) -> None:
    _install(monkeypatch, "lmms_eval.api.model", lmms=Lmms)
    _install(monkeypatch, "lmms_eval.models.registry_v2", ModelManifest=ModelManifest)


def install_vlmeval(monkeypatch) -> None:
    _install(monkeypatch, "vlmeval.vlm.base", BaseModel=BaseModel)
    dataset_type = {"some_MCQ": "MCQ", "some_Y/N": "Y/N"}
    _install(
        monkeypatch, "vlmeval.dataset", DATASET_TYPE=lambda name: dataset_type.get(name, "VQA")
    )


def load_class(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _install(monkeypatch, name: str, **values: Any) -> None:
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        module = sys.modules.get(".".join(parts[:n])) or ModuleType(".".join(parts[:n]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for key, value in values.items():
        setattr(module, key, value)
    for module_name in MODEL_MODULES:  # so that they are imported again with the fakes
        monkeypatch.delitem(sys.modules, module_name, raising=False)

"""Ovis1.6 in PyTorch, built from classes of transformers, as a reference for tests.

In float32 it is bit-identical to the original code (`test_reference.py` checks the golden files).
It handles one row at a time in the original's format: ids with one -300 per crop, and pixels
[I, C, h, w]. Arguments and results are numpy arrays.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ovis_jax.checkpoint.key_map import make_hub_key_map
from ovis_jax.config import NUM_IMAGE_INDICATORS, OvisConfig
from ovis_jax.model.ovis import Params

# The models are tiny, and threads of several test workers would slow each other down.
torch.set_num_threads(1)

VISUAL_SLOT = -300
FIRST_INDICATOR = -301


class ImageStates(NamedTuple):
    """The stages from crops to visual embeddings."""

    vision: np.ndarray
    """[depth + 1, I, P, E]: the patch embeddings, then the output of each SigLIP block."""
    features: np.ndarray
    """[I, M, m m E]: merged."""
    logits: np.ndarray
    """[I, M, W]: after the head's LayerNorm."""
    probabilities: np.ndarray
    embeddings: np.ndarray
    """[I, M, D]"""


class DecoderStates(NamedTuple):
    """The stages from input embeddings to logits."""

    blocks: np.ndarray
    """[depth, T, D]: the output of each block; the last one before the final norm."""
    logits: np.ndarray
    """[T, V]: after the final soft cap."""


class States(NamedTuple):
    """The stages of a forward pass."""

    images: ImageStates | None
    inputs_embeds: np.ndarray
    """[T, D], before any scaling by sqrt(width)."""
    decoder: DecoderStates


class Greedy(NamedTuple):
    """New tokens [n], and the margin of each one's logit over the second largest."""

    tokens: np.ndarray
    margins: np.ndarray


class Float64(TorchFunctionMode):
    """Within this context, code that converts to float32 converts to float64 instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call a function of PyTorch."""

        def widen(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        func = Tensor.double if func is Tensor.float else func
        return func(*map(widen, args), **{name: widen(x) for name, x in (kwargs or {}).items()})


class OvisTorch:
    """The model. The attribute `model` names its parts like the Hub's keys.

    Args:
      config: the parsed config.json of a Hub folder.
    """

    def __init__(self, config: dict[str, Any]):
        tokenizer = config["visual_tokenizer_config"]
        tied = not config["disable_tie_weight"]
        self.is_gemma2 = config["llm_config"]["model_type"] == "gemma2"
        build, lm = (
            (Gemma2Config, Gemma2ForCausalLM) if self.is_gemma2 else (LlamaConfig, LlamaForCausalLM)
        )
        llm_config = build(**config["llm_config"] | {"tie_word_embeddings": tied})
        vision_config = SiglipVisionConfig(**tokenizer["backbone_config"])
        self.stride: int = tokenizer["hidden_stride"]
        self.llm: Any = lm._from_config(
            llm_config, attn_implementation="eager", dtype=torch.float32
        )
        self.vision = SiglipVisionModel._from_config(
            vision_config, attn_implementation="sdpa", dtype=torch.float32
        )
        words = tokenizer["vocab_size"] - NUM_IMAGE_INDICATORS
        self.head = nn.Sequential(
            nn.Linear(self.stride**2 * vision_config.hidden_size, words, bias=False),
            nn.LayerNorm(words),
        )
        self.table = nn.Embedding(tokenizer["vocab_size"], llm_config.hidden_size)
        backbone = nn.ModuleDict({"vision_model": self.vision})
        visual_tokenizer = nn.ModuleDict({"backbone": backbone, "head": self.head})
        self.model = nn.ModuleDict(
            {"llm": self.llm, "visual_tokenizer": visual_tokenizer, "vte": self.table}
        )
        self.model.eval().requires_grad_(False)

    @classmethod
    def random(cls, config: OvisConfig, seed: int, sharpness: float = 2.5) -> Self:
        """Create random weights with sharp attention and norms and biases that matter."""
        self = cls(config.to_hf()[0])
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            mean, std = _distribution(name, parameter, 1 - config.decoder.norm_offset, sharpness)
            parameter.normal_(mean, std, generator=generator)
        return self

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Load a folder in the Hub's layout in float32."""
        self = cls(json.loads((folder / "config.json").read_text()))
        tensors: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            arrays = load_file(path)
            tensors |= {key: torch.tensor(a.astype(np.float32)) for key, a in arrays.items()}
        if self.tied:
            tensors["llm.lm_head.weight"] = tensors["llm.model.embed_tokens.weight"]
        self.model.load_state_dict(tensors)
        return self

    @property
    def tied(self) -> bool:
        """Whether the output embeddings are the input embeddings."""
        return bool(self.llm.config.tie_word_embeddings)

    @property
    def embedding_scale(self) -> float:
        """The factor by which the model expects its input embeddings to be multiplied."""
        return self.llm.config.hidden_size**0.5 if self.is_gemma2 else 1.0

    def state_dict(self) -> dict[str, np.ndarray]:
        """Every tensor of the Hub's files, by the Hub's keys."""
        tensors = {key: tensor.numpy() for key, tensor in self.model.state_dict().items()}
        if self.tied:
            del tensors["llm.lm_head.weight"]
        return tensors

    def save_hub_folder(self, folder: Path, config: OvisConfig) -> None:
        """Write weights and configs in the Hub's layout, without a tokenizer."""
        folder.mkdir(parents=True)
        ovis, generation = config.to_hf()
        (folder / "config.json").write_text(json.dumps(ovis | {"torch_dtype": "float32"}))
        (folder / "generation_config.json").write_text(json.dumps(generation))
        save_file(self.state_dict(), folder / "model.safetensors")

    def embed_images(self, pixels: np.ndarray) -> ImageStates:
        """Crops [I, C, h, w] -> visual embeddings."""
        states = self.vision(torch.tensor(pixels), output_hidden_states=True).hidden_states
        features = self.merge(states[-1])
        logits = self.head(features)
        probabilities = logits.softmax(dim=-1)
        padded = nn.functional.pad(probabilities, (0, NUM_IMAGE_INDICATORS))
        embeddings = padded @ self.table.weight
        return ImageStates(
            torch.stack(states).numpy(),
            features.numpy(),
            logits.numpy(),
            probabilities.numpy(),
            embeddings.numpy(),
        )

    def merge(self, features: Tensor) -> Tensor:
        """Join each stride x stride block of patches [I, P, E], padded at the right and bottom."""
        side = round(features.shape[1] ** 0.5)
        pad = -side % self.stride
        grid = nn.functional.pad(features.unflatten(1, (side, side)), (0, 0, 0, pad, 0, pad))
        offsets = range(self.stride)
        members = [grid[:, i :: self.stride, j :: self.stride] for i in offsets for j in offsets]
        return torch.cat(members, dim=-1).flatten(1, 2)

    def embed_inputs(self, input_ids: np.ndarray, visual: np.ndarray | None) -> np.ndarray:
        """Ids [u] with one -300 per crop, and visual embeddings [I, M, D] -> [T, D], not scaled."""
        text, table = self.llm.model.embed_tokens.weight.numpy(), self.table.weight.numpy()
        crops = iter(() if visual is None else visual)
        rows = []
        for i in input_ids.tolist():
            if i == VISUAL_SLOT:
                rows.append(next(crops))
            elif i <= FIRST_INDICATOR:
                rows.append(table[FIRST_INDICATOR - i - NUM_IMAGE_INDICATORS][None])
            else:
                rows.append(text[i][None])
        return np.concatenate(rows)

    def decode(self, inputs_embeds: np.ndarray) -> DecoderStates:
        """Input embeddings [T, D], not scaled -> logits, without a cache."""
        x = torch.tensor(inputs_embeds)[None]
        x = x * torch.tensor(self.embedding_scale, dtype=x.dtype)
        blocks: list[Tensor] = []
        layers: Any = self.llm.model.layers
        hooks = [
            layer.register_forward_hook(lambda *call: blocks.append(call[-1][0]))
            for layer in layers
        ]
        logits = self.llm(inputs_embeds=x, use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        return DecoderStates(np.array([block.numpy() for block in blocks]), logits.numpy())

    def forward(self, input_ids: np.ndarray, pixels: np.ndarray | None) -> States:
        """Ids [u] and crops [I, C, h, w] -> logits at every position."""
        images = None if pixels is None else self.embed_images(pixels)
        x = self.embed_inputs(input_ids, None if images is None else images.embeddings)
        return States(images, x, self.decode(x))

    def loss(self, tokens: np.ndarray, labels: np.ndarray, pixels: np.ndarray) -> Tensor:
        """The mean loss of rows [B, T] with one -300 per visual token, as a tensor."""
        features = self.vision(torch.tensor(pixels), output_hidden_states=True).hidden_states[-1]
        probabilities = self.head(self.merge(features)).softmax(dim=-1)
        visual = probabilities @ self.table.weight[: probabilities.shape[-1]]
        ids = torch.tensor(tokens, dtype=torch.long)
        x = nn.functional.embedding(ids.clamp(min=0), self.llm.model.embed_tokens.weight)
        rows = (FIRST_INDICATOR - ids).clamp(min=0) - NUM_IMAGE_INDICATORS
        indicators = nn.functional.embedding(rows % len(self.table.weight), self.table.weight)
        x = torch.where((ids <= FIRST_INDICATOR)[..., None], indicators, x)
        x = x.masked_scatter((ids == VISUAL_SLOT)[..., None], visual.to(x.dtype))
        logits = self.llm(inputs_embeds=x * self.embedding_scale, use_cache=False).logits
        targets = torch.tensor(labels[:, 1:], dtype=torch.long).flatten()
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100
        )

    def gradients(self, loss: Callable[[], Tensor]) -> tuple[float, dict[str, np.ndarray]]:
        """A loss, as a function of the model, and its gradients by the Hub's keys."""
        self.model.requires_grad_(True).zero_grad()
        value = loss()
        value.backward()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.requires_grad_(False)
        return value.item(), {name: gradient.numpy() for name, gradient in found.items()}

    def generate(self, input_ids: np.ndarray, pixels: np.ndarray | None, steps: int) -> Greedy:
        """Decode greedily without a cache and without stop ids."""
        tokens, margins = [], []
        for _ in range(steps):
            read = np.concatenate([input_ids, np.array(tokens, input_ids.dtype)])
            logits = self.forward(read, pixels).decoder.logits[-1]
            second, first = np.sort(logits)[-2:]
            tokens.append(int(np.argmax(logits)))
            margins.append(first - second)
        return Greedy(np.array(tokens), np.array(margins))


def params_of(reference: OvisTorch, config: OvisConfig) -> Params:
    """The same weights as our parameters."""
    state = reference.state_dict()
    keys = make_hub_key_map(config).parameters
    return unflatten_dict({path: jnp.array(state[key]) for key, path in keys.items()}, sep="/")


def _distribution(
    name: str, parameter: Tensor, norm_mean: float, sharpness: float
) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's random values.

    The weights of the decoder's norms have the mean `norm_mean`. Queries and keys are multiplied by
    `sharpness`.
    """
    if name.startswith("visual_tokenizer.head.1"):
        return (3.0, 1.0) if name.endswith("weight") else (0.0, 1.0)
    if parameter.dim() == 1:
        layer_norm = "visual_tokenizer" in name and "norm" in name and name.endswith("weight")
        is_decoder_norm = name.startswith("llm.")
        return (1.0 if layer_norm else norm_mean if is_decoder_norm else 0.0), 0.3
    if "embed_tokens" in name or "lm_head" in name or name.startswith("vte"):
        return 0.0, 0.4
    gain = sharpness if "q_proj" in name or "k_proj" in name else 1.0
    return 0.0, gain * parameter[0].numel() ** -0.5

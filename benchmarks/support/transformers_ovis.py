"""Ovis built from transformers' classes, with a KV cache: PyTorch's side of the comparison.

This module does not import JAX, so that a PyTorch process pays only for PyTorch. SigLIP runs with
sdpa attention and without the layers after its last block, which Ovis does not use. Gemma2 runs
with eager attention, the only one with soft capping. The decoding loop is written out to avoid the
overhead that transformers' `generate` adds to each token.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

VISUAL_SLOT = -300
FIRST_INDICATOR = -301
NUM_INDICATORS = 5

CacheKind = Literal["dynamic", "static"]


class TransformersOvis:
    """A checkpoint in the Hub's layout, in one dtype.

    Args:
      folder: folder with config.json and safetensors files.
      dtype: dtype of weights and activations, "float32" or "bfloat16".
      threads: number of threads for PyTorch.
    """

    def __init__(self, folder: Path, dtype: str, threads: int):
        # Imported here because only this benchmark needs them.
        torch: Any = import_module("torch")
        transformers: Any = import_module("transformers")
        load_file = import_module("safetensors.torch").load_file
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.torch, self.dtype = torch, getattr(torch, dtype)
        self.caches = {"dynamic": transformers.DynamicCache, "static": transformers.StaticCache}
        config = json.loads((folder / "config.json").read_text())
        tensors: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)

        def with_prefix(prefix: str) -> dict[str, Any]:
            keys = [key for key in tensors if key.startswith(prefix)]
            return {key.removeprefix(prefix): tensors[key] for key in keys}

        def build(class_name: str, class_config: Any, prefix: str, attention: str) -> Any:
            return getattr(transformers, class_name).from_pretrained(
                None,
                config=class_config,
                state_dict=with_prefix(prefix),
                dtype=self.dtype,
                attn_implementation=attention,
            )

        tokenizer = config["visual_tokenizer_config"]
        tied = not config.get("disable_tie_weight", False)
        llm_config = transformers.Gemma2Config(**config["llm_config"])
        llm_config.tie_word_embeddings = tied
        vision_config = transformers.SiglipVisionConfig(**tokenizer["backbone_config"])
        vision = "visual_tokenizer.backbone.vision_model."
        self.stride: int = tokenizer["hidden_stride"]
        self.llm = build("Gemma2ForCausalLM", llm_config, "llm.", "eager")
        self.siglip = build("SiglipVisionModel", vision_config, vision, "sdpa")
        head = with_prefix("visual_tokenizer.head.")
        self.head, self.scale, self.bias, self.table = (
            x.to(self.dtype)
            for x in (head["0.weight"], head["1.weight"], head["1.bias"], tensors["vte.weight"])
        )

    def encode_vision(self, pixels: Any) -> Any:
        """Return the features [I, P, E] of SigLIP's last block for crops [I, C, h, w]."""
        with self.torch.inference_mode():
            x = self.siglip.embeddings(pixels)
            return self.siglip.encoder(inputs_embeds=x).last_hidden_state

    def embed_features(self, features: Any) -> Any:
        """Return the visual embeddings [I, M, D] of features [I, P, E]."""
        functional = self.torch.nn.functional
        with self.torch.inference_mode():
            side = round(features.shape[1] ** 0.5)
            pad = -side % self.stride
            grid = functional.pad(features.unflatten(1, (side, side)), (0, 0, 0, pad, 0, pad))
            steps = range(self.stride)
            members = [grid[:, i :: self.stride, j :: self.stride] for i in steps for j in steps]
            merged = self.torch.cat(members, dim=-1).flatten(1, 2)
            logits = functional.linear(merged, self.head)
            logits = functional.layer_norm(logits, logits.shape[-1:], self.scale, self.bias)
            return logits.softmax(dim=-1) @ self.table[: logits.shape[-1]]

    def to_pixels(self, crops: np.ndarray) -> Any:
        """Convert crops [I, h, w, C] to the layout [I, C, h, w] and dtype of SigLIP."""
        return self.torch.tensor(np.ascontiguousarray(crops.transpose(0, 3, 1, 2))).to(self.dtype)

    def prefill(
        self, tokens: np.ndarray, crops: np.ndarray, kind: CacheKind, max_length: int
    ) -> tuple[Any, Any]:
        """Run the prefill of prompts of equal length.

        Args:
          tokens: int [B, T], with one -300 per visual token.
          crops: float32 [I, h, w, C].
          kind: "dynamic" or "static" cache.
          max_length: capacity of a static cache in positions.

        Returns:
          The logits [B, V] of the last position, and the cache.
        """
        torch = self.torch
        with torch.inference_mode():
            ids = torch.tensor(tokens, dtype=torch.long)
            x = torch.nn.functional.embedding(ids.clamp(min=0), self.llm.model.embed_tokens.weight)
            if len(crops):
                rows = (FIRST_INDICATOR - ids).clamp(min=0) - NUM_INDICATORS
                indicators = torch.nn.functional.embedding(rows % len(self.table), self.table)
                x = torch.where((ids <= FIRST_INDICATOR)[..., None], indicators, x)
                visual = self.embed_features(self.encode_vision(self.to_pixels(crops)))
                x = x.masked_scatter((ids == VISUAL_SLOT)[..., None], visual)
            capacity = {"max_cache_len": max_length} if kind == "static" else {}
            cache = self.caches[kind](config=self.llm.config, **capacity)
            x = x * torch.tensor(x.shape[-1] ** 0.5, dtype=x.dtype)
            out = self.llm(inputs_embeds=x, cache=cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, 0], cache

    def decode(self, tokens: Any, cache: Any, steps: int) -> Any:
        """Decode greedily after `tokens` [B]; return the generated tokens, int [B, steps]."""
        generated = []
        with self.torch.inference_mode():
            for _ in range(steps):
                ids = tokens[:, None]
                out = self.llm(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
                tokens = out.logits[:, 0].argmax(dim=-1)
                generated.append(tokens)
        return self.torch.stack(generated, dim=1)

    def generate(
        self, tokens: np.ndarray, crops: np.ndarray, kind: CacheKind, new_tokens: int
    ) -> np.ndarray:
        """Generate exactly `new_tokens` greedy tokens per row, int [B, new_tokens]."""
        logits, cache = self.prefill(tokens, crops, kind, tokens.shape[1] + new_tokens)
        first = logits.argmax(dim=-1)
        out = first[:, None]
        if new_tokens > 1:
            out = self.torch.cat([out, self.decode(first, cache, new_tokens - 1)], dim=1)
        return out.numpy()

    def start_decoding(
        self, tokens: np.ndarray, kind: CacheKind, max_new_tokens: int
    ) -> Callable[[int], Any]:
        """Run the prefill of prompts [B, T]; return a function that decodes `steps` more tokens."""
        logits, cache = self.prefill(tokens, np.zeros(0), kind, tokens.shape[1] + max_new_tokens)
        last = logits.argmax(dim=-1)

        def decode_more(steps: int) -> Any:
            nonlocal last
            out = self.decode(last, cache, steps)
            last = out[:, -1]
            return out

        return decode_more

    def matmul_flop_rate(self, size: int = 1024, repeats: int = 3) -> float:
        """Measure the FLOPs per second of a square product: the best repeat after a warm-up."""
        x, best = self.torch.randn(size, size).to(self.dtype), 0.0
        with self.torch.inference_mode():
            for _ in range(1 + repeats):
                start = time.perf_counter()
                self.torch.nn.functional.linear(x, x)
                best = max(best, 2 * size**3 / (time.perf_counter() - start))
        return best


def main(folder: str, dtype: str, threads: str, inputs: str) -> None:
    """Load a checkpoint, answer one prompt, and print the first token.

    `inputs` is a .npz file with `tokens` [1, T] and `crops` [I, h, w, C].
    """
    model = TransformersOvis(Path(folder), dtype, int(threads))
    arrays = np.load(inputs)
    print(model.generate(arrays["tokens"], arrays["crops"], "dynamic", 1)[0, 0], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""PyTorch's side of the benchmark: the same checkpoint in transformers' classes, with a cache.

Imports no JAX, so that a process that is this side alone pays for nothing else. SigLIP runs with
sdpa and up to its last block, which is all that Ovis reads; Gemma2 with eager attention, the one
kind that has its soft cap. The loop over tokens is written out, without what `generate` of
transformers adds to each.
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


class TorchSide:
    """A checkpoint in the Hub's layout, in one dtype.

    Args:
      folder: config.json and safetensors files.
      dtype: "float32" or "bfloat16": of weights and activations.
      threads: how many PyTorch may use.
    """

    def __init__(self, folder: Path, dtype: str, threads: int):
        # Not there where the package is only used.
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

        def below(prefix: str) -> dict[str, Any]:
            keys = [key for key in tensors if key.startswith(prefix)]
            return {key.removeprefix(prefix): tensors[key] for key in keys}

        def build(of: str, settings: Any, prefix: str, attention: str) -> Any:
            return getattr(transformers, of).from_pretrained(
                None,
                config=settings,
                state_dict=below(prefix),
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
        head = below("visual_tokenizer.head.")
        self.head, self.scale, self.bias, self.table = (
            x.to(self.dtype)
            for x in (head["0.weight"], head["1.weight"], head["1.bias"], tensors["vte.weight"])
        )

    def vision(self, pixels: Any) -> Any:
        """Crops [I, C, h, w] -> the features of SigLIP's last block [I, P, E]."""
        with self.torch.inference_mode():
            x = self.siglip.embeddings(pixels)
            return self.siglip.encoder(inputs_embeds=x).last_hidden_state

    def visual_tokens(self, features: Any) -> Any:
        """Features [I, P, E] -> visual embeddings [I, M, D]."""
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

    def pixels(self, crops: np.ndarray) -> Any:
        """Crops [I, h, w, C] in the order and dtype that SigLIP reads."""
        return self.torch.tensor(np.ascontiguousarray(crops.transpose(0, 3, 1, 2))).to(self.dtype)

    def prefill(
        self, tokens: np.ndarray, crops: np.ndarray, kind: CacheKind, max_length: int
    ) -> tuple[Any, Any]:
        """Read rows of one length, int [B, T] (one -300 a visual token), and their crops.

        Gives the last position's logits [B, V], and the cache, which has room for `max_length`.
        """
        torch = self.torch
        with torch.inference_mode():
            ids = torch.tensor(tokens, dtype=torch.long)
            x = torch.nn.functional.embedding(ids.clamp(min=0), self.llm.model.embed_tokens.weight)
            if len(crops):
                rows = (FIRST_INDICATOR - ids).clamp(min=0) - NUM_INDICATORS
                indicators = torch.nn.functional.embedding(rows % len(self.table), self.table)
                x = torch.where((ids <= FIRST_INDICATOR)[..., None], indicators, x)
                visual = self.visual_tokens(self.vision(self.pixels(crops)))
                x = x.masked_scatter((ids == VISUAL_SLOT)[..., None], visual)
            room = {"max_cache_len": max_length} if kind == "static" else {}
            cache = self.caches[kind](config=self.llm.config, **room)
            x = x * torch.tensor(x.shape[-1] ** 0.5, dtype=x.dtype)
            out = self.llm(inputs_embeds=x, cache=cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, 0], cache

    def decode(self, tokens: Any, cache: Any, steps: int) -> Any:
        """Read `tokens` [B] and then what follows, greedily; int [B, steps] that were written."""
        written = []
        with self.torch.inference_mode():
            for _ in range(steps):
                ids = tokens[:, None]
                out = self.llm(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
                tokens = out.logits[:, 0].argmax(dim=-1)
                written.append(tokens)
        return self.torch.stack(written, dim=1)

    def generate(
        self, tokens: np.ndarray, crops: np.ndarray, kind: CacheKind, new_tokens: int
    ) -> np.ndarray:
        """Answer greedily: int [B, new_tokens]; stops at nothing."""
        logits, cache = self.prefill(tokens, crops, kind, tokens.shape[1] + new_tokens)
        first = logits.argmax(dim=-1)
        out = first[:, None]
        if new_tokens > 1:
            out = self.torch.cat([out, self.decode(first, cache, new_tokens - 1)], dim=1)
        return out.numpy()

    def answering(self, tokens: np.ndarray, kind: CacheKind, room: int) -> Callable[[int], Any]:
        """Read prompts [B, T]; gives a call that writes so many further tokens a row each time."""
        logits, cache = self.prefill(tokens, np.zeros(0), kind, tokens.shape[1] + room)
        last = logits.argmax(dim=-1)

        def go_on(steps: int) -> Any:
            nonlocal last
            out = self.decode(last, cache, steps)
            last = out[:, -1]
            return out

        return go_on

    def matmul_rate(self, side: int = 1024, repeats: int = 3) -> float:
        """FLOP a second of a square product; the best of `repeats` after one that warms up."""
        x, best = self.torch.randn(side, side).to(self.dtype), 0.0
        with self.torch.inference_mode():
            for _ in range(1 + repeats):
                start = time.perf_counter()
                self.torch.nn.functional.linear(x, x)
                best = max(best, 2 * side**3 / (time.perf_counter() - start))
        return best


def main(folder: str, dtype: str, threads: str, inputs: str) -> None:
    """Be a process that answers one prompt: print the first token and end.

    `inputs` is a file of numpy arrays, `tokens` [1, T] and `crops` [I, h, w, C].
    """
    side = TorchSide(Path(folder), dtype, int(threads))
    arrays = np.load(inputs)
    print(side.generate(arrays["tokens"], arrays["crops"], "dynamic", 1)[0, 0], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

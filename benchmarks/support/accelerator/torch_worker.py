"""PyTorch's side of the comparison, in a process of its own on the same device.

The process reads a command per line of its input and answers each with a line of JSON, so that the
two sides can take turns. It builds `SiglipVisionModel` and `Gemma2ForCausalLM` with random weights;
it does not import JAX. Gemma2 runs with attention that keeps the soft cap, which sdpa does not.
"""

import copy
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


class TorchModels:
    """The two models with random weights.

    Args:
      configs: "vision" and "decoder": the fields of the configs, as in the Hub's config.json.
      device: Device of PyTorch, such as "cuda".
      dtype: Name of the dtype.
    """

    def __init__(self, configs: dict[str, Any], device: str, dtype: str):
        # Imported here because only this process needs them.
        self.torch: Any = import_module("torch")
        self.transformers: Any = import_module("transformers")
        torch, transformers = self.torch, self.transformers
        self.device, self.dtype = device, getattr(torch, dtype)
        torch.manual_seed(0)
        decoder_config = transformers.Gemma2Config(**configs["decoder"])
        vision_config = transformers.SiglipVisionConfig(**configs["vision"])
        decoder_config._attn_implementation = "eager"
        vision_config._attn_implementation = "sdpa"
        torch.set_default_dtype(self.dtype)
        with torch.device(device):
            self.vision = transformers.SiglipVisionModel(vision_config).eval()
            self.decoder = transformers.Gemma2ForCausalLM(decoder_config).eval()
        torch.set_default_dtype(torch.float32)
        parameters = inspect.signature(self.decoder.forward).parameters
        # transformers renamed this argument.
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"

    def forward(self, ids: Any, cache: Any) -> Any:
        """Return the logits of the last position; updates the cache."""
        options = {self._cache_argument: cache, "use_cache": True, "logits_to_keep": 1}
        return self.decoder(input_ids=ids, **options).logits[:, -1]

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def prepare_vision(self, crops: int) -> Callable[[], None]:
        """Return a function that encodes crops."""
        size, channels = self.vision.config.image_size, self.vision.config.num_channels
        shape = (crops, channels, size, size)
        pixels = self.torch.randn(shape, device=self.device, dtype=self.dtype)
        model = getattr(self.vision, "vision_model", self.vision)

        def call() -> None:
            x = model.embeddings(pixels)
            model.encoder(inputs_embeds=x)

        return call

    def prepare_prefill(self, positions: int, attention: str) -> Callable[[], None]:
        """Return a function that reads a prompt."""
        self.decoder.set_attn_implementation(attention)
        ids = self._random_ids(1, positions)

        def call() -> None:
            self.forward(ids, self.transformers.DynamicCache(config=self.decoder.config))

        return call

    def prepare_decode(
        self, rows: int, positions: int, steps: int, calls: int, mode: str
    ) -> Callable[[], None]:
        """Return a function that decodes `steps` tokens after a prompt.

        Args:
          rows: Number of rows.
          positions: Number of positions in the cache.
          steps: Number of tokens per call.
          calls: Number of calls that the cache has room for.
          mode: "dynamic" cache; or the backend of `torch.compile`, with a static cache.
        """
        self.decoder.set_attn_implementation("eager")
        config, transformers = self.decoder.config, self.transformers
        if mode == "dynamic":
            cache = transformers.DynamicCache(config=config)
        else:
            config = copy.deepcopy(config)
            if positions + steps * calls <= config.sliding_window:
                # The window does not matter, and a sliding cache counts positions in a Python
                # integer, for whose every value torch.compile would compile again.
                config.layer_types = ["full_attention"] * config.num_hidden_layers
            cache = transformers.StaticCache(config=config, max_cache_len=positions + steps * calls)
        tokens = self.forward(self._random_ids(rows, positions), cache).argmax(-1)
        forward = self.forward
        if mode != "dynamic":
            dynamo: Any = import_module("torch._dynamo")
            dynamo.config.fail_on_recompile_limit_hit = True  # instead of running uncompiled
        if mode == "inductor":
            forward = self.torch.compile(self.forward, mode="reduce-overhead", dynamic=False)
        elif mode != "dynamic":
            forward = self.torch.compile(self.forward, backend=mode, dynamic=False)

        def call() -> None:
            nonlocal tokens
            for _ in range(steps):
                # The copy keeps CUDA graphs from overwriting the input of the next step.
                tokens = forward(tokens[:, None].clone(), cache).argmax(-1)

        return call

    def _random_ids(self, rows: int, positions: int) -> Any:
        size = self.decoder.config.vocab_size
        return self.torch.randint(0, size, (rows, positions), device=self.device)


def main(settings_path: str) -> None:
    """Answer commands until the end of the input."""
    settings = json.loads(Path(settings_path).read_text())
    # Libraries and compilers may print, so they get stderr as their standard output.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    models = TorchModels(settings["configs"], settings["device"], settings["dtype"])
    call: Callable[[], None] | None = None
    print(json.dumps({"version": models.torch.__version__}), file=replies, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            with models.torch.no_grad():
                if "stage" in command:
                    call = None  # frees the cache of the previous stage
                    prepare = getattr(models, f"prepare_{command.pop('stage')}")
                    call = prepare(**command)
                assert call is not None
                start = time.perf_counter()
                call()
                models.synchronize()
                reply = {"seconds": time.perf_counter() - start}
        # PyTorch and its compiler may raise anything; the other stages still run.
        except Exception as error:
            call = None
            message = str(error).strip().partition("\n")[0][:200]
            reply = {"error": f"{type(error).__name__}: {message}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

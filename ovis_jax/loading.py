"""Loading a checkpoint, and asking the loaded model questions."""

import math
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ovis_jax.argument_type_checks import check_argument_types
from ovis_jax.checkpoint.adapters import load_adapters
from ovis_jax.checkpoint.params import (
    OnRead,
    load_params,
    read_stored_dtype,
    safetensors_dtype,
)
from ovis_jax.checkpoint.resolve import resolve_checkpoint
from ovis_jax.checkpoint.safetensors_reader import DTYPES
from ovis_jax.config import OvisConfig
from ovis_jax.errors import OvisError, RequestError
from ovis_jax.inference.generate import Generation, stream
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.batch import pad_batch
from ovis_jax.inputs.conversation import Prompt
from ovis_jax.inputs.processor import Images, Processor
from ovis_jax.inputs.tokenizer import IncrementalDetokenizer
from ovis_jax.model.kv_cache import KVCacheDtype
from ovis_jax.model.lora import attach_adapters
from ovis_jax.model.ovis import Ovis, Params, activation_dtype
from ovis_jax.sharding import TENSOR, Rules, param_shapes, parse_rules


class AskOptions(TypedDict, total=False):
    """The keyword arguments of `LoadedOvis.ask`; its docstring describes them."""

    max_new_tokens: int
    temperature: float | None
    sampling: Sampling | None
    seed: int
    max_partition: int
    assistant_prefix: str
    parse_special_tokens: bool
    parse_image_placeholders: bool


@dataclass(frozen=True)
class PartialAnswer:
    """An answer after one more token.

    Attributes:
      delta: Text that the last token added.
      text: All text so far.
      tokens: All token ids so far, including the stop id.
      finish_reason: "stop" or "length" after the answer's last token; None before.
      prompt_positions: Number of positions in the prompt.
      seconds_to_first_token: Seconds from the call to the first token.
      seconds: Seconds from the call to this token.
    """

    delta: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length"] | None
    prompt_positions: int
    seconds_to_first_token: float
    seconds: float


@dataclass(frozen=True, repr=False)
class LoadedOvis:
    """A model with its parameters and its processor.

    Attributes:
      config: The config of the checkpoint.
      model: The model, whose methods are pure functions.
      params: The parameters, a nested dict of arrays.
      processor: Converts text and images to arrays, and ids to text.
      name: Name of the checkpoint: a folder name, a repo id or "ovis-tiny".
    """

    config: OvisConfig
    model: Ovis
    params: Params
    processor: Processor
    name: str = "Ovis"

    def __repr__(self) -> str:
        vision, decoder = self.config.vision, self.config.decoder
        num_params = sum(math.prod(shape) for shape in param_shapes(self.config).values())
        leaves = [x for x in jax.tree.leaves(self.params) if isinstance(x, jax.Array)]
        dtypes = ", ".join(sorted({str(x.dtype) for x in leaves}))
        devices = set().union(*(x.devices() for x in leaves))
        kinds = Counter(device.device_kind for device in devices)
        return (
            f"LoadedOvis({self.name}: {self.config.family} with {num_params:,} parameters in "
            f"{dtypes} on {', '.join(f'{number} x {kind}' for kind, number in kinds.items())}; "
            f"vision encoder of {vision.depth} blocks and width {vision.width}, "
            f"{self.config.visual_tokenizer.num_words:,} visual words, "
            f"decoder of {decoder.depth} blocks and width {decoder.width})"
        )

    def ask(
        self, prompt: Prompt, images: Images | None = None, **options: Unpack[AskOptions]
    ) -> str:
        """Answer one prompt.

        Args:
          prompt: A question, or a conversation as a list of turns `{"role": "user" | "assistant",
            "content": CONTENT}`; CONTENT is a string or a list of OpenAI content parts. "<image>"
            in a text marks the place of an image; if no text contains "<image>", the images come
            first.
          images: An image or a list of images. An image is a path, the bytes of a file, a `data:`
            URL, a PIL image, or a numpy or JAX uint8 array [h, w, 3].
          **options: Any of these keyword arguments: max_new_tokens: Maximum number of tokens of the
            answer. Default 1024. temperature: Short for `sampling=Sampling(temperature)`. Default
            None: greedy. sampling: How tokens are chosen. Default None: greedy. seed: Seed of the
            sampling. Default 0. max_partition: Maximum number of cells that an image is cut into.
            Default 9. assistant_prefix: Text that the answer begins with. Default "".
            parse_special_tokens: Whether special tokens spelled out in the prompt become their ids.
            Default True; pass False for text from people you do not trust.
            parse_image_placeholders: Whether "<image>" in a text marks the place of an image.
            Default True. If False, "<image>" is ordinary text, and content parts place the images.

        Returns:
          The text of the answer, without `assistant_prefix`.

        Raises:
          OvisError: The prompt, an image or an option is invalid.
        """
        return "".join(self.ask_stream(prompt, images, **options))

    def ask_stream(
        self, prompt: Prompt, images: Images | None = None, **options: Unpack[AskOptions]
    ) -> Iterator[str]:
        """Answer one prompt piece by piece; the arguments are those of `ask`.

        Yields:
          The next piece of the answer's text. Joined together, the pieces are the result of `ask`.

        Raises:
          OvisError: The prompt, an image or an option is invalid.
        """
        steps = self.stream_answer(prompt, images, **options)
        return (step.delta for step in steps if step.delta)

    def stream_answer(
        self,
        prompt: Prompt,
        images: Images | None = None,
        *,
        max_new_tokens: int = 1024,
        temperature: float | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        max_partition: int = 9,
        assistant_prefix: str = "",
        parse_special_tokens: bool = True,
        parse_image_placeholders: bool = True,
    ) -> Generator[PartialAnswer]:
        """Answer one prompt token by token, with ids and times; the arguments are those of `ask`.

        Yields:
          A `PartialAnswer` after each token. Closing the generator stops the generation.

        Raises:
          OvisError: The prompt, an image or an option is invalid.
        """
        start = time.perf_counter()
        if temperature is not None and sampling is not None:
            raise RequestError("temperature and sampling are both given; pass only one of them")
        sampling = sampling or Sampling(temperature)
        example = self.processor.encode(
            prompt,
            images,
            max_partition=max_partition,
            assistant_prefix=assistant_prefix,
            parse_special_tokens=parse_special_tokens,
            parse_image_placeholders=parse_image_placeholders,
        )
        buckets = self.processor.buckets
        inputs = pad_batch([example.tokens], example.pixels, self.config, buckets)
        chunks = stream(
            self.model,
            self.params,
            inputs,
            None if sampling.temperature is None else jax.random.key(seed),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
        )
        return self._follow(chunks, len(example.tokens), max_new_tokens, start)

    def _follow(
        self, chunks: Iterator[Generation], prompt_positions: int, max_new_tokens: int, start: float
    ) -> Generator[PartialAnswer]:
        detokenizer = IncrementalDetokenizer(self.processor.tokenizer)
        tokens, text, first = (), "", 0.0
        for chunk in chunks:
            token = int(np.asarray(chunk.tokens)[0, 0])
            elapsed = time.perf_counter() - start
            first = first or elapsed
            tokens = (*tokens, token)
            stopped = token in self.config.eos_ids
            finished = stopped or len(tokens) == max_new_tokens
            delta = "" if stopped else detokenizer.push(token)
            delta += detokenizer.finish() if finished else ""
            text += delta
            reason = ("stop" if stopped else "length") if finished else None
            yield PartialAnswer(
                delta, text, tokens, reason, prompt_positions, round(first, 3), round(elapsed, 3)
            )


def load(
    path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: Rules | str = TENSOR,
    quantization: str | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    adapters: str | Path | None = None,
    on_read: OnRead | None = None,
) -> LoadedOvis:
    """Load a checkpoint.

    Args:
      path: A converted folder, a folder in the Hub's layout, a repo id (which is downloaded), or
        "ovis-tiny", the small checkpoint that ships with the library.
      dtype: Dtype of parameters and activations: float32, bfloat16 or float16; None for the
        checkpoint's dtype. Gemma2 does not support float16: None loads a float16 checkpoint of
        Gemma2 in bfloat16.
      mesh: Mesh to shard the parameters over; None for the default device. Every device reads only
        its own slices, and every process reads only the slices for its devices.
      rules: Sharding rules, which map axis letters to mesh axes: `TENSOR`, `FSDP`, `TENSOR_FSDP`,
        one of the names "tensor", "fsdp" and "tensor_fsdp", or your own dict.
      quantization: "int8" or "int4" to quantize the matrices while reading; None loads them as they
        are stored. docs/quantization.md describes the formats and what they cost in quality.
      kv_cache_dtype: Dtype of the KV cache in generation, stored as `model.kv_cache_dtype`: "auto"
        for the dtype of the activations, or "int8", which takes half the memory of bfloat16.
      adapters: Folder of LoRA adapters that `ovis-jax train`, `save_adapters` or PEFT wrote. Each
        adapted matrix becomes a `LowRank` in the parameters.
      on_read: Called with the key and the size in bytes of each slice that this process reads.

    Raises:
      ConfigError: A config or tokenizer file is missing or has an unsupported value.
      CheckpointError: The weights or adapters do not match the config; the error lists all
        problems.
      OvisError: The checkpoint or the folder of adapters does not exist, the model does not support
        the dtype, the rules are invalid or cannot shard the parameters over the mesh, or rules
        other than `TENSOR` are given without a mesh.
      OSError: The Hub cannot be reached, or a file cannot be read.
      RequestError: The dtype of the KV cache is unknown.
      TypeError: `mesh` or `rules` has the wrong type.
    """
    check_argument_types("load", mesh=(mesh, Mesh | None), rules=(rules, Mapping | str))
    rules = parse_rules(rules)
    if mesh is not None:
        mesh = Mesh(mesh.devices, mesh.axis_names)  # with automatic axes
    elif rules != TENSOR:
        raise OvisError("load: rules are given without a mesh; pass a mesh, or leave out rules")
    checkpoint = resolve_checkpoint(path)
    folder = checkpoint.folder
    config = OvisConfig.from_folder(folder)
    dtype = _compute_dtype(folder, config, dtype)
    model = Ovis(config, kv_cache_dtype=kv_cache_dtype)
    processor = Processor.from_folder(folder, config)
    # Adapters are read first, because they are small and may belong to a different model.
    lora = None if adapters is None else load_adapters(adapters, config, mesh=mesh, rules=rules)
    params = load_params(
        folder,
        config,
        dtype=dtype,
        mesh=mesh,
        rules=rules,
        quantization=quantization,
        on_read=on_read,
    )
    if lora is not None:
        weights = {path: x.astype(activation_dtype(params)) for path, x in lora.weights.items()}
        params = attach_adapters(params, weights, lora.scale)
    return LoadedOvis(config, model, params, processor, checkpoint.name)


def _compute_dtype(folder: Path, config: OvisConfig, dtype: DTypeLike | None) -> DTypeLike | None:
    """Return the dtype to cast the parameters to; None for the checkpoint's dtype."""
    if dtype is not None:
        config.check_compute_dtype(DTYPES[safetensors_dtype(dtype)].name)
    elif read_stored_dtype(folder) == "F16" and not config.decoder.supports_float16:
        return "bfloat16"
    return dtype

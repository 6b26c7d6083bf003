"""Write golden files for your own checkpoint and images, with the original PyTorch code.

    python tools/make_goldens.py CHECKPOINT OUT --image cat.png --prompt "What is this?"

CHECKPOINT is a folder in the Hub's layout, or a repo id such as AIDC-AI/Ovis1.6-Gemma2-9B. Its own
Python code (modeling_ovis.py) runs on this machine. OUT is a new folder: one .npz file per prompt,
and copies of the images. `ovis-jax verify DIR OUT/*.npz` compares a checkpoint with these files,
whose fields are described in tests/golden/README.md.

Each --prompt takes the --image options in front of it, back to the previous --prompt. "<image>" in
a prompt marks the place of an image; without it, the images come first.

The script needs PyTorch, transformers 4.46 and Pillow before 13, in an environment of its own. It
imports nothing from ovis_jax.
"""

import argparse
import contextlib
import importlib.metadata
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGE_PLACEHOLDER = "<image>"
IMAGE_SLOT = -300
"""The id that the original puts in the place of each crop."""
TOP_WORDS = 8
"""The number of visual words per visual token whose probabilities are stored."""

TEXT_FIELDS = (
    "input_ids",
    "inputs_embeds",
    "merged_mask",
    "position_ids",
    "llm_blocks",
    "logits",
    "gen_tokens",
    "gen_margins",
)
IMAGE_FIELDS = (
    "pixel_values",
    "visual_features",
    "visual_logits",
    "visual_top8_ids",
    "visual_top8_probs",
    "visual_embeds",
)
BFLOAT16_IMAGE_FIELDS = ("siglip_hidden",)
"""Float32 results are compared end to end, which needs no output of single vision blocks."""


class GoldenError(Exception):
    """Bad input, reported as one line: what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Case:
    """One prompt with its images."""

    name: str
    text: str
    images: tuple[Path, ...]


def read_cases(options: Sequence[tuple[str, str]]) -> list[Case]:
    """Group --image and --prompt options, in the order given, into cases.

    Args:
      options: ("image", path) or ("prompt", text).

    Raises:
      GoldenError: an image is unreadable or comes after the last prompt, a prompt is empty, or the
        number of "<image>" in a prompt is not the number of its images.
    """
    cases: list[Case] = []
    images: list[Path] = []
    for kind, value in options:
        if kind == "image":
            images.append(Path(value))
            continue
        number = len(cases) + 1
        if not value.strip():
            raise GoldenError(f"prompt {number} is empty; write what the model is to answer")
        marks = value.count(IMAGE_PLACEHOLDER)
        if marks not in (0, len(images)):
            raise GoldenError(
                f"prompt {number} has {marks} {IMAGE_PLACEHOLDER} but {len(images)} --image before"
                f" it; give one --image for each {IMAGE_PLACEHOLDER}, or write none to put the"
                " images first"
            )
        text = value if marks else f"{IMAGE_PLACEHOLDER}\n" * len(images) + value
        stem = images[0].stem if images else "text"
        name = f"{number}-{re.sub(r'[^A-Za-z0-9_-]+', '_', stem)}"
        cases.append(Case(name, text, tuple(images)))
        images = []
    if images:
        raise GoldenError(
            f"--image {images[0]} comes after the last --prompt; put each image in front of the "
            "prompt it belongs to"
        )
    if not cases:
        raise GoldenError('no prompt is given; add --prompt "..."')
    for case in cases:
        for path in case.images:
            read_image(path)
    return cases


def read_image(path: Path) -> Image.Image:
    """Read an image the way the original's examples do.

    Raises:
      GoldenError: the file is missing or is no image, or the original would misread it.
    """
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise GoldenError(f"--image {path} does not exist; check the path") from error
    # Each of Pillow's decoders raises what its parser happens to raise on a damaged file.
    except Exception as error:
        raise GoldenError(f"--image {path} cannot be decoded as an image: {error}") from error
    if image.height in (1, 3):
        raise GoldenError(
            f"--image {path} is {image.height} pixels high, which the original code mistakes for "
            "a number of color channels; use a taller image"
        )
    return image


def check_versions(versions: Mapping[str, str | None]) -> None:
    """Check the installed packages.

    Args:
      versions: the version of torch, transformers and pillow; None if not installed.

    Raises:
      GoldenError: a package is missing or of a version that gives other results.
    """
    advice = "install torch, 'transformers==4.46.2' and 'pillow<13' in a new environment"
    for package, version in versions.items():
        if version is None:
            raise GoldenError(f"{package} is not installed; {advice}")
    if not str(versions["transformers"]).startswith("4.46."):
        raise GoldenError(
            f"transformers is {versions['transformers']}, expected 4.46.x: the code of the "
            f"checkpoint was written for it; {advice}"
        )
    if int(str(versions["pillow"]).split(".")[0]) >= 13:
        raise GoldenError(
            f"Pillow is {versions['pillow']}, expected a version before 13: from 13 on, tall "
            f"images are resized in another order and give other pixels; {advice}"
        )


def installed_versions() -> dict[str, str | None]:
    """The versions that `check_versions` checks."""
    versions: dict[str, str | None] = {}
    for package in ("torch", "transformers", "pillow"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def check_config(config: Mapping[str, Any], checkpoint: str) -> None:
    """Check that a parsed config.json is that of an Ovis1.6 model with its own code.

    Raises:
      GoldenError: it is another model, is quantized, draws random numbers, or lacks its code.
    """
    where = f"config.json of {checkpoint}"
    parts = (
        ("llm_config", ("gemma2", "llama")),
        (
            "visual_tokenizer_config",
            ("siglip_visual_tokenizer",),
        ),
    )
    if config.get("model_type") != "ovis":
        raise GoldenError(
            f"model_type in {where} is {config.get('model_type')!r}, expected 'ovis'; give an "
            "Ovis1.6 checkpoint"
        )
    for section, expected in parts:
        found = config.get(section, {}).get("model_type")
        if found not in expected:
            raise GoldenError(
                f"{section}.model_type in {where} is {found!r}, expected "
                f"{' or '.join(map(repr, expected))}; give an Ovis1.6 checkpoint"
            )
    if "quantization_config" in config:
        raise GoldenError(
            f"{where} has a quantization_config, and quantized weights are not supported; give "
            "the checkpoint that is not quantized"
        )
    if config["visual_tokenizer_config"].get("tokenize_function") == "gumbel_argmax":
        raise GoldenError(
            f"tokenize_function in {where} is 'gumbel_argmax', for which the original draws random "
            "numbers; its results cannot be compared"
        )
    code = config.get("auto_map", {}).get("AutoModelForCausalLM")
    if code is None:
        raise GoldenError(
            f"auto_map in {where} names no AutoModelForCausalLM; give the Hub's own folder, which "
            "holds modeling_ovis.py"
        )
    file = Path(checkpoint) / f"{code.split('.')[0]}.py"
    if Path(checkpoint).is_dir() and "--" not in code and not file.is_file():
        raise GoldenError(
            f"{file} does not exist, though config.json names it in auto_map; give the Hub's own "
            "folder, or copy its .py files into this one"
        )


def load_model(checkpoint: str, dtype: str, device: str) -> Any:
    """Load a checkpoint with its own code, in evaluation mode.

    Args:
      checkpoint: a folder, or a repo id of the Hub.
      dtype: "float32" or "bfloat16".
      device: such as "cpu" or "cuda:0".

    Raises:
      GoldenError: it is no Ovis1.6 checkpoint, cannot be loaded, or lacks tensors.
    """
    import torch
    from transformers import AutoModelForCausalLM, PretrainedConfig

    # On a GPU, PyTorch runs convolutions of float32 in TF32 unless told otherwise.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        config, _ = PretrainedConfig.get_config_dict(checkpoint)
    except (OSError, ValueError) as error:
        raise GoldenError(
            f"{checkpoint} has no readable config.json: {_first_line(error)}; give a folder in the "
            "Hub's layout or a repo id"
        ) from error
    check_config(config, checkpoint)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            torch_dtype=getattr(torch, dtype),
            # In transformers 4.46, sdpa attention leaves out Gemma2's soft cap.
            llm_attn_implementation="eager",
            trust_remote_code=True,
            output_loading_info=True,
        )
        model, info = loaded
        model = model.eval().to(device)
    # The code of the checkpoint may raise anything.
    except Exception as error:
        raise GoldenError(f"{checkpoint} cannot be loaded: {_first_line(error)}") from error
    if missing := info["missing_keys"]:
        raise GoldenError(
            f"{checkpoint} lacks {len(missing)} tensor(s), such as {missing[0]}, which would be "
            "random; download the checkpoint again"
        )
    attention = model.get_llm().config._attn_implementation
    if attention != "eager":
        raise GoldenError(
            f"the language model of {checkpoint} runs with {attention} attention, expected eager; "
            "set llm_attn_implementation in config.json to eager"
        )
    return model


def compute(
    model: Any,
    text: str,
    images: Sequence[Image.Image],
    *,
    max_partition: int = 9,
    max_new_tokens: int = 24,
) -> dict[str, np.ndarray]:
    """Run the original code on one prompt and keep its intermediate results.

    Args:
      model: what `load_model` returns.
      text: the prompt, with one "<image>" per image.
      images: in order of appearance.
      max_partition: the largest number of cells an image is split into.
      max_new_tokens: the number of greedy tokens. Each one takes a forward pass over the whole
        sequence, since the cache of transformers 4.46 does not always give the same tokens.

    Returns:
      The fields of a golden file without `meta`: n crops of M visual tokens, u ids before and s
      positions after merging. Floating-point results are widened to float32.

    Raises:
      GoldenError: the original code fails on the prompt, cuts it, or ignores a part of it.
    """
    import torch

    try:
        prompt, input_ids, pixels = model.preprocess_inputs(
            text, list(images), max_partition=max_partition
        )
    # Too small an image, for one, makes the original fail somewhere in its image processor.
    except Exception as error:
        raise GoldenError(
            f"the original code cannot preprocess the prompt: {_first_line(error)}"
        ) from error
    mask = input_ids != model.get_text_tokenizer().pad_token_id
    if not mask.all():
        raise GoldenError(
            "the prompt spells out the padding token, which the original masks; leave it out"
        )
    device, dtype = model.get_wte().weight.device, model.get_wte().weight.dtype
    bfloat16 = dtype == torch.bfloat16
    with torch.inference_mode(), _record(model, vision_blocks=bfloat16) as found:
        _, embeds, _, merged_mask = model.merge_multimodal(
            text_input_ids=input_ids[None].to(device),
            text_attention_masks=mask[None].to(device),
            text_labels=None,
            pixel_values=[None if pixels is None else pixels.to(device, dtype)],
        )
        if embeds.shape[1] >= (limit := model.config.multimodal_max_length):
            raise GoldenError(
                f"the prompt takes all {limit} positions of multimodal_max_length, and the "
                "original cuts off the rest; lower --max-partition or shorten the prompt"
            )
        position_ids = merged_mask.long().cumsum(dim=1) - 1
        logits = model.get_llm()(
            inputs_embeds=embeds,
            attention_mask=merged_mask,
            position_ids=position_ids,
            use_cache=False,
        ).logits
    found |= {
        "prompt": np.array(prompt),
        "input_ids": input_ids.numpy(),
        "attention_mask": mask.numpy(),
        "inputs_embeds": _to_numpy(embeds[0]),
        "merged_mask": _to_numpy(merged_mask[0]),
        "position_ids": _to_numpy(position_ids[0]),
        "llm_blocks": np.stack(found["llm_blocks"]),
        "logits": _to_numpy(logits[0]),
    }
    if pixels is not None:
        found["pixel_values"] = pixels.numpy()
    return found | _generate(model, embeds, max_new_tokens)


def check_fields(fields: Mapping[str, np.ndarray], *, bfloat16: bool) -> None:
    """Check that a golden file with these fields can be compared.

    Raises:
      GoldenError: a field is missing, or holds infinities or NaN.
    """
    needed = TEXT_FIELDS
    if "input_ids" in fields and IMAGE_SLOT in fields["input_ids"]:
        needed += IMAGE_FIELDS + (BFLOAT16_IMAGE_FIELDS if bfloat16 else ())
    if missing := [name for name in needed if name not in fields]:
        raise GoldenError(
            f"the model's code gave no {', '.join(missing)}: this script does not fit that code, "
            "which should be that of Ovis1.6"
        )
    for name, array in fields.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise GoldenError(
                f"{name} holds infinities or NaN, so nothing can be compared; check the weights, "
                "or try another --dtype"
            )


def write_golden(path: Path, meta: Mapping[str, Any], fields: Mapping[str, np.ndarray]) -> None:
    """Write one golden file, which `ovis-jax verify` reads.

    Args:
      path: NAME.npz, in a folder that has the images in `images/`.
      meta: text, images (names), max_partition, and compute "bf16" for results in bfloat16.
      fields: what `compute` returns.

    Raises:
      GoldenError: a field is missing, or holds infinities or NaN; nothing is written.
    """
    check_fields(fields, bfloat16=meta.get("compute") == "bf16")
    arrays: dict[str, Any] = {**fields, "meta": np.array(json.dumps(meta))}
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def copy_images(cases: Sequence[Case], folder: Path) -> dict[Path, str]:
    """Copy the images of all cases into a folder, each under a name of its own.

    Returns:
      The name of each image's copy. Images of the same name are numbered: cat.png, cat-2.png.
    """
    names: dict[Path, str] = {}
    for path in (path for case in cases for path in case.images):
        if path in names:
            continue
        name, number = path.name, 1
        while name in names.values():
            number += 1
            name = f"{path.stem}-{number}{path.suffix}"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
        names[path] = name
    return names


def check_new(out: Path) -> None:
    """Check that an output folder does not exist yet.

    Raises:
      GoldenError: it does, or an aborted run has left its `.partial` folder.
    """
    if out.exists():
        raise GoldenError(f"{out} already exists; remove it, or choose another OUT")
    if (partial := _partial(out)).exists():
        raise GoldenError(
            f"{partial} exists: another run is writing it, or one was killed; remove it if none is"
        )


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write to, which becomes `out` at the end; on an error nothing is left.

    Raises:
      GoldenError: `out` exists.
    """
    check_new(out)
    partial = _partial(out)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `inputs` holds --image and --prompt in the order given."""
    summary, _, details = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s CHECKPOINT OUT [--image FILE ...] --prompt TEXT [...] [options]",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or repo id on the Hub"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder for the golden files")
    for kind, metavar, text in [
        ("image", "FILE", "image for the next --prompt, preferably a PNG; may be repeated"),
        ("prompt", "TEXT", "question to the model, which gives one golden file; may be repeated"),
    ]:
        parser.add_argument(
            f"--{kind}",
            metavar=metavar,
            help=text,
            dest="inputs",
            action="append",
            default=[],
            type=lambda value, kind=kind: (kind, value),
        )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the model; float32 results are compared end to end, bfloat16 results one "
        "stage at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--max-partition",
        type=_positive,
        default=9,
        metavar="N",
        help="maximum number of grid cells that an image is split into (default: %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=_positive,
        default=24,
        metavar="N",
        help="number of greedy tokens; each takes a full forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="cpu", help="PyTorch device, such as cuda:0 (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def make_goldens(arguments: argparse.Namespace) -> None:
    """Write the folder of golden files that the command line asks for.

    Raises:
      GoldenError: bad input; nothing is written.
    """
    out: Path = arguments.out
    check_new(out)
    cases = read_cases(arguments.inputs)
    versions = installed_versions()
    check_versions(versions)
    checkpoint = arguments.checkpoint
    if Path(checkpoint).exists():
        checkpoint = str(Path(checkpoint))  # without a trailing slash, which transformers drops
    model = load_model(checkpoint, arguments.dtype, arguments.device)
    with new_folder(out) as folder:
        names = copy_images(cases, folder / "images")
        for case in cases:
            try:
                fields = compute(
                    model,
                    case.text,
                    [read_image(path) for path in case.images],
                    max_partition=arguments.max_partition,
                    max_new_tokens=arguments.max_new_tokens,
                )
            except GoldenError as error:
                raise GoldenError(f"{case.name}: {error}") from error
            eos_ids = model.generation_config.eos_token_id
            meta = {
                "case": case.name,
                "text": case.text,
                "images": [names[path] for path in case.images],
                "max_partition": arguments.max_partition,
                "eos_token_id": eos_ids,
                "made_with": versions | {"device": arguments.device},
            }
            if arguments.dtype == "bfloat16":
                meta["compute"] = "bf16"
            write_golden(folder / f"{case.name}.npz", meta, fields)
            tokens = fields["gen_tokens"].tolist()
            stops = [n for n, token in enumerate(tokens) if token in np.atleast_1d(eos_ids)]
            answer = model.get_text_tokenizer().decode(
                tokens[: stops[0] if stops else None], skip_special_tokens=True
            )
            print(f"{case.name}: {len(fields['merged_mask'])} positions, answer {answer!r}")
    print(f"compare with: ovis-jax verify DIR {out}/*.npz")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; errors are one line, and status 2."""
    try:
        make_goldens(parse_arguments(arguments))
    except GoldenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _record(model: Any, *, vision_blocks: bool) -> Iterator[dict[str, Any]]:
    """Keep what passes between the parts of a model, under the names of a golden file's fields."""
    import torch

    found: dict[str, Any] = {"llm_blocks": []}

    def keep_head(_module: Any, inputs: Any, output: Any) -> None:
        found["visual_features"], found["visual_logits"] = _to_numpy(inputs[0]), _to_numpy(output)

    def keep_probabilities(_module: Any, _inputs: Any, output: Any) -> None:
        top = torch.topk(output.float(), TOP_WORDS, dim=-1)
        found["visual_top8_ids"] = _to_numpy(top.indices)
        found["visual_top8_probs"] = _to_numpy(top.values)

    def keep_embeddings(_module: Any, inputs: Any, output: Any) -> None:
        if inputs[0].is_floating_point():  # else the ids of the image indicators
            found["visual_embeds"] = _to_numpy(output)

    def keep_vision(_module: Any, _inputs: Any, output: Any) -> None:
        found["siglip_hidden"] = np.stack([_to_numpy(x) for x in output.hidden_states])

    def keep_block(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found["llm_blocks"].append(_to_numpy(hidden[0]))

    visual_tokenizer = model.get_visual_tokenizer()
    hooks = [
        (visual_tokenizer.head, keep_head),
        (visual_tokenizer, keep_probabilities),
        (model.get_vte(), keep_embeddings),
        *[(layer, keep_block) for layer in model.get_llm().model.layers],
    ]
    if vision_blocks:
        hooks.append((visual_tokenizer.backbone, keep_vision))
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _generate(model: Any, embeds: Any, max_new_tokens: int) -> dict[str, np.ndarray]:
    """Greedy tokens without a cache and without a stop, and the margin of each over the next."""
    import torch

    tokens, margins = [], []
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
            logits = model.get_llm()(
                inputs_embeds=embeds, attention_mask=mask, use_cache=False, num_logits_to_keep=1
            ).logits[0, -1]
            first, second = torch.topk(logits.float(), 2).values.tolist()
            token = logits.argmax()
            tokens.append(token.item())
            margins.append(first - second)
            embeds = torch.cat([embeds, model.get_wte()(token[None, None])], dim=1)
    return {
        "gen_tokens": np.array(tokens, np.int64),
        "gen_margins": np.array(margins, np.float32),
    }


def _to_numpy(tensor: Any) -> np.ndarray:
    """A tensor on the host; floating-point numbers are widened to float32."""
    if tensor.is_floating_point():
        tensor = tensor.float()
    return tensor.detach().cpu().numpy()


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive whole number")
    return int(value)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())

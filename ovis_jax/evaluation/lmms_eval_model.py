"""A model for lmms-eval: `lmms-eval --model ovis_jax --model_args pretrained=DIR --tasks ...`.

The model implements lmms-eval 0.7's interface `lmms` for models that take text and images. Only
this module and the entry point import lmms-eval.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image

from ovis_jax.errors import RequestError
from ovis_jax.evaluation.batch_answering import (
    EvalPrompt,
    answer_prompts,
    harness_prompt,
    score_answers,
)
from ovis_jax.evaluation.published_prompts_and_scores import load_published_benchmarks
from ovis_jax.inference.sampling import Sampling
from ovis_jax.loading import load


class OvisForLmmsEval(lmms):
    """Ovis as a model for lmms-eval.

    Args:
      pretrained: The checkpoint, as for `ovis_jax.load`.
      batch_size: Number of questions per batch. "auto" is rejected.
      max_batch_size: Ignored; lmms-eval uses this argument only with "auto".
      device: Ignored; JAX chooses the device.
      dtype: Dtype of the computation; None for the checkpoint's dtype.
      adapters: Folder of LoRA adapters.
      max_partition: Maximum number of cells that an image is split into; None for the published
        setting.
      seed: Sampling seed, used by tasks that sample.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "ovis-tiny",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        adapters: str | None = None,
        max_partition: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise RequestError(
                f"batch_size is {batch_size!r}, expected a number of at least 1, for example"
                " --batch_size 8; the largest number that fits is not searched for"
            )
        self.batch_size = int(batch_size)
        self._ovis = load(pretrained, dtype=dtype, adapters=adapters)
        self._published = load_published_benchmarks().settings
        self._max_partition = int(max_partition or self._published["max_partition"])
        self._seed = int(seed)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests; requests with equal settings are batched together."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(i)
        answers = [""] * len(requests)
        for indices in groups.values():
            batch = [self._prompt(requests[i].args) for i in indices]
            settings = requests[indices[0]].args[1]
            for i, text in zip(indices, self._answer(batch, settings), strict=True):
                answers[i] = text
                args = requests[i].args
                self.cache_hook.add_partial("generate_until", (args[0], args[1]), text)
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer multi-round requests; the task builds each round from the previous answers.

        As in lmms-eval's own models, a round consists only of the text and images that the task
        returns for it. Earlier rounds are not part of the prompt.
        """
        results = []
        for request in requests:
            text, settings, doc_to_visual, doc_to_text, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            visuals, answers, round_info = doc_to_visual(doc), [], None
            while True:
                answers += self._answer([harness_prompt(text, _check_images(visuals))], settings)
                visuals, text, is_over, outputs, round_info = doc_to_text(
                    doc,
                    previous_output=answers,
                    round_idx=len(answers),
                    previous_round_info=round_info,
                )
                answers = list(outputs)
                if is_over:
                    break
            results.append(answers)
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return each continuation's loss per token, and whether greedy decoding generates it.

        The loss is the negative mean log-probability, because lmms-eval selects the option with the
        lowest value that this method returns.
        """
        prompts, targets = [], []
        for request in requests:
            text, target, *rest = request.args
            if not rest:  # no image and no document: for lmms-eval's mutual information
                prompts.append(harness_prompt(text or " "))
                targets.append(target)
                continue
            doc = self.task_dict[rest[2]][rest[3]][rest[1]]
            prompts.append(harness_prompt(text, _check_images(rest[0](doc))))
            targets.append(target if isinstance(target, str) else target(doc))
        results = [(0.0, False)] * len(requests)
        for index, _, mean_log_probs, greedy in score_answers(
            self._ovis,
            prompts,
            [[target] for target in targets],
            batch_size=self.batch_size,
            max_partition=self._max_partition,
        ):
            results[index] = -float(mean_log_probs[0]), bool(greedy[0])
        return results

    def _prompt(self, args: Sequence[Any]) -> EvalPrompt:
        text, _, doc_to_visual, doc_id, task, split = args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        return harness_prompt(text, _check_images(visuals))

    def _answer(self, prompts: Sequence[EvalPrompt], settings: Mapping[str, Any]) -> list[str]:
        """Answer prompts with the same settings; answers end before the first `until` string."""
        if settings.get("num_beams") not in (None, 1):
            raise RequestError(f"num_beams is {settings['num_beams']}, expected 1: greedy decoding")
        temperature = settings.get("temperature") or 0.0
        samples = settings.get("do_sample", temperature > 0) and temperature > 0
        sampling = Sampling(temperature, None, settings.get("top_p")) if samples else Sampling()
        texts = [""] * len(prompts)
        for index, text, _ in answer_prompts(
            self._ovis,
            prompts,
            batch_size=self.batch_size,
            max_new_tokens=settings.get("max_new_tokens", self._published["max_new_tokens"]),
            max_partition=self._max_partition,
            sampling=sampling,
            key=jax.random.key(self._seed) if samples else None,
        ):
            texts[index] = text.strip()
        until = settings.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return texts


def _check_images(visuals: Sequence[Any] | None) -> list[Image.Image]:
    """Return the images of a request; raise an error if it contains other media."""
    images = [visual for visual in visuals or () if visual is not None]
    for image in images:
        if not isinstance(image, Image.Image):
            raise RequestError(
                f"a task has an input of type {type(image).__name__}, expected a PIL image:"
                " this model supports neither video nor audio"
            )
    return images

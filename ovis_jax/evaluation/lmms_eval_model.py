"""A model for lmms-eval: `lmms-eval --model ovis_jax --model_args pretrained=DIR --tasks ...`.

It implements the interface `lmms` of lmms-eval 0.7 for models that take text and images. No other
module imports lmms-eval.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image

from ovis_jax.errors import RequestError
from ovis_jax.evaluation.batch_answering import group_by_length, pad_to_batch, repeat_last
from ovis_jax.evaluation.harness import HarnessRequest, answer_requests
from ovis_jax.evaluation.published_prompts_and_scores import load_published_benchmarks
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inference.score import score
from ovis_jax.inputs.candidate_answers import encode_answers
from ovis_jax.loading import load


class OvisForLmmsEval(lmms):
    """Ovis as an lmms-eval model.

    Args:
      pretrained: checkpoint, as for `ovis_jax.load`.
      batch_size: number of questions per batch.
      device: ignored; JAX chooses the device.
      dtype: dtype of the computation; None for that of the checkpoint.
      adapters: folder of low-rank adapters.
      max_partition: maximum number of cells that an image is split into; None for the published
        setting.
      seed: sampling seed, for tasks that sample.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "ovis-tiny",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        adapters: str | None = None,
        max_partition: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self._ovis = load(pretrained, dtype=dtype, adapters=adapters)
        self.batch_size = int(batch_size)
        self._published = load_published_benchmarks().settings
        self._max_partition = int(max_partition or self._published["max_partition"])
        self._seed = int(seed)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests; those with equal settings are batched together."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(i)
        answers = [""] * len(requests)
        for indices in groups.values():
            batch = [self._request(requests[i].args) for i in indices]
            settings = requests[indices[0]].args[1]
            for i, text in zip(indices, self._answer(batch, settings), strict=True):
                answers[i] = text
                args = requests[i].args
                self.cache_hook.add_partial("generate_until", (args[0], args[1]), text)
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer requests of several rounds; the task builds each round from previous answers."""
        results = []
        for request in requests:
            text, settings, doc_to_visual, doc_to_text, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            visuals, answers, round_info = doc_to_visual(doc), [], None
            while True:
                answers += self._answer([HarnessRequest(text, _check_images(visuals))], settings)
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
        """Return each continuation's loss per token, and whether greedy decoding gives it.

        The loss is the negative mean log-probability: lmms-eval selects the option with the lowest
        value that a model returns here.
        """
        batchable, targets = [], []
        for request in requests:
            text, target, *rest = request.args
            if not rest:  # no image and no document: lmms-eval computes mutual information
                batchable.append(HarnessRequest(text or " "))
                targets.append(target)
                continue
            doc = self.task_dict[rest[2]][rest[3]][rest[1]]
            batchable.append(HarnessRequest(text, _check_images(rest[0](doc))))
            targets.append(target if isinstance(target, str) else target(doc))
        results = [(0.0, False)] * len(requests)
        for indices in group_by_length([x.length for x in batchable], self.batch_size):
            examples = [
                batchable[i].encode(self._ovis.processor, self._max_partition) for i in indices
            ]
            inputs = pad_to_batch(self._ovis.processor, examples, self.batch_size)
            texts = repeat_last([[targets[i]] for i in indices], self.batch_size)
            answers = encode_answers(self._ovis.processor, texts)
            scores = score(self._ovis.model, self._ovis.params, inputs, answers)
            losses, greedy = -np.asarray(scores.mean_log_probs), np.asarray(scores.greedy)
            for n, i in enumerate(indices):
                results[i] = float(losses[n, 0]), bool(greedy[n, 0])
        return results

    def _request(self, args: Sequence[Any]) -> HarnessRequest:
        text, _, doc_to_visual, doc_id, task, split = args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        return HarnessRequest(text, _check_images(visuals))

    def _answer(self, requests: Sequence[HarnessRequest], settings: Mapping[str, Any]) -> list[str]:
        """Answer requests with the same settings, and cut each answer at the `until` strings."""
        if settings.get("num_beams") not in (None, 1):
            raise RequestError(f"num_beams is {settings['num_beams']}, expected 1: greedy decoding")
        temperature = settings.get("temperature") or 0.0
        samples = settings.get("do_sample", temperature > 0) and temperature > 0
        sampling = Sampling(temperature, None, settings.get("top_p")) if samples else Sampling()
        texts = answer_requests(
            self._ovis,
            requests,
            batch_size=self.batch_size,
            max_new_tokens=settings.get("max_new_tokens", self._published["max_new_tokens"]),
            max_partition=self._max_partition,
            sampling=sampling,
            key=jax.random.key(self._seed) if samples else None,
        )
        until = settings.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return texts


def _check_images(visuals: Sequence[Any] | None) -> list[Image.Image]:
    """Return the images of a task; raise an error if it has other media."""
    images = [visual for visual in visuals or () if visual is not None]
    for image in images:
        if not isinstance(image, Image.Image):
            raise RequestError(
                f"a task has a {type(image).__name__} as input, expected a PIL image: this model"
                " supports neither video nor audio"
            )
    return images

"""A model of lmms-eval: `lmms-eval --model ovis_jax --model_args pretrained=DIR --tasks ...`.

lmms-eval imports this module, and it imports lmms-eval; nothing else here does. Written to the
interface `lmms` of lmms-eval 0.7, for models that take text and pictures.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image

from ovis_jax.errors import RequestError
from ovis_jax.evaluation.published import published
from ovis_jax.evaluation.requests import Request, answers
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inference.score import score
from ovis_jax.inputs.answers import encode_answers
from ovis_jax.loading import load
from ovis_jax.training.evaluation import like_length, turns_length


class OvisJax(lmms):
    """Ovis in JAX as lmms-eval sees it.

    Args:
      pretrained: as for `ovis_jax.load`.
      batch_size: questions asked at once.
      device: ignored; JAX chooses.
      dtype: compute in this dtype, not as stored.
      adapters: a folder of low-rank adapters.
      max_partition: the most cells of an image.
      seed: of sampling, where a task asks for it.
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
        self._max_partition = int(max_partition or published().settings["max_partition"])
        self._seed = int(seed)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer each request; those of the same settings are answered together."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(i)
        found = [""] * len(requests)
        for indices in groups.values():
            asked = [self._request(requests[i].args) for i in indices]
            settings = requests[indices[0]].args[1]
            for i, text in zip(indices, self._answer(asked, settings), strict=True):
                found[i] = text
                args = requests[i].args
                self.cache_hook.add_partial("generate_until", (args[0], args[1]), text)
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer each request's rounds; the task makes each of them from the answers so far."""
        found = []
        for request in requests:
            text, settings, doc_to_visual, doc_to_text, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            visuals, said, known = doc_to_visual(doc), [], None
            while True:
                said += self._answer([Request(text, _images(visuals))], settings)
                visuals, text, is_over, outputs, known = doc_to_text(
                    doc, previous_output=said, round_idx=len(said), previous_round_info=known
                )
                said = list(outputs)
                if is_over:
                    break
            found.append(said)
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The loss of each continuation, and whether greedy decoding begins with it.

        The loss, minus the log-probability a token: lmms-eval takes the option with the least of
        what its models return here.
        """
        asked, targets = [], []
        for request in requests:
            text, target, *rest = request.args
            if not rest:  # without a picture or document: for mutual information
                asked.append(Request(text or " "))
                targets.append(target)
                continue
            doc = self.task_dict[rest[2]][rest[3]][rest[1]]
            asked.append(Request(text, _images(rest[0](doc))))
            targets.append(target if isinstance(target, str) else target(doc))
        found = [(0.0, False)] * len(requests)
        lengths = [turns_length(request.images, request.turns) for request in asked]
        for indices in like_length(lengths, self.batch_size):
            filled = indices + indices[-1:] * (self.batch_size - len(indices))
            inputs = self._ovis.processor(
                [asked[i].turns for i in filled],
                [asked[i].images for i in filled],
                max_partition=self._max_partition,
            )
            given = encode_answers(self._ovis.processor, [[targets[i]] for i in filled])
            scores = score(self._ovis.model, self._ovis.params, inputs, given)
            losses, greedy = -np.asarray(scores.mean_log_probs), np.asarray(scores.greedy)
            for n, i in enumerate(indices):
                found[i] = float(losses[n, 0]), bool(greedy[n, 0])
        return found

    def _request(self, args: Sequence[Any]) -> Request:
        text, _, doc_to_visual, doc_id, task, split = args
        return Request(text, _images(doc_to_visual(self.task_dict[task][split][doc_id])))

    def _answer(self, asked: Sequence[Request], settings: Mapping[str, Any]) -> list[str]:
        """Answer requests of the same settings, each cut where one of `until` begins."""
        if settings.get("num_beams") not in (None, 1):
            raise RequestError(f"num_beams is {settings['num_beams']}, expected 1: greedy decoding")
        temperature = settings.get("temperature") or 0.0
        samples = settings.get("do_sample", temperature > 0) and temperature > 0
        sampling = Sampling(temperature, None, settings.get("top_p")) if samples else Sampling()
        texts = answers(
            self._ovis,
            asked,
            batch=self.batch_size,
            max_new_tokens=settings.get("max_new_tokens", published().settings["max_new_tokens"]),
            max_partition=self._max_partition,
            sampling=sampling,
            key=jax.random.key(self._seed) if samples else None,
        )
        until = settings.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return texts


def _images(visuals: Sequence[Any] | None) -> list[Image.Image]:
    """The pictures of a task; what is none of them is refused."""
    found = [visual for visual in visuals or () if visual is not None]
    for visual in found:
        if not isinstance(visual, Image.Image):
            raise RequestError(
                f"a task gave a {type(visual).__name__} to look at, expected pictures: "
                "this model reads no video and no sound"
            )
    return found

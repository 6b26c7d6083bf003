"""The sizes that are chosen for an engine, by the memory of the devices."""

import pytest

from ovis_jax.engine import sizes
from ovis_jax.engine.runner import abstract_state
from ovis_jax.errors import OvisError
from ovis_jax.plan.hlo_analysis import bytes_per_device

OWN_LENGTH = 1024
"""The maximum length of ovis-tiny, in positions."""


@pytest.fixture
def leave_room(ovis, monkeypatch):
    """Give the device just the memory for some sequences of some length, beside the model."""

    def leave_room(num_seqs: int, length: int) -> None:
        state = bytes_per_device(abstract_state(ovis.model, ovis.params, num_seqs, length))
        kept = bytes_per_device(ovis.params) + sizes.MAX_VISUAL_CACHE_BYTES
        memory = (state + kept) / sizes.MEMORY_SHARE + 2
        monkeypatch.setattr(sizes, "_memory_bytes", lambda device: int(memory))

    return leave_room


@pytest.mark.parametrize(
    "room, asked, chosen",
    [
        ((64, OWN_LENGTH), (None, None), (8, OWN_LENGTH)),
        ((64, OWN_LENGTH), (64, None), (64, OWN_LENGTH)),
        ((5, OWN_LENGTH), (None, None), (5, OWN_LENGTH)),
        ((5, OWN_LENGTH), (None, 200), (8, 200)),
        ((1, 300), (None, None), (1, 256)),
        ((6, 700), (6, None), (6, 640)),
    ],
)
def test_sizes_that_are_not_given_fit(ovis, leave_room, room, asked, chosen):
    leave_room(*room)
    assert sizes.choose_sizes(ovis, *asked) == chosen


@pytest.mark.parametrize(
    "room, asked, message",
    [
        ((5, 512), (6, 512), "; --max-num-seqs 5 or --max-model-len 384 would fit"),
        ((1, 64), (None, 512), "; use more devices, or quantize"),
        ((1, 140), (None, 512), "; --max-model-len 128 would fit"),
    ],
)
def test_sizes_that_do_not_fit(ovis, leave_room, room, asked, message):
    leave_room(*room)
    with pytest.raises(OvisError, match=r"GiB per device, but 0.00 GiB are left") as error:
        sizes.choose_sizes(ovis, *asked)
    assert str(error.value).endswith(message)

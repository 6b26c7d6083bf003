"""The few programs that run on the device, over a fixed number of slots.

Neither the length of a prompt nor its crops need other programs, and what is compiled is little:
one crop, one piece, the joining, and the step that writes one token in every slot.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ovis_jax.errors import RequestError
from ovis_jax.inference.sampling import Sampling
from ovis_jax.model.kv_cache import Cache
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.model.shards import axis_of
from ovis_jax.serving.slots import (
    Asked,
    How,
    Picked,
    Reading,
    Slots,
    asked,
    empty_reading,
    empty_slots,
    join,
    read,
    see,
    write,
)


class Steps:
    """The steps compiled for one model and one set of sizes; none compiles anything later.

    On a mesh the caches are cut along their heads as the parameters are; all else is whole on
    every device.

    Args:
      model: static.
      params: of the model, on any device or mesh of this process.
      num_slots: answers that are written at once.
      max_length: positions that a prompt and its answer may take together.
      piece: positions of a prompt that are read at a time.

    Raises:
      RequestError: a size is below 1.
    """

    def __init__(self, model: Ovis, params: Params, *, num_slots: int, max_length: int, piece: int):
        for name, size in (("slots", num_slots), ("max_length", max_length), ("piece", piece)):
            if size < 1:
                raise RequestError(f"serve: {name} is {size}, expected at least 1")
        piece = min(piece, max_length)
        self._params = params
        self.num_slots, self.max_length, self.piece = num_slots, max_length, piece
        self.tokens_per_crop = model.config.visual_tokenizer.tokens_per_crop
        c, dtype = model.config.decoder, params["decoder"]["embed"].dtype
        visual = max_length // self.tokens_per_crop * self.tokens_per_crop + piece

        whole, cache = _places(params, c.num_kv_heads)
        slots_lie = Slots(cache, whole, whole, whole, whole, whole)
        reading_lies = Reading(cache, whole)
        self.empty_slots: Callable[[], Slots] = jax.jit(
            partial(empty_slots, c, num_slots, max_length, dtype), out_shardings=slots_lie
        )
        self.empty_reading: Callable[[], Reading] = jax.jit(
            partial(empty_reading, c, visual, max_length, dtype), out_shardings=reading_lies
        )
        slots, reading = self.empty_slots(), self.empty_reading()
        vision = model.config.vision
        pixels = np.zeros((vision.image_size, vision.image_size, vision.num_channels), np.float32)
        tokens = np.zeros((1, piece), np.int32)
        one, row = asked(Sampling(), 0, 0), np.int32(0)
        logits = jax.ShapeDtypeStruct((1, c.vocab_size), jnp.float32, sharding=whole)
        active = np.zeros(num_slots, bool)

        def compiled(function: Any, arguments: Any, *, gives_away: int, gives: Any) -> Any:
            jitted = jax.jit(function, donate_argnums=gives_away, out_shardings=gives)
            return jitted.lower(*arguments).compile()

        sees = params, reading.visual, pixels, row, one.seed
        self._see = compiled(partial(see, model), sees, gives_away=1, gives=whole)
        reads = params, reading, tokens, tokens, row
        at = reading_lies, whole
        self._read = compiled(partial(read, model), reads, gives_away=1, gives=at)
        joins = slots, row, reading.cache, logits, one
        at = slots_lie, whole
        self._join = compiled(join, joins, gives_away=0, gives=at)
        writes = params, slots, active
        self._write = {
            how: compiled(partial(write, model, how), writes, gives_away=1, gives=at)
            for how in get_args(How)
        }
        for how in get_args(How):  # what is run once has been loaded, too
            slots, _ = self.write(slots, active, how)
        reading = self.see(reading, pixels, 0, 0)
        reading, logits = self.read(reading, np.zeros(1, np.int32), 0, 0)
        self.join(slots, 0, reading, logits, one)

    def see(self, reading: Reading, pixels: np.ndarray, crop: int, seed: int) -> Reading:
        """Embed the crop of that number; `reading` is given away."""
        row, halves = np.int32(crop * self.tokens_per_crop), asked(Sampling(), seed, 0).seed
        return reading._replace(visual=self._see(self._params, reading.visual, pixels, row, halves))

    def read(
        self, reading: Reading, tokens: np.ndarray, start: int, visual: int
    ) -> tuple[Reading, Array]:
        """Read one piece: int32 [t] of at most `piece` ids, of a prompt from position `start` on.

        `visual` says how many visual slots lie before it. What a prompt before it has left in
        `reading`, which is given away, is not seen: positions begin anew.
        """
        padding = (0, self.piece - len(tokens))
        ids = np.pad(tokens, padding)[None]
        positions = np.arange(start, start + len(tokens), dtype=np.int32)
        positions = np.pad(positions, padding, constant_values=-1)[None]
        return self._read(self._params, reading, ids, positions, np.int32(visual))

    def join(
        self, slots: Slots, slot: int, reading: Reading, logits: Array, one: Asked
    ) -> tuple[Slots, Picked]:
        """Let an answer begin in a slot; `slots` is given away."""
        slots, picked = self._join(slots, np.int32(slot), reading.cache, logits, one)
        return slots, jax.device_get(picked)

    def write(self, slots: Slots, active: np.ndarray, how: How) -> tuple[Slots, Picked]:
        """Write a token in every active slot; `slots` is given away."""
        slots, picked = self._write[how](self._params, slots, active)
        return slots, jax.device_get(picked)


def _places(params: Params, num_heads: int) -> tuple[Any, Any]:
    """How arrays lie that are whole on every device, and how a cache; None without a mesh."""
    place = params["decoder"]["embed"].sharding
    if not isinstance(place, NamedSharding):
        return None, None
    whole = NamedSharding(place.mesh, P())
    heads: Any = NamedSharding(place.mesh, P(None, axis_of("K", num_heads, place.mesh)))
    return whole, Cache(heads, cast(Any, whole))

"""Checkpoints of a run: what learns, the optimizer's state, and the place in the data."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import orbax.checkpoint as ocp

from ovis_jax.checkpoint.writer import check_space, write_json
from ovis_jax.errors import CheckpointError
from ovis_jax.fields import read_json
from ovis_jax.training.step import State

FACTS_FILE = "run.json"


class Store:
    """The checkpoints in a folder; saving goes on in the background.

    A checkpoint counts only once all of it is on the disk: one that was cut short is passed over,
    and the ones before it stay.

    Args:
      folder: of the run; made if it is not there.
      keep: how many checkpoints stay.
      facts: what a run was told, as JSON; once there is a checkpoint, a resumed run is held to it.
      may_change: dotted names of the facts that may be others then.

    Raises:
      CheckpointError: the folder holds the checkpoints of another run.
      OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        facts: Mapping[str, Any],
        may_change: Collection[str] = (),
    ):
        self._folder = folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        checkpoints = self._folder / "checkpoints"
        known = (self._folder / FACTS_FILE).exists() and checkpoints.exists()
        if known and ocp.utils.checkpoint_steps(checkpoints):
            self._hold(facts, may_change)
        # Whole or as it was, should we be killed.
        fresh = self._folder / f"{FACTS_FILE}.new"
        write_json(fresh, facts)
        fresh.replace(self._folder / FACTS_FILE)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(checkpoints, options=options)

    def _hold(self, facts: Mapping[str, Any], may_change: Collection[str]) -> None:
        """Compare with the run whose checkpoints the folder holds, in all that it noted."""
        before = read_json(self._folder / FACTS_FILE)
        now = json.loads(json.dumps({name: facts.get(name) for name in before}))
        found = _differences(before, now)
        if changed := [line for name, line in sorted(found.items()) if name not in may_change]:
            raise CheckpointError(
                f"{self._folder} holds another run: {'; '.join(changed)}; set them back to resume"
                " it, or give another output"
            )

    def latest(self) -> int | None:
        """The steps of the last whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: State, position: Mapping[str, Any]) -> None:
        """Begin to save a checkpoint; the one before must have ended, which is waited for.

        Raises:
          OSError: the disk is full, now or while the one before was being written.
        """
        self.wait()
        check_space(self._folder, sum(x.nbytes for x in jax.tree.leaves(state)))
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(cast(Any, state)), data=ocp.args.JsonSave(dict(position))
        )
        self._manager.save(int(state.step), args=arguments)

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """The last checkpoint, laid out as `like`, and its place in the data.

        Raises:
          CheckpointError: it cannot be read, or is of a state of other shapes.
        """
        step = self._manager.latest_step()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(cast(Any, abstract)), data=ocp.args.JsonRestore()
        )
        # orbax lets through whatever its backends raise.
        try:
            found = self._manager.restore(step, args=arguments)
        except Exception as error:
            raise CheckpointError(
                f"{self._folder / 'checkpoints' / str(step)} cannot be restored: {_short(error)};"
                " remove that folder to go on from the checkpoint before it"
            ) from error
        return found["state"], found["data"]

    def wait(self) -> None:
        """Wait until what was begun is on the disk.

        Raises:
          OSError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            kept = self.latest()
            raise OSError(
                f"a checkpoint could not be written to {self._folder}: {_short(error)}; the last"
                f" good one is of step {kept}; make room and run the same command again"
            ) from error

    def close(self) -> None:
        """Wait, and free what the checkpoints hold."""
        self.wait()
        self._manager.close()


def _short(error: Exception) -> str:
    """What orbax says, without the tree that it prints behind it."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _differences(before: Any, now: Any, name: str = "") -> dict[str, str]:
    """What two JSON values say otherwise, by dotted name."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before.keys() | now.keys()
        pairs = [(f"{name}.{key}".strip("."), before.get(key), now.get(key)) for key in keys]
        return {k: line for key, a, b in pairs for k, line in _differences(a, b, key).items()}
    return {} if before == now else {name: f"{name} was {before!r} and is {now!r}"}

"""Checkpoints of a training run: the parameters, the optimizer state and the data position."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import orbax.checkpoint as ocp

from ovis_jax.checkpoint.file_io import write_json
from ovis_jax.checkpoint.output_dirs import check_disk_space
from ovis_jax.errors import CheckpointError
from ovis_jax.json_fields import read_json
from ovis_jax.process_agreement import agree, is_agreed
from ovis_jax.training.train_step import TrainState

RUN_FILE = "run.json"


class TrainingCheckpoints:
    """The checkpoints in a run's output folder, which are saved in the background.

    Incomplete checkpoints are ignored. If saving is interrupted, the earlier checkpoints remain.

    Args:
      folder: Output folder of the run, which is created if it does not exist.
      save_total_limit: Number of checkpoints to keep.
      run_settings: Settings that determine the result, as JSON. A run can only be resumed with the
        same settings as in its checkpoints.
      changeable: Dotted names of settings that may change when a run is resumed.

    Raises:
      CheckpointError: The folder contains checkpoints from a different run.
      OSError: The folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        save_total_limit: int,
        run_settings: Mapping[str, Any],
        changeable: Collection[str] = (),
    ):
        self._folder = folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        checkpoints = self._folder / "checkpoints"
        with agree("run.json"):  # all processes read the file before process 0 writes it
            has_run = (self._folder / RUN_FILE).exists() and checkpoints.exists()
            if has_run and ocp.utils.checkpoint_steps(checkpoints):
                self._check_same_run(run_settings, changeable)
        if jax.process_index() == 0:
            # The file is replaced by renaming, so it stays intact if the process is killed.
            partial = self._folder / f"{RUN_FILE}.new"
            write_json(partial, run_settings)
            partial.replace(self._folder / RUN_FILE)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=save_total_limit, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(checkpoints, options=options)

    def _check_same_run(self, run_settings: Mapping[str, Any], changeable: Collection[str]) -> None:
        before = read_json(self._folder / RUN_FILE)
        now = json.loads(json.dumps({name: run_settings.get(name) for name in before}))
        changes = _differences(before, now)
        if lines := [line for name, line in sorted(changes.items()) if name not in changeable]:
            raise CheckpointError(
                f"{self._folder} has the checkpoints of a different run: {'; '.join(lines)};"
                " restore these settings to resume it, or choose another output_dir"
            )

    def __enter__(self) -> "TrainingCheckpoints":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        # After an error in one process only, the others do not save their parts.
        if error is None or jax.process_count() == 1 or is_agreed(error):
            self.close()

    def latest_step(self) -> int | None:
        """Return the step of the latest complete checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_position: Mapping[str, Any]) -> None:
        """Start saving a checkpoint as soon as the previous checkpoint is complete.

        Raises:
          OSError: The checkpoint or the previous one cannot be written, for example because the
            disk is full.
        """
        self.wait()
        check_disk_space(self._folder, sum(x.nbytes for x in jax.tree.leaves(state)))
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(cast(Any, state)),
            data=ocp.args.JsonSave(dict(data_position)),
        )
        self._manager.save(int(state.step), args=arguments)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restore the latest checkpoint.

        Args:
          like: A state with the same shapes, dtypes and shardings as the result.

        Returns:
          The state, and the position in the data.

        Raises:
          CheckpointError: The checkpoint cannot be read, or its shapes differ from those of `like`.
        """
        step = self._manager.latest_step()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(cast(Any, abstract)), data=ocp.args.JsonRestore()
        )
        # orbax may raise any exception from its backends.
        try:
            restored = self._manager.restore(step, args=arguments)
        except Exception as error:
            raise CheckpointError(
                f"{self._folder / 'checkpoints' / str(step)} cannot be restored: {_short(error)};"
                " remove that folder to resume from the previous checkpoint"
            ) from error
        return restored["state"], restored["data"]

    def wait(self) -> None:
        """Wait until the checkpoint that is being saved is complete.

        Raises:
          OSError: The checkpoint could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise OSError(
                f"a checkpoint could not be written to {self._folder}: {_short(error)}; the latest"
                f" complete one is of step {self.latest_step()}; free disk space and run the same"
                " command again"
            ) from error

    def close(self) -> None:
        """Wait until saving is complete, and close the checkpoint manager."""
        self.wait()
        self._manager.close()


def _short(error: Exception) -> str:
    """Return the beginning of an error message, because orbax appends whole parameter trees."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _differences(before: Any, now: Any, name: str = "") -> dict[str, str]:
    """Return descriptions of the differences between two JSON values, by dotted name."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before.keys() | now.keys()
        pairs = [(f"{name}.{key}".strip("."), before.get(key), now.get(key)) for key in keys]
        return {k: line for key, a, b in pairs for k, line in _differences(a, b, key).items()}
    return {} if before == now else {name: f"{name} was {before!r} and is {now!r}"}

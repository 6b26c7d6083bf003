"""Test ovis_jax on this accelerator, and measure its speed: `python -m benchmarks.on_accelerator`.

It needs a checkout, JAX on an accelerator and no network. Six parts run one after the other, each
in a process of its own with a time limit: facts about the device, correctness, speed, a comparison
with PyTorch, the engine and training, and a profile. Results are written as they come. A case or a
part that fails is recorded, and the others still run. `--rehearse` runs every part with small
sizes, on a CPU too.

OUT holds report.md and report.json, results.jsonl with each case, log.txt with the output of the
parts, up to two plots and two traces for a profile viewer.
"""

import argparse
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

from benchmarks.support.accelerator.part_process import Part, run_part
from benchmarks.support.accelerator.report import write_plots, write_report
from benchmarks.support.accelerator.results import collect_facts, read_results
from benchmarks.support.accelerator.settings import Settings

_MODULES = "benchmarks.support.accelerator"
PARTS = (
    Part("facts", "The device", f"{_MODULES}.facts", 40),
    Part("correctness", "Correctness", f"{_MODULES}.correctness", 80),
    Part("speed", "Speed", f"{_MODULES}.speed", 130),
    # Both sides are on the device at the same time.
    Part(
        "torch",
        "Comparison with PyTorch",
        f"{_MODULES}.against_torch",
        90,
        (("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),),
    ),
    Part("engine", "Engine and training", f"{_MODULES}.engine_and_training", 90),
    Part("profile", "Profile", f"{_MODULES}.profile", 35),
)
DEFAULT_MINUTES = 8.0


def check_accelerator(
    out: Path,
    *,
    minutes: float = DEFAULT_MINUTES,
    rehearse: bool = False,
    parts: tuple[Part, ...] = PARTS,
) -> int:
    """Run the parts and write the report.

    Args:
      out: Folder for results; must be empty or absent.
      minutes: Time for all parts; the limit of each part is its share.
      rehearse: Whether to run small sizes.
      parts: The parts to run; facts come first.

    Returns:
      The exit code: 0 if all is well, 1 if a part did not finish, a case failed or a result was
      wrong, 2 if there is no accelerator.
    """
    out.mkdir(parents=True, exist_ok=True)
    share = minutes * 60 / sum(part.seconds for part in PARTS)
    ended = []
    facts = {}
    with tempfile.TemporaryDirectory() as temporary:
        for part in parts:
            part = replace(part, seconds=part.seconds * share)
            print(f"{part.title}: up to {part.seconds:.0f} s", flush=True)
            settings = Settings(part.name, out, rehearse, part.seconds, facts)
            ended.append(run_part(part, settings, Path(temporary)))
            results = read_results(out / "results.jsonl")
            try:
                write_report(out, ended, {part.name: part.title for part in PARTS}, results)
            except Exception:  # the results are in results.jsonl; the other parts must still run
                traceback.print_exc()
            facts = collect_facts(results)
            if part.name == "facts" and not rehearse and facts.get("platform") in (None, "cpu"):
                problem = (
                    "JAX could not start; see log.txt in the results"
                    if "platform" not in facts
                    else "JAX runs on the CPU: this machine has no accelerator, or JAX lacks its "
                    "plugin (pip install 'jax[cuda13]' or 'jax[tpu]')"
                )
                print(f"error: {problem}. --rehearse runs on a CPU.", file=sys.stderr)
                return 2
    try:
        write_plots(out, results)
    except Exception:  # the report has the same figures
        traceback.print_exc()
    print((out / "report.md").read_text())
    failed = any(part["status"] != "finished" for part in ended) or any(
        x["status"] == "failed" or x.get("passed") is False for x in results
    )
    return int(failed)


def main() -> None:
    """Parse the command line, without typer, which a machine without network may lack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--minutes",
        type=float,
        default=DEFAULT_MINUTES,
        help="Total time in minutes, shared by all parts (default: %(default)s).",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("accelerator-results"),
        help="Folder for the results (default: %(default)s).",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="Run small sizes in three minutes, also on a CPU."
    )
    names = [part.name for part in PARTS]
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=names,
        default=names,
        help="Parts to run (default: all). Facts always run.",
    )
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"--minutes is {arguments.minutes}, expected more than 0")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        parser.error(f"--out {arguments.out} exists and is not an empty folder; choose another")
    chosen = {"facts", *arguments.parts}
    parts = tuple(part for part in PARTS if part.name in chosen)
    sys.exit(
        check_accelerator(
            arguments.out, minutes=arguments.minutes, rehearse=arguments.rehearse, parts=parts
        )
    )


if __name__ == "__main__":
    main()

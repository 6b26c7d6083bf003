"""The benchmark of the engine's step runs."""

from benchmarks import engine_step


def test_both_steps_are_timed(make_scheduler, runner):
    scheduler = make_scheduler(enable_prefix_caching=False)
    assert engine_step.answer(scheduler, runner.max_num_seqs, num_tokens=3) > 0
    assert engine_step.bare_step(runner, runner.cache_lengths[0], steps=3) > 0

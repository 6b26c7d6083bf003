from hypothesis import settings

# The same examples in every run, and no failure because the machine is busy.
settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")

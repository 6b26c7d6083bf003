from serving_fixtures import *  # noqa: F403

"""`python -m reward RECIPE [SECTION] [key=value ...] [--dry-run]`."""

from posttrain.__main__ import stage_main

stage_main("reward")

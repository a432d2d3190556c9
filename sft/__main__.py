"""`python -m sft RECIPE [SECTION] [key=value ...] [--dry-run]`."""

from posttrain.__main__ import stage_main

stage_main("sft")

"""`python -m dsee_scale`, and `deepspeed --module dsee_scale run RECIPE` under any launcher."""

from dsee_scale.cli import entry

entry()

"""`dsee-scale run` as a script, for launchers that want a file: `launch/finetune.py RECIPE.yaml [--flag value ...]`."""

import sys

from dsee_scale.cli import entry

sys.argv.insert(1, "run")
entry()

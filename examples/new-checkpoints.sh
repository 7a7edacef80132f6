#!/bin/sh
# From cron: merge every checkpoint that training has added since the last run. Nothing new is nothing done.
#
#   */10 * * * *  cd /srv/tuning && sh new-checkpoints.sh --report report
#
# runs/NAME/checkpoint-STEP becomes out/NAME-checkpoint-STEP.gguf. A checkpoint that is only half written fails and is
# tried again the next time; a run that meets a former one at work ends with an error and changes nothing.
set -eu
exec gguflora pipeline - --allow-empty --keep-going "$@" <<'RECIPE'
output = "out"

[sources]
checkpoints = "runs/*/checkpoint-*"

[[steps]]
name = "merged"
action = "merge"
for = { checkpoint = "sources.checkpoints" }
base = "base.gguf"
adapters = ["{checkpoint}"]
out = "{parent}-{checkpoint}.gguf"
checks = { "total.retention" = { min = 0.9 } }
RECIPE

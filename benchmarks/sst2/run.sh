#!/usr/bin/env bash
# The runs behind docs/results.md: a teacher, then six students of three layers, two initialisations by three losses.
# Expects in the working folder: `glue` (the data, one folder for each task) and `minilm` (all-MiniLM-L6-v2).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

ildistil finetune --config "$here/finetune.yaml"
ildistil export runs/finetune/version_0/checkpoints/best.ckpt teacher

task='{task: {class_path: TaskLoss}}'
logits='{logits: {class_path: LogitsKL, init_args: {temperature: 2.0, weight: 0.5}}, task: {class_path: TaskLoss, init_args: {weight: 0.5}}}'
attention="{attention: {class_path: AttentionKL, init_args: {mapping: FromInit}}, ${logits#\{}"

for layers in 2,4,6 1,2,3; do
  for loss in task logits attention; do
    name="$loss-${layers//,/}"
    ildistil fit --config "$here/fit.yaml" --model.student.layers="[$layers]" --objectives="${!loss}" \
      --trainer.logger.init_args.name="$name"
    ildistil export "runs/$name/version_0/checkpoints/best.ckpt" "students/$name"
  done
done

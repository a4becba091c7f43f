#!/usr/bin/env bash
# The runs behind docs/results.md, "One objective at a time": a student from layers 2, 4, 6 for each objective, beside
# LogitsKL and the task loss. Expects `teacher` and `glue` in the working folder (benchmarks/sst2/run.sh makes the first).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

own() { # name, objective
  ildistil fit --config "$here/fit.yaml" --trainer.logger.init_args.name="$1" --objectives="{own: $2,
    logits: {class_path: LogitsKL, init_args: {temperature: 2.0, weight: 0.5}},
    task: {class_path: TaskLoss, init_args: {weight: 0.5}}}"
}
for name in HiddenMSE HiddenCosine HiddenCKA AttentionMSE AttentionKL AttentionDIST AttentionOutputMSE QKVMSE RelationKL \
  ValueRelationKL; do
  own "$name" "{class_path: $name, init_args: {mapping: FromInit}}"
done
own CLSMSE '{class_path: CLSMSE, init_args: {mapping: FromInit, normalize: true}}'
own CLSAttentiveMSE '{class_path: CLSAttentiveMSE}'
own CLSContrast '{class_path: CLSContrast}'

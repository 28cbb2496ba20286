"""Names of the files in the folder that a run writes, beside those of `graphprune.checkpoint`."""

DENSE_ONNX, PRUNED_ONNX = "dense.onnx", "pruned.onnx"
DENSE_WEIGHTS = "dense.safetensors"
"""The dense model's weights: `finetune` needs its teacher."""
TRIALS, REPORT, STUDY = "trials.json", "report.html", "study.db"
TUNING, TRAINING = "finetune.checkpoint", "dense.checkpoint"
"""Snapshots of training runs, so that a stopped one goes on."""

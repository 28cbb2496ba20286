"""The data a network is calibrated, judged and trained on."""

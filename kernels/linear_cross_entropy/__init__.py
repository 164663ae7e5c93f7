"""hidden x head -> log-probabilities of labels, log-sum-exp and entropy; never the logits."""

"""Two hidden states x two heads -> divergence of the distributions per token; never the logits."""

"""What the recipes share: measuring a model, and later tiny tasks and cached base models."""

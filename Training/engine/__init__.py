"""Training: what happens to images, weights and losses from the first step to the evaluation."""
